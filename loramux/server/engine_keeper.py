"""Keeps an engine running: when its process ends or hangs, another one takes its place.

    up ──(process ended, or watchdog)──► down ──► starting ──► up
                                           ▲          │
                                           └──(fails)─┴──► given up: `max_restarts` in a row finished nothing

Whatever runs in an engine that is lost fails with `EngineDead`, once; nothing of it is tried again,
because a request may be what killed the engine. What is asked meanwhile waits a moment for the next
engine. That one is told of every adapter that was loaded, and reads each when it is needed first, so
that the base model answers at once however many there are. Digests mean the same in every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from loramux.engine.client import ENGINE_COMMAND, EngineClient, SequenceStream
from loramux.engine.config import EngineConfig
from loramux.engine.errors import EngineDead, LoramuxError
from loramux.engine.types import AdapterSpec, EngineInfo, EngineStats, FreedMemory, Request
from loramux.server.engine_care import EngineCare
from loramux.server.engine_watchdog import Watchdog, cpu_seconds

logger = logging.getLogger(__name__)

_LONG_LIFE_S: Final = 60.0  # an engine that lived so long was worth its start
_BACKOFF_S: Final = (0.0, 0.0, 1.0, 2.0, 5.0)  # before each start in a row; the last one again and again
_PATIENCE_S: Final = 2.0  # a step of a large model takes as long
_START_LIMIT_S: Final = 60.0  # a start may take this, or ten times as long as the first one
_START_LIMIT_TIMES: Final = 10.0
_SPECS_A_FRAME: Final = 16  # of restored adapters: encoding them must not hold up the event loop
_NOTHING_FREED: Final = FreedMemory(lanes=0, host_bytes=0, kv_blocks=0)


@dataclass(frozen=True, slots=True)
class _Held:
    spec: AdapterSpec
    pinned: bool


class EngineKeeper:
    """The engine, whichever process it is now. All methods belong to one event loop.

    Args:
        config: what each process is started with.
        command: the program that is the engine.
        care: when to replace it.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        care: EngineCare | None = None,
    ) -> None:
        self.num_restarts = 0  # engines that took the place of a lost one
        self._care = care or EngineCare()
        self.on_stats: Callable[[EngineStats], None] = lambda _: None  # called about once a second
        self._last_stats = EngineStats()
        self._new_client = partial(EngineClient, config, command=command, on_stats=self._hear_stats)
        self._client = self._new_client()  # the newest one that was up
        self._starting: EngineClient | None = None
        self._held: dict[str, _Held] = {}  # what an engine must know, by digest
        self._settled = asyncio.Event()  # the engine is up, or never will be again
        self._given_up = asyncio.Event()
        self._why_given_up = "the engine is not running"
        self._fruitless = 0  # engines in a row that finished nothing
        self._first_start_s = 0.0
        self._keeping: asyncio.Task[None] | None = None
        self._chores: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> EngineInfo:
        """What the newest engine told about itself; only after `start`."""
        return self._client.info

    @property
    def is_alive(self) -> bool:
        """True while requests can be served."""
        return self._client.is_alive

    @property
    def problem(self) -> str | None:
        """Why no request can be served now; None if they can."""
        if self._client.is_alive:
            return None
        return self._why_given_up if self._given_up.is_set() else "the engine is restarting"

    @property
    def pid(self) -> int | None:
        """The process id of the engine, or of the last one."""
        return self._client.pid

    @property
    def last_heartbeat_s(self) -> float:
        """When the engine last said anything (monotonic seconds)."""
        return self._client.last_heartbeat_s

    async def wait_dead(self) -> None:
        """Return when there will be no engine any more."""
        await self._given_up.wait()

    async def start(self) -> EngineInfo:
        """Start the first engine and wait until its model is loaded.

        Raises:
            UnsupportedModel, InvalidConfig: it refused to start.
            EngineDead: it ended while it was starting.
        """
        began_s = time.monotonic()
        info = await self._client.start()
        self._first_start_s = time.monotonic() - began_s
        self._settled.set()
        self._keeping = asyncio.create_task(self._keep())
        return info

    async def stop(self) -> None:
        """End the engine for good. Everything in flight fails with `EngineDead`."""
        self._give_up("the engine was stopped")
        tasks = [*([self._keeping] if self._keeping else []), *self._chores]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._starting is not None:
            self._starting.abandon("the engine was stopped")
            await self._starting.stop()
        await self._client.stop()

    def kill(self) -> None:
        """End the engine's process without waiting for its step; `stop` is still to be called."""
        self._give_up("the engine was stopped")
        for client in (self._client, self._starting):
            if client is not None:
                client.abandon("the engine was stopped")

    @asynccontextmanager
    async def open(
        self, requests: Sequence[Request], *, max_wait_s: float = math.inf
    ) -> AsyncGenerator[SequenceStream, None]:
        """Start several sequences together; their outputs come in one iterator, interleaved.

        Leaving the context aborts what still runs.

        Args:
            requests: one for each sequence.
            max_wait_s: for the next engine, if that is less than `EngineCare` allows.

        Raises:
            EngineDead: there is no engine, also after a wait; or it is lost while they run.
        """
        client = await self._running_client(max_wait_s)
        async with client.open(requests) as sequences:
            yield sequences

    async def load_adapter(self, spec: AdapterSpec, *, pinned: bool = False) -> None:
        """Read an adapter into the engine; returns when requests may use its digest.

        If the engine is lost meanwhile, the next one is asked, once.

        Raises:
            AdapterIncompatible, AdapterNotFound: its files are not what the inspection saw.
            EngineDead: there is no engine, or the second one is lost as well.
        """
        for is_last in (False, True):
            client = await self._running_client()
            try:
                await client.load_adapter(spec, pinned=pinned)
                break
            except EngineDead:
                if is_last:
                    raise
        held = self._held.get(spec.digest)
        self._held[spec.digest] = _Held(spec, pinned or (held is not None and held.pinned))

    async def unload_adapter(self, digest: str) -> FreedMemory:
        """Refuse new requests for an adapter at once; returns when its last sequence has ended.

        If the engine is lost first, nothing is left to be freed.

        Raises:
            AdapterNotFound: the engine does not have it.
        """
        self._held.pop(digest, None)
        try:
            return await self._client.unload_adapter(digest)
        except EngineDead:
            return _NOTHING_FREED

    async def stats(self, *, patience_s: float = _PATIENCE_S) -> EngineStats:
        """A snapshot of the engine's load; its counters start again with every engine.

        Args:
            patience_s: with an engine that is busy, or hangs; then the last snapshot must do.

        Raises:
            EngineDead: there is no engine now.
        """
        try:
            return await asyncio.wait_for(self._client.stats(), patience_s)
        except TimeoutError:
            return self._last_stats

    def _hear_stats(self, stats: EngineStats) -> None:
        self._last_stats = stats
        self.on_stats(stats)

    async def _running_client(self, max_wait_s: float = math.inf) -> EngineClient:
        """The engine, if need be the next one.

        Raises:
            EngineDead: it did not come in time, or never will.
        """
        if not self._client.is_alive and not self._given_up.is_set():
            self._settled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), min(self._care.restart_wait_s, max_wait_s))
        if (problem := self.problem) is not None:
            raise EngineDead(problem)
        return self._client

    def _give_up(self, why: str) -> None:
        if not self._given_up.is_set():
            self._why_given_up = why
            self._given_up.set()
        self._settled.set()

    async def _keep(self) -> None:
        """Watch the engine and replace it, until there is no hope."""
        try:
            while True:
                began_s = time.monotonic()
                await self._until_lost(self._client)
                if self._client.num_finished or time.monotonic() - began_s >= _LONG_LIFE_S:
                    self._fruitless = 0
                if not await self._replace():
                    return
        except Exception:
            logger.exception("the engine cannot be kept running")
            self._client.abandon("the engine is not running")
            self._give_up("the engine is not running")

    async def _until_lost(self, client: EngineClient) -> None:
        dead = asyncio.ensure_future(client.wait_dead())
        watchdog = Watchdog(self._care.watchdog_s)
        try:
            while not dead.done():
                await asyncio.wait((dead,), timeout=watchdog.interval_s)
                pid = client.pid
                cpu_s = cpu_seconds(pid) if pid is not None and not dead.done() else None
                why = watchdog.look(client.last_heartbeat_s, cpu_s, time.monotonic())
                if why is not None and not dead.done():
                    logger.error("the engine hangs and is killed: %s", why)
                    client.abandon(f"the engine hung and was killed ({why})")
        finally:
            dead.cancel()

    async def _replace(self) -> bool:
        """Start the next engine; False if that was given up."""
        began_s = time.monotonic()
        for chore in self._chores:
            chore.cancel()
        await self._client.stop()
        while True:
            if self._fruitless >= self._care.max_restarts:
                self._give_up("the engine is not running")
                return False
            await asyncio.sleep(_BACKOFF_S[min(self._fruitless, len(_BACKOFF_S) - 1)])
            self._fruitless += 1
            if (client := await self._start_another()) is not None:
                break
        self._client, self._starting = client, None
        self.num_restarts += 1
        self._settled.set()
        self._do(self._pin(client))
        logger.warning(
            "the engine is back after %.1f s, with %d adapters", time.monotonic() - began_s, len(self._held)
        )
        return True

    async def _start_another(self) -> EngineClient | None:
        client = self._starting = self._new_client()
        try:
            limit_s = max(_START_LIMIT_S, _START_LIMIT_TIMES * self._first_start_s)
            await asyncio.wait_for(client.start(), limit_s)
            await self._restore(client)
        except (LoramuxError, TimeoutError) as error:
            why = error.message if isinstance(error, LoramuxError) else "it took too long"
            logger.error("the engine could not be started again: %s", why)
            client.abandon(why)
            await client.stop()
            self._starting = None
            return None
        return client

    async def _restore(self, client: EngineClient) -> None:
        """Tell a new engine of the adapters; until that is done, nobody else talks to it."""
        specs = [held.spec for held in self._held.values()]
        for first in range(0, len(specs), _SPECS_A_FRAME):
            client.restore_adapters(specs[first : first + _SPECS_A_FRAME])
            await asyncio.sleep(0)
        for spec in specs:
            if spec.digest not in self._held:  # unloaded meanwhile
                self._do(_forget(client, spec.digest))

    async def _pin(self, client: EngineClient) -> None:
        for held in [held for held in self._held.values() if held.pinned]:
            if held.spec.digest not in self._held:
                continue
            try:
                await client.load_adapter(held.spec, pinned=True)
            except EngineDead:
                return
            except LoramuxError as error:
                logger.warning("adapter %s could not be pinned: %s", held.spec.digest[:16], error.message)

    def _do(self, chore: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


async def _forget(client: EngineClient, digest: str) -> None:
    with contextlib.suppress(LoramuxError):
        await client.unload_adapter(digest)
