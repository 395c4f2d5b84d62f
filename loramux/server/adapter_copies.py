"""The engine's copies of adapters, counted: one for each content, however many names stand for it.

A copy lives as long as anybody uses it: a name, or a request that runs on a version which lost its name.
With it lives the lease on its folder, because the engine may have to read the files again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from loramux.engine.errors import LoramuxError
from loramux.engine.types import AdapterSpec, FreedMemory
from loramux.resolvers.base import Lease
from loramux.server.engine_keeper import EngineKeeper

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Copy:
    users: int = 0
    lease: Lease | None = None  # on the folder it is read from; None while the engine does not have it
    is_pinned: bool = False
    is_sent: bool = False  # the engine was told to load it, whether it did already or not
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one load or unload at a time


class EngineCopies:
    """Loads a content with its first user and unloads it after the last."""

    def __init__(self, engine: EngineKeeper) -> None:
        self._engine = engine
        self._copies: dict[str, _Copy] = {}
        self._unloads: set[asyncio.Task[FreedMemory | None]] = set()

    def __len__(self) -> int:
        """How many contents are in use, or on their way out."""
        return len(self._copies)

    async def take(self, spec: AdapterSpec, lease: Lease, *, pinned: bool = False) -> None:
        """Become a user of a content; returns when requests may use its digest.

        Args:
            spec: what to load, unless the engine has it.
            lease: on the folder of `spec`; consumed, also by an error.
            pinned: never evict it, as long as anybody uses it.

        Raises:
            AdapterError: the engine refused it.
            EngineDead: the engine is gone.
        """
        copy = self._copies.setdefault(spec.digest, _Copy())
        copy.users += 1  # before anything is awaited: nobody may unload it now
        try:
            async with copy.lock:
                if copy.lease is None or (pinned and not copy.is_pinned):
                    await self._load(copy, spec, pinned)
                if copy.lease is None:
                    copy.lease = lease
                else:
                    lease.release()
        except BaseException:
            lease.release()
            self.give_back(spec.digest)
            raise

    def give_back(self, digest: str) -> asyncio.Task[FreedMemory | None]:
        """End one use; the result says what was freed, None if others still use the content."""
        copy = self._copies[digest]
        copy.users -= 1
        task = asyncio.create_task(self._unload_if_unused(digest, copy))
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)
        return task

    async def _load(self, copy: _Copy, spec: AdapterSpec, pinned: bool) -> None:
        copy.is_sent = True  # should we be cancelled, the engine goes on
        try:
            await self._engine.load_adapter(spec, pinned=pinned)
        except LoramuxError:
            copy.is_sent = copy.lease is not None  # a load that fails leaves nothing behind
            raise
        copy.is_pinned = copy.is_pinned or pinned

    async def _unload_if_unused(self, digest: str, copy: _Copy) -> FreedMemory | None:
        if copy.users:
            return None
        freed = None
        async with copy.lock:
            if copy.users or self._copies.get(digest) is not copy:
                return None
            if copy.is_sent:
                try:
                    freed = await self._engine.unload_adapter(digest)
                except LoramuxError as error:  # the engine has ended, and its memory with it
                    logger.warning("adapter %s could not be unloaded: %s", digest[:16], error.message)
            if copy.lease is not None:
                copy.lease.release()
            copy.lease, copy.is_pinned, copy.is_sent = None, False, False
            if not copy.users:
                del self._copies[digest]
        return freed
