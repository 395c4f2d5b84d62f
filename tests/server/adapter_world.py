"""Everything that serves adapters but HTTP: a manager, a store, and the stand-in engine's process."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from loramux.engine.config import EngineConfig
from loramux.engine.types import EngineStats
from loramux.resolvers.settings import SourceSettings
from loramux.server.adapter_config import AdapterConfig
from loramux.server.adapter_events import AdapterEvent
from loramux.server.adapter_manager import AdapterManager
from loramux.server.adapter_orders import LoadOrder
from loramux.server.adapter_start import build_manager
from loramux.server.engine_keeper import EngineKeeper
from tests.adapter_files import llama_sites, write_adapter


class World:
    """A manager, what is around it, and what was told."""

    def __init__(self, manager: AdapterManager, engine: EngineKeeper, folder: Path) -> None:
        self.manager = manager
        self.engine = engine
        self.folder = folder
        self.told: list[AdapterEvent] = []

    def adapter(self, seed: int, **config: Any) -> str:
        """The path of an adapter whose content is the seed's."""
        return str(write_adapter(self.folder / f"adapter-{seed}", llama_sites(), seed=seed, **config))

    def order(self, name: str, seed: int, **fields: Any) -> LoadOrder:
        """A load of it."""
        return LoadOrder(name=name, source=self.adapter(seed), **fields)

    async def engine_digests(self) -> set[str]:
        """What the engine holds."""
        stats: EngineStats = await self.engine.stats()
        return set(stats.host_adapters)

    def states(self, name: str) -> list[str]:
        """The states that were told of a name."""
        return [event.state for event in self.told if event.name == name]


@asynccontextmanager
async def adapter_world(
    tmp_path: Path,
    *,
    state_dir: Path | None = None,
    environ: Mapping[str, str] | None = None,
    **fields: Any,
) -> AsyncGenerator[World, None]:
    """A world whose adapters lie under `tmp_path`."""
    settings = SourceSettings(store_dir=tmp_path / "store", allowed_local_paths=(tmp_path,))
    config = AdapterConfig(
        allow_runtime_updating=True, state_dir=state_dir, sources=settings, environ=environ or {}, **fields
    )
    command = (sys.executable, "-m", "tests.server.fake_engine")
    engine = EngineKeeper(EngineConfig(model="tiny", enable_lora=True), command=command)
    await engine.start()
    manager = build_manager(config, engine, model="tiny", served_names=["tiny", "alias"])
    world = World(manager, engine, tmp_path)
    publish = manager.events.listen(world.told.append)
    try:
        yield world
    finally:
        publish()
        await manager.aclose()
        await engine.stop()
