"""Adapters that come and go while the server runs: load, replace, unload, and resolve on first use.

Every load is a flight: one a name at a time, in a task of its own, so that a caller who gives up does not
stop it and a second one who wants the same joins it. A flight ends in one step that moves the name;
until then requests get what they got before. What a name leaves behind goes when its last request ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import Final

from loramux.engine.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterUnavailable,
    InvalidRequest,
    LoramuxError,
    ModelNotFound,
)
from loramux.engine.types import FreedMemory
from loramux.resolvers.base import PinnedSource
from loramux.resolvers.uri import parse_uri
from loramux.server.adapter_bring_up import BringUp
from loramux.server.adapter_flights import Flight, Flights, again
from loramux.server.adapter_names import RESERVED_NAME, require_adapter_name
from loramux.server.adapter_orders import (
    AdapterChange,
    IfLoaded,
    Loaded,
    LoadOrder,
    Outcome,
    Unloaded,
    load_change,
    unload_change,
)
from loramux.server.adapters import AdapterLease, AdapterRef, Failure, Origin
from loramux.server.errors import AdapterConflict, AdapterExists, AdapterLoading, lookup

logger = logging.getLogger(__name__)

_PARALLEL_INSPECTIONS: Final = 4
_UNLOAD_TIMEOUT_S: Final = 30.0  # for the engine to free what nobody uses
# For how long an adapter that a request named, and that could not be had, is not tried again.
_RETRY_REFUSED_S: Final = 30.0
_RETRY_UNAVAILABLE_S: Final = 2.0


class AdapterManager:
    """Acts on the table.

    Args:
        bring_up: what a load goes through, and the table that this object alone changes.
        static_names: those of `--lora-modules`: that one was unloaded must be written down.
        wait_s: how long a request waits for an adapter that is on its way.
        clock: Unix seconds.
    """

    def __init__(
        self,
        bring_up: BringUp,
        *,
        static_names: Collection[str] = (),
        wait_s: float = 120.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.bring_up = bring_up
        self.table = bring_up.table
        self.events = bring_up.events
        self.journal = bring_up.journal
        self.required: set[str] = set()  # names that a start waits for
        self.on_gone: Callable[[AdapterRef], None] = lambda _: None  # for who keeps something beside it
        self.on_change: Callable[[AdapterChange], None] = lambda _: None  # for who writes it down
        self._chain = bring_up.chain
        self._static_names = frozenset(static_names)
        self._wait_s = wait_s
        self._clock = clock
        self._flights = Flights()
        self._leaving: dict[tuple[str, int], asyncio.Future[FreedMemory | None]] = {}
        self._farewells: set[asyncio.Task[None]] = set()
        self.table.on_unused = self._on_unused

    # Requests

    async def lease(self, name: str) -> AdapterLease:
        """Hold the adapter that a request names; waits for one that is on its way, or that resolvers know.

        Raises:
            ModelNotFound: nobody knows it.
            AdapterError: it is known, and cannot be had.
        """
        deadline_s = time.monotonic() + self._wait_s
        while True:
            lease = self.table.lease(name)
            if lease is not None:
                return lease
            flight = self._flights.get(name) or self._look_for(name)
            if not await flight.ended(max(0.0, deadline_s - time.monotonic())):
                raise AdapterLoading(
                    f"adapter {name!r} is still loading after {self._wait_s:g} s"
                    " (the server's --adapter-load-timeout)",
                    param="model",
                )
            if flight.order.origin is Origin.RESOLVER or flight.was_cut_off:  # else: its caller's error
                await flight.landing()

    def _look_for(self, name: str) -> Flight:
        """Start to resolve and load what a request names.

        Raises:
            ModelNotFound: there are no resolvers, or no adapter can have this name.
            AdapterError: it failed a moment ago.
        """
        self._check_failed_lately(name)
        if self._chain is None or name == RESERVED_NAME:
            raise self.table.not_found(name)
        return self._take_off(LoadOrder(name=name, source=None, origin=Origin.RESOLVER))

    def _check_failed_lately(self, name: str) -> None:
        row = self.table.row(name)
        failure = row.failure if row is not None else None
        if failure is not None and failure.retry_at is not None and self._clock() < failure.retry_at:
            raise again(failure.error)

    # Changes

    async def load(self, order: LoadOrder) -> Loaded:
        """Make a name stand for what is at a source; returns when requests may use it.

        Raises:
            AdapterNameRefused: no adapter may have this name.
            AdapterExists, AdapterConflict: the name is taken.
            InvalidRequest: the source's address is wrong.
            AdapterError: it cannot be had, or not be served; the name stays what it was.
        """
        began_s = time.monotonic()
        try:
            done = await self._before_flight(order)
        except LoramuxError as error:
            self._tell_load(order, self.table.current(order.name), error, began_s)
            raise
        if isinstance(done, Flight):
            return await done.landing()
        self._tell_load(order, done.ref, done, began_s)
        return done

    async def _before_flight(self, order: LoadOrder) -> Flight | Loaded:
        """The flight that does what an order wants, or its result if nothing is to be done."""
        require_adapter_name(order.name, self.table.base_names)
        if order.source is not None:
            parse_uri(order.source)
        while (flight := self._flights.get(order.name)) is not None:
            if flight.order == order:
                return flight
            await flight.ended()
        current = self.table.current(order.name)
        if current is not None and order.if_loaded is IfLoaded.REFUSE:
            raise AdapterExists(
                f"The lora adapter '{order.name}' has already been loaded. If you want to load the adapter in"
                " place, set 'load_inplace' to True.",
                param="lora_name",
            )
        is_same = current is not None and order.digest == current.digest
        if current is not None and is_same and order.pinned in (None, current.pinned):
            return Loaded(current, Outcome.UNCHANGED)
        return self._take_off(order)

    async def unload(self, name: str, *, drain_timeout_s: float = 0.0) -> Unloaded:
        """Forget a name: new requests are refused at once, memory goes with the last request.

        Args:
            name: an adapter's.
            drain_timeout_s: how long to wait for requests that still run; they are never stopped.

        Raises:
            AdapterNotFound: there is no such name.
        """
        began_s = time.monotonic()
        try:
            unloaded = await self._unload(name, drain_timeout_s)
        except LoramuxError as error:
            self.on_change(unload_change(name, error, took_s=time.monotonic() - began_s))
            raise
        self.on_change(unload_change(name, unloaded, took_s=time.monotonic() - began_s))
        return unloaded

    async def _unload(self, name: str, drain_timeout_s: float) -> Unloaded:
        flight = self._flights.get(name)
        if flight is not None:
            await flight.stop()
        ref = self.table.current(name)
        self.required.discard(name)
        if self._chain is not None:
            self._chain.forget(name)
        if ref is None:
            self.table.remove(name)
            if not await self._write_removal(name) and flight is None:
                raise AdapterNotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
            return Unloaded(ref=None)
        leases = self.table.leases_of(ref)
        gone = self._leaving[name, ref.version] = asyncio.get_running_loop().create_future()
        self.table.remove(name)
        if leases:
            self.events.draining(ref, leases)
        await self._write_removal(name)
        await asyncio.wait([gone], timeout=drain_timeout_s if leases else _UNLOAD_TIMEOUT_S)
        return Unloaded(
            ref=ref,
            leases=self.table.leases_of(ref),
            is_gone=gone.done(),
            freed=gone.result() if gone.done() else None,
            shared_with=tuple(other.name for other in self.table.all() if other.digest == ref.digest),
        )

    def missing(self) -> list[str]:
        """For each required name that is not served yet, why."""
        reasons = []
        for name in sorted(self.required):
            row = self.table.row(name)
            if row is not None and row.current is not None:
                continue
            why = row.failure.error.message if row and row.failure else (row.state if row else "waiting")
            reasons.append(f"pinned adapter {name!r}: {why}")
        return reasons

    def num_under_way(self) -> int:
        """How many loads are under way, and how many versions on their way out."""
        return len(self._flights) + len(self._farewells)

    async def aclose(self) -> None:
        """Stop what is under way."""
        await self._flights.close()
        if self._chain is not None:
            await self._chain.aclose()
        await asyncio.gather(*self._farewells, return_exceptions=True)
        if self.bring_up.fetcher is not None:
            await self.bring_up.fetcher.aclose()
        if self.journal is not None:
            self.journal.close()

    # Flights

    def _take_off(self, order: LoadOrder) -> Flight:
        return self._flights.take_off(order, self._fly(order))

    async def _fly(self, order: LoadOrder) -> Loaded:
        """A load, and what is told of it."""
        began_s, before = time.monotonic(), self.table.current(order.name)
        try:
            loaded = await self._bring_up(order)
        except Exception as error:
            # A name that no resolver knows is the answer to one request, not a change.
            if order.origin is not Origin.RESOLVER or not isinstance(error, ModelNotFound):
                self._tell_load(order, before, error, began_s)
            raise
        except asyncio.CancelledError:
            self._tell_load(order, before, AdapterNotFound("it was stopped"), began_s)
            raise
        self._tell_load(order, before, loaded, began_s)
        return loaded

    def _tell_load(
        self, order: LoadOrder, before: AdapterRef | None, result: Loaded | Exception, began_s: float
    ) -> None:
        source = order.shown_source
        if source is None and order.source is not None:
            with contextlib.suppress(InvalidRequest):
                source = PinnedSource(str(parse_uri(order.source))).public
        took_s = time.monotonic() - began_s
        self.on_change(load_change(order, before, result, source=source, took_s=took_s))

    async def _bring_up(self, order: LoadOrder) -> Loaded:
        try:
            return await self.bring_up.run(order)
        except AdapterConflict:
            self.table.settle(order.name)
            raise
        except LoramuxError as error:
            named = error
            if isinstance(error, AdapterError):
                named = type(error)(f"Loading lora {order.name} failed: {error.message}", param=error.param)
            self._failed(order, named)
            raise named from error
        except asyncio.CancelledError:
            self.table.fail(order.name, None)
            raise
        except Exception:
            logger.exception("adapter %r: unexpected error", order.name)
            self._failed(order, LoramuxError("unexpected error; see the server's log"))
            raise

    def _failed(self, order: LoadOrder, error: LoramuxError) -> None:
        row = self.table.row(order.name)
        if row is None or row.loading is None:
            return  # nothing was found to load: that is the answer to one request, not news
        now = self._clock()
        retry_at = now + _RETRY_REFUSED_S if order.origin is Origin.RESOLVER else None
        if isinstance(error, AdapterUnavailable):
            retry_at = now + _RETRY_UNAVAILABLE_S
        failure = Failure(error=error, code=lookup(error).code, at=now, retry_at=retry_at)
        source = row.loading.source
        self.table.fail(order.name, failure)
        self.events.failed(order.name, source, failure)

    # What leaves

    def _on_unused(self, ref: AdapterRef) -> None:
        freeing = self.bring_up.copies.give_back(ref.digest)
        farewell = asyncio.create_task(self._see_off(ref, freeing))
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)

    async def _see_off(self, ref: AdapterRef, freeing: asyncio.Task[FreedMemory | None]) -> None:
        freed = await freeing
        self.events.gone(ref, freed)
        if self.journal is not None:
            with contextlib.suppress(AdapterUnavailable):  # told to who made the change
                await self.journal.written()  # first it is no longer wanted, then it may be deleted
        self.on_gone(ref)
        gone = self._leaving.pop((ref.name, ref.version), None)
        if gone is not None and not gone.done():
            gone.set_result(freed)

    async def _write_removal(self, name: str) -> bool:
        """True if the journal knew it."""
        if self.journal is None:
            return False
        is_known = name in self.journal.entries
        await self.journal.forget(name, remember_removal=name in self._static_names)
        return is_known
