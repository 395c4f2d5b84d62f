"""Loads under way: one a name, in a task of its own, whoever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Final

from loramux.engine.errors import AdapterNotFound, EngineDead, LoramuxError, Overloaded
from loramux.server.adapter_orders import Loaded, LoadOrder
from loramux.server.errors import ServerDraining

_MAX_LOOKUPS: Final = 1000  # flights that requests started, by naming what nobody knows


@dataclass(slots=True, eq=False)
class Flight:
    """One load under way."""

    order: LoadOrder
    task: asyncio.Task[Loaded]
    _stopped_by: LoramuxError | None = None

    @property
    def was_cut_off(self) -> bool:
        """True if it ended with the engine or the server, which says nothing about the adapter."""
        if self.task.cancelled():
            return isinstance(self._stopped_by, ServerDraining)
        return self.task.done() and isinstance(self.task.exception(), EngineDead)

    async def landing(self) -> Loaded:
        """Its end, for one of those who wait for it; a caller who gives up does not stop it.

        Raises:
            LoramuxError: it failed, or was stopped.
        """
        await self.ended()
        error = self._stopped_by if self.task.cancelled() else self.task.exception()
        if isinstance(error, LoramuxError):
            raise again(error) from error
        return self.task.result()

    async def ended(self, timeout_s: float | None = None) -> bool:
        """Return when it is over, however it ended; False if it is not within the time."""
        done, _ = await asyncio.wait([self.task], timeout=timeout_s)
        return bool(done)

    async def stop(self, why: LoramuxError | None = None) -> None:
        """Give it up; those who wait for it are told why, by default that it was unloaded."""
        message = f"The lora adapter '{self.order.name}' was unloaded while it was loading."
        self._stopped_by = why or AdapterNotFound(message, param="lora_name")
        self.task.cancel()
        await self.ended()


class Flights:
    """The loads under way, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Flight] = {}
        self._closed: LoramuxError | None = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self._by_name)

    def get(self, name: str) -> Flight | None:
        """The load of one name."""
        return self._by_name.get(name)

    def take_off(self, order: LoadOrder, load: Coroutine[None, None, Loaded]) -> Flight:
        """Start a load; there must be none of the same name.

        Raises:
            Overloaded: requests started too many.
            ServerDraining: after `close`.
        """
        assert order.name not in self._by_name, f"{order.name} is being loaded"
        if self._closed is not None:
            load.close()
            raise again(self._closed)
        if order.source is None and len(self._by_name) >= _MAX_LOOKUPS:
            load.close()
            raise Overloaded(f"{_MAX_LOOKUPS} adapters are being loaded already; try again later")
        flight = Flight(order, asyncio.create_task(load))
        self._by_name[order.name] = flight
        flight.task.add_done_callback(partial(self._land, order.name))
        return flight

    async def close(self) -> None:
        """Give all of them up, and begin none any more."""
        self._closed = ServerDraining("The server is shutting down; try again at another one.")
        await asyncio.gather(*(flight.stop(self._closed) for flight in self._by_name.values()))

    def _land(self, name: str, task: asyncio.Task[Loaded]) -> None:
        del self._by_name[name]
        if not task.cancelled():
            task.exception()  # perhaps nobody waits for it any more


def again(error: LoramuxError) -> LoramuxError:
    """The same error for one more caller: a raised exception keeps its traceback."""
    return type(error)(error.message, param=error.param)
