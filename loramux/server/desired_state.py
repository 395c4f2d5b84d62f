"""`--adapters-file`: the adapters that should be served, written by the operator and kept true.

    adapters:
      - name: sql
        source: hf://org/sql-lora@main
        pinned: true            # optional, as are base_model_name and digest

The file is looked at every few seconds. What is new or changed in it is loaded (in place, if the name is
taken), what left it is unloaded, what failed is tried again later. Names that the file never had are none
of its business. A file that cannot be read changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from loramux.engine.errors import AdapterNotFound, InvalidConfig, LoramuxError
from loramux.resolvers.uri import parse_uri
from loramux.server.adapter_manager import AdapterManager
from loramux.server.adapter_names import name_problem
from loramux.server.adapter_orders import IfLoaded, LoadOrder
from loramux.server.adapters import Origin

logger = logging.getLogger(__name__)

_MAX_BYTES: Final = 16 << 20
_RETRY_S: Final = 10.0  # between two tries of an adapter that failed


class DesiredAdapter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the file."""

    name: str
    source: str
    pinned: bool = False
    base_model_name: str | None = None
    digest: str | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    adapters: list[DesiredAdapter] = []


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which the server is not what the file says."""

    name: str
    problem: str


class DesiredReport(msgspec.Struct, frozen=True, kw_only=True):
    """How the server compares to the file."""

    file: str
    num_adapters: int
    in_sync: bool
    error: str | None
    drift: list[Drift]


@dataclass(slots=True)
class _Progress:
    """What was done for one entry."""

    wanted: DesiredAdapter
    task: asyncio.Task[None] | None = None
    is_done: bool = False
    error: str | None = None
    retry_at: float = field(default=0.0)


class DesiredState:
    """Watches the file and makes the server follow it.

    Args:
        path: the file, which must be readable at the start.
        manager: acts.
        interval_s: between two looks.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        path: Path,
        manager: AdapterManager,
        *,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._manager = manager
        self._interval_s = interval_s
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None  # the file's time, size and inode
        self._entries: dict[str, _Progress] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self._error: str | None = None
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Read the file and follow it from now on; returns at once.

        Raises:
            InvalidConfig: it cannot be read.
        """
        self._take_in(read_desired(self._path, self._manager.table.base_names), self._look())
        for entry in self._entries.values():
            if entry.wanted.pinned:
                self._manager.required.add(entry.wanted.name)
        self._act()
        self._watcher = asyncio.create_task(self._watch())

    @property
    def names(self) -> Collection[str]:
        """What the file names."""
        return self._entries.keys()

    async def stop(self) -> None:
        """Leave everything as it is."""
        tasks = [entry.task for entry in self._entries.values() if entry.task]
        tasks += [*self._removals, *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def report(self) -> DesiredReport:
        """Where the server differs from the file."""
        drift = [
            Drift(name=name, problem=problem)
            for name, entry in sorted(self._entries.items())
            if (problem := self._problem(entry)) is not None
        ]
        return DesiredReport(
            file=self._path.name,
            num_adapters=len(self._entries),
            in_sync=not drift and self._error is None,
            error=self._error,
            drift=drift,
        )

    def _problem(self, entry: _Progress) -> str | None:
        if entry.error is not None:
            return entry.error
        ref = self._manager.table.current(entry.wanted.name)
        if ref is None:
            return "not loaded yet" if not entry.is_done else "unloaded by a client"
        if not entry.is_done:
            return "being replaced"
        return None if ref.origin is Origin.FILE else "replaced by a client"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            look = self._look()
            if look != self._seen:
                try:
                    wanted = await asyncio.to_thread(read_desired, self._path, self._manager.table.base_names)
                    self._take_in(wanted, look)
                except InvalidConfig as error:
                    self._seen, self._error = look, error.message
                    logger.error("%s; the adapters stay as they are", error.message)
            self._act()

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _take_in(self, wanted: list[DesiredAdapter], look: tuple[int, int, int] | None) -> None:
        """Compare what the file says now with what it said before."""
        self._seen, self._error = look, None
        names = {adapter.name for adapter in wanted}
        for name in [name for name in self._entries if name not in names]:
            entry = self._entries.pop(name)
            removal = asyncio.create_task(self._remove(name, entry.task))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)
        for adapter in wanted:
            entry = self._entries.setdefault(adapter.name, _Progress(adapter))
            if entry.wanted != adapter:
                entry.wanted, entry.is_done, entry.error, entry.retry_at = adapter, False, None, 0.0

    def _act(self) -> None:
        """Start what is to be done."""
        now = self._clock()
        for entry in self._entries.values():
            is_busy = entry.task is not None and not entry.task.done()
            if not entry.is_done and not is_busy and now >= entry.retry_at:
                entry.task = asyncio.create_task(self._load(entry, entry.wanted))

    async def _load(self, entry: _Progress, wanted: DesiredAdapter) -> None:
        order = LoadOrder(
            name=wanted.name,
            source=wanted.source,
            if_loaded=IfLoaded.REPLACE,
            pinned=wanted.pinned,
            base_model_name=wanted.base_model_name,
            digest=wanted.digest,
            origin=Origin.FILE,
        )
        try:
            await self._manager.load(order)
        except LoramuxError as error:
            if entry.wanted == wanted:
                entry.error, entry.retry_at = error.message, self._clock() + _RETRY_S
        else:
            if entry.wanted == wanted:
                entry.is_done, entry.error = True, None

    async def _remove(self, name: str, loading: asyncio.Task[None] | None) -> None:
        if loading is not None:
            loading.cancel()
        with contextlib.suppress(AdapterNotFound):
            await self._manager.unload(name)


def read_desired(path: Path, base_names: Sequence[str]) -> list[DesiredAdapter]:
    """The entries of an adapters file.

    Raises:
        InvalidConfig: it cannot be read, or an entry is wrong; names the entry.
    """
    where = f"--adapters-file {path}"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidConfig(f"{where} has more than {_MAX_BYTES} bytes", param="--adapters-file")
        content = msgspec.yaml.decode(path.read_bytes(), type=_File | None) or _File()
        seen: set[str] = set()
        for adapter in content.adapters:
            problem = name_problem(adapter.name, base_names)
            if problem or adapter.name in seen:
                problem = problem or "stands there twice"
                raise InvalidConfig(f"{where}: adapter {adapter.name[:256]!r} {problem}")
            seen.add(adapter.name)
            parse_uri(adapter.source, param=f"source of {adapter.name!r}")
    except InvalidConfig:
        raise
    except LoramuxError as error:
        raise InvalidConfig(f"{where}: {error.message}", param="--adapters-file") from error
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise InvalidConfig(f"{where}: {error}", param="--adapters-file") from error
    return content.adapters
