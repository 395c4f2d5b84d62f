"""Ordered resolvers behind one question: which source is this name?

Asked for names that clients made up, so everything is bounded: one flight a name however many ask, a few
lookups at a time, and a table of names that were not found which forgets the oldest. The chain keeps
three answers apart: nobody's name (None), a source that could not say (an error, worth a retry), and an
adapter that is found but not for this model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from loramux.engine.errors import AdapterError, AdapterNotFound, AdapterUnavailable, LoramuxError
from loramux.resolvers.base import Resolver
from loramux.resolvers.refusal import same_again
from loramux.resolvers.uri import parse_uri

logger = logging.getLogger(__name__)

_MAX_NAME_CHARS: Final = 256
_NOT_FOUND_TTL_S: Final = 30.0
_HIDDEN: Final = frozenset({"Cc", "Cs"})


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where an adapter is, and who said so."""

    uri: str  # canonical
    resolver: str


@dataclass(frozen=True, slots=True)
class _Remembered:
    """An answer that is not asked for again until `until`: None for "not mine", else the error."""

    until: float
    error: AdapterError | None


class ResolverChain:
    """Asks resolvers in order; the first that knows the name wins.

    Args:
        resolvers: in order of priority.
        base_model_name: the served model, as `--model` names it.
        timeout_s: for one resolver's answer.
        error_ttl_s: for how long a resolver that failed for a name is not asked for it again.
        max_remembered: how many names and resolvers are remembered as not found.
        max_concurrent: how many names are looked up at a time; others wait.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        resolvers: Sequence[Resolver],
        *,
        base_model_name: str,
        timeout_s: float = 30.0,
        error_ttl_s: float = 2.0,
        max_remembered: int = 10_000,
        max_concurrent: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resolvers = tuple(resolvers)
        self._base_model_name = base_model_name
        self._timeout_s = timeout_s
        self._error_ttl_s = error_ttl_s
        self._max_remembered = max_remembered
        self._clock = clock
        self._slots = asyncio.Semaphore(max_concurrent)
        self._flights: dict[str, asyncio.Task[Resolution | None]] = {}
        self._remembered: OrderedDict[tuple[str, str], _Remembered] = OrderedDict()

    async def resolve(self, adapter_name: str) -> Resolution | None:
        """Find the source of an adapter.

        Returns:
            None when no resolver knows the name, or when no adapter can have it.

        Raises:
            AdapterUnavailable: a resolver that could not say, or did not in time.
            AdapterSourceAuth: a source refused the server's credentials.
            AdapterIncompatible: it is found, but not for this model.
        """
        if not self.resolvers or not is_adapter_name(adapter_name):
            return None
        flight = self._flights.get(adapter_name)
        if flight is None:
            flight = asyncio.create_task(self._ask_all(adapter_name))
            self._flights[adapter_name] = flight
            flight.add_done_callback(lambda done: self._land(adapter_name, done))
        return await asyncio.shield(flight)

    def forget(self, adapter_name: str) -> None:
        """Ask again next time, whatever is remembered; after an explicit change."""
        for resolver in self.resolvers:
            self._remembered.pop((resolver.name, adapter_name), None)

    async def aclose(self) -> None:
        """Stop lookups and close the resolvers that can be closed."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        for resolver in self.resolvers:
            aclose = getattr(resolver, "aclose", None)
            if aclose is not None:
                with contextlib.suppress(LoramuxError, OSError):
                    await aclose()

    def _land(self, name: str, flight: asyncio.Task[Resolution | None]) -> None:
        del self._flights[name]
        if not flight.cancelled():
            flight.exception()  # callers may all be gone: then nobody else looks at it

    async def _ask_all(self, name: str) -> Resolution | None:
        broken: AdapterError | None = None
        async with self._slots:
            for resolver in self.resolvers:
                try:
                    uri = await self._ask(resolver, name)
                except _Broken as failure:
                    broken = broken or failure.error
                    continue
                if uri is not None:
                    return Resolution(uri, resolver.name)
        if broken is not None:
            raise broken  # it might have known the name
        return None

    async def _ask(self, resolver: Resolver, name: str) -> str | None:
        """One resolver's answer, from memory if that is fresh."""
        remembered = self._remembered.get((resolver.name, name))
        if remembered is not None and self._clock() < remembered.until:
            if remembered.error is not None:
                raise same_again(remembered.error)
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                uri = await resolver.resolve(self._base_model_name, name)
            if uri is not None:
                return str(parse_uri(uri))
        except AdapterNotFound:
            pass  # a way to say "not mine"
        except TimeoutError as error:
            late = AdapterUnavailable(
                f"resolver {resolver.name} did not answer for {name!r} within {self._timeout_s:g} s",
                param="model",
            )
            self._remember(resolver, name, self._error_ttl_s, late)
            raise late from error
        except AdapterError as error:
            self._remember(resolver, name, self._error_ttl_s, error)
            raise
        except Exception as error:
            raise self._broken(resolver, name, error) from error
        self._remember(resolver, name, getattr(resolver, "not_found_ttl_s", _NOT_FOUND_TTL_S), None)
        return None

    def _broken(self, resolver: Resolver, name: str, error: Exception) -> _Broken:
        logger.error(
            "resolver failed and is skipped for this name",
            exc_info=error,
            extra={"resolver": resolver.name, "adapter": name},
        )
        return _Broken(
            AdapterUnavailable(
                f"resolver {resolver.name} failed for {name!r}: {type(error).__name__}", param="model"
            )
        )

    def _remember(self, resolver: Resolver, name: str, ttl_s: float, error: AdapterError | None) -> None:
        if ttl_s <= 0:
            return
        key = (resolver.name, name)
        self._remembered[key] = _Remembered(self._clock() + ttl_s, error)
        self._remembered.move_to_end(key)
        while len(self._remembered) > self._max_remembered:
            self._remembered.popitem(last=False)


class _Broken(Exception):
    """A resolver failed in a way that its protocol does not know."""

    def __init__(self, error: AdapterUnavailable) -> None:
        super().__init__(error.message)
        self.error = error


def is_adapter_name(name: str) -> bool:
    """True if an adapter can have this name at all: length, characters, no way up."""
    return (
        0 < len(name) <= _MAX_NAME_CHARS
        and not any(unicodedata.category(char) in _HIDDEN for char in name)
        and ".." not in name.split("/")
    )
