"""What happens to adapters, told once: an event for each step, and a log line for each change and failure.

Subscribers (`GET /v1/lora_adapters/events`) have a bounded queue each; one that reads too slowly loses
the oldest events and is told how many.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec

from loramux.engine.types import FreedMemory
from loramux.server.adapters import AdapterRef, AdapterState, Failure

logger = logging.getLogger(__name__)

_MAX_QUEUED: Final = 256


class AdapterEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One change of one name."""

    id: int
    time: float  # Unix seconds
    name: str
    state: str
    version: int | None = None
    digest: str | None = None
    source: str | None = None
    error: dict[str, Any] | None = None
    freed: FreedMemory | None = None
    num_lost: int | None = None  # events that this subscriber missed just before


class _Subscriber:
    def __init__(self) -> None:
        self.events: deque[AdapterEvent] = deque()
        self.num_lost = 0
        self.is_closed = False
        self.arrived = asyncio.Event()

    def put(self, event: AdapterEvent) -> None:
        if len(self.events) == _MAX_QUEUED:
            self.events.popleft()
            self.num_lost += 1
        self.events.append(event)
        self.arrived.set()

    def close(self) -> None:
        self.is_closed = True
        self.arrived.set()


class AdapterEvents:
    """The door through which every change of an adapter is told.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ids = itertools.count(1)
        self._subscribers: set[_Subscriber] = set()
        self._listeners: list[Callable[[AdapterEvent], None]] = []
        self._is_closed = False

    def moved(self, name: str, state: AdapterState, source: str) -> None:
        """A load got on."""
        logger.debug("adapter %r: %s (%s)", name, state.value, source)
        self._publish(AdapterEvent(**self._stamp(), name=name, state=state, source=source))

    def ready(self, ref: AdapterRef) -> None:
        """A version answers requests from now on."""
        spec = ref.spec
        text = "adapter %r: ready, version %d, rank %d, %d modules, %d bytes, sha256:%s (%s)"
        logger.info(
            text,
            *(ref.name, ref.version, spec.rank, len(spec.modules), spec.nbytes, ref.digest[:16], ref.source),
        )
        self._publish(self._of(ref, AdapterState.READY))

    def draining(self, ref: AdapterRef, num_leases: int) -> None:
        """A version takes no new requests any more."""
        logger.info("adapter %r: version %d drains %d requests", ref.name, ref.version, num_leases)
        self._publish(self._of(ref, AdapterState.DRAINING))

    def gone(self, ref: AdapterRef, freed: FreedMemory | None) -> None:
        """A version is no longer used; None if other names need its content."""
        text = "adapter %r: version %d is gone, freed %s"
        what = "nothing, its content is still in use"
        if freed is not None:
            what = f"{freed.host_bytes} bytes, {freed.lanes} lanes, {freed.kv_blocks} KV blocks"
        logger.info(text, ref.name, ref.version, what)
        self._publish(self._of(ref, AdapterState.GONE, freed=freed))

    def failed(self, name: str, source: str, failure: Failure) -> None:
        """A load came to nothing."""
        error = failure.error
        logger.warning("adapter %r: failed (%s): %s", name, failure.code, error.message)
        shown = {"message": error.message, "param": error.param, "code": failure.code}
        event = AdapterEvent(
            **self._stamp(), name=name, state=AdapterState.FAILED, source=source, error=shown
        )
        self._publish(event)

    def listen(self, listener: Callable[[AdapterEvent], None]) -> Callable[[], None]:
        """Call `listener` with every event, at once; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def subscribe(self) -> AsyncGenerator[AdapterEvent, None]:
        """Events from now on, until the server stops."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        try:
            while not (subscriber.is_closed or self._is_closed):
                await subscriber.arrived.wait()
                subscriber.arrived.clear()
                while subscriber.events:
                    event = subscriber.events.popleft()
                    num_lost, subscriber.num_lost = subscriber.num_lost, 0
                    yield msgspec.structs.replace(event, num_lost=num_lost) if num_lost else event
        finally:
            self._subscribers.discard(subscriber)

    def close(self) -> None:
        """End every subscription."""
        self._is_closed = True
        for subscriber in self._subscribers:
            subscriber.close()

    def _stamp(self) -> dict[str, Any]:
        return {"id": next(self._ids), "time": self._clock()}

    def _of(self, ref: AdapterRef, state: AdapterState, *, freed: FreedMemory | None = None) -> AdapterEvent:
        return AdapterEvent(
            **self._stamp(),
            name=ref.name,
            state=state,
            version=ref.version,
            digest=ref.digest,
            source=ref.source,
            freed=freed,
        )

    def _publish(self, event: AdapterEvent) -> None:
        for subscriber in self._subscribers:
            subscriber.put(event)
        for listener in self._listeners:
            listener(event)
