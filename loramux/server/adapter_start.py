"""Adapters at the server's start: those of the command line, and those of the journal.

Adapters of `--lora-modules` are there before the server listens. Those of the journal come back while it
already serves; requests that name them wait, and `/ready` waits for the pinned ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from loramux.engine.errors import AdapterUnavailable, InvalidConfig, LoramuxError
from loramux.engine.types import AdapterSpec
from loramux.plugins.discovery import load_resolvers
from loramux.resolvers.base import ResolverContext
from loramux.resolvers.chain import ResolverChain
from loramux.resolvers.inspect import inspect_adapter
from loramux.resolvers.sources import Sources
from loramux.server.adapter_bring_up import BringUp
from loramux.server.adapter_config import AdapterConfig, AdapterSource
from loramux.server.adapter_copies import EngineCopies
from loramux.server.adapter_events import AdapterEvents
from loramux.server.adapter_manager import AdapterManager
from loramux.server.adapter_orders import Loaded, LoadOrder
from loramux.server.adapters import AdapterTable, Origin
from loramux.server.engine_keeper import EngineKeeper
from loramux.server.journal import Journal, JournalEntry

logger = logging.getLogger(__name__)

_SHOW_PROGRESS_EVERY_S: Final = 5.0
_RETRY_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # after each failure; the last one again and again

Say = Callable[[str], None]


def build_manager(
    config: AdapterConfig, engine: EngineKeeper, *, model: str, served_names: Collection[str]
) -> AdapterManager:
    """Put together what loads and unloads adapters.

    Args:
        config: how adapters are served.
        engine: a started client.
        model: as `--model` names it, for resolvers.
        served_names: of the base model.

    Raises:
        InvalidConfig: a plugin, the local store or the state folder cannot be used.
    """
    info = engine.info

    def inspect(folder: Path) -> AdapterSpec:
        return inspect_adapter(folder, info.lora_sites, max_lora_rank=info.max_lora_rank)

    chain = None
    if info.enable_lora and config.allow_runtime_updating:
        resolvers = load_resolvers(ResolverContext(config.environ, config.sources.offline))
        chain = ResolverChain(resolvers, base_model_name=model) if resolvers else None
    sources = _open_sources(config) if info.enable_lora else None
    bring_up = BringUp(
        AdapterTable(list(served_names)),
        EngineCopies(engine),
        AdapterEvents(),
        sources,
        inspect,
        chain=chain,
        journal=Journal.open(config.state_dir) if config.state_dir else None,
    )
    static = frozenset(module.name for module in config.modules)
    return AdapterManager(bring_up, static_names=static, wait_s=config.load_timeout_s)


def _open_sources(config: AdapterConfig) -> Sources:
    try:
        sources = Sources(config.sources)
        sources.store.clean()  # of what dead processes left
    except AdapterUnavailable as error:
        raise InvalidConfig(f"{error.message} (--adapter-store-dir)", param="--adapter-store-dir") from error
    return sources


async def load_modules(
    manager: AdapterManager, modules: Collection[AdapterSource], *, strict: bool, say: Say
) -> None:
    """Load the adapters of the command line, all at the same time.

    What clients changed later, by the journal, is left to `Replay`.

    Raises:
        LoramuxError: one of them cannot be served, and `strict` is set.
    """
    journal = manager.journal
    wanted = [
        module
        for module in modules
        if journal is None or not (module.name in journal.entries or module.name in journal.removed)
    ]
    for module in set(modules) - set(wanted):
        say(f"adapter {module.name}: the journal of --state-dir wins over --lora-modules")
    tasks = [asyncio.create_task(_load_module(manager, module)) for module in wanted]
    with _progress_shown(manager, say):
        try:
            for task, module in zip(tasks, wanted, strict=True):
                await _report(task, module, strict=strict, say=say)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _load_module(manager: AdapterManager, module: AdapterSource) -> Loaded:
    order = LoadOrder(
        name=module.name, source=module.uri, base_model_name=module.base_model_name, origin=Origin.FLAG
    )
    return await manager.load(order)


async def _report(task: asyncio.Task[Loaded], module: AdapterSource, *, strict: bool, say: Say) -> None:
    try:
        ref = (await task).ref
    except LoramuxError as error:
        message = error.message.removeprefix(f"Loading lora {module.name} failed: ")
        message = f"adapter {module.name!r} ({module.path}): {message}"
        if strict:
            raise type(error)(message, param=error.param) from error
        say(f"warning: {message}")
    else:
        spec = ref.spec
        size = f"{spec.nbytes / 1e6:.1f} MB"
        say(f"adapter {ref.name}: rank {spec.rank}, {len(spec.modules)} modules, {size}")


@contextlib.contextmanager
def _progress_shown(manager: AdapterManager, say: Say) -> Iterator[None]:
    """Every few seconds, how far the loads are."""

    async def show() -> None:
        while True:
            await asyncio.sleep(_SHOW_PROGRESS_EVERY_S)
            for row in manager.table.rows():
                if row.loading is not None:
                    total = row.loading.total_bytes
                    of = f" of {total / 1e6:.1f}" if total else ""
                    done = f"{row.loading.done_bytes / 1e6:.1f}{of} MB"
                    say(f"adapter {row.name}: {row.loading.state}, {done}")

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()


class Replay:
    """Brings back what the journal knows."""

    def __init__(self, manager: AdapterManager) -> None:
        self._manager = manager
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, except_for: Collection[str] = ()) -> None:
        """Start every load, but of those names; from now on requests wait for them."""
        journal = self._manager.journal
        for entry in list(journal.entries.values()) if journal else ():
            if entry.name in except_for:
                continue
            if entry.pinned:
                self._manager.required.add(entry.name)
            self._tasks.append(asyncio.create_task(self._bring_back(entry)))

    async def stop(self) -> None:
        """Stop trying."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _bring_back(self, entry: JournalEntry) -> None:
        """Load one adapter; again and again while its source is down and nobody decided otherwise."""
        journal = self._manager.journal
        order = LoadOrder(
            name=entry.name,
            source=entry.source,
            pinned=entry.pinned,
            base_model_name=entry.base_model_name,
            shown_source=entry.shown_source,
            last=(entry.version, entry.digest),
        )
        for attempt in range(1_000_000):
            if journal is None or journal.entries.get(entry.name) != entry:
                return  # changed by a client meanwhile
            try:
                ref = (await self._manager.load(order)).ref
            except AdapterUnavailable:
                await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            except LoramuxError as error:  # it stays in the journal for the next start
                logger.warning("adapter %r of the journal: %s", entry.name, error.message)
                return
            else:
                if ref.digest != entry.digest:
                    logger.warning("adapter %r: its source has changed since the last run", entry.name)
                return
