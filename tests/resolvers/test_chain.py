"""The chain of resolvers: order, one flight a name, bounded memory, and three kinds of no."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from loramux.engine.errors import (
    AdapterIncompatible,
    AdapterNotFound,
    AdapterSourceAuth,
    AdapterUnavailable,
)
from loramux.resolvers.chain import Resolution, ResolverChain

pytestmark = pytest.mark.anyio


class Table:
    """A resolver over a dict; an exception in it is raised."""

    def __init__(self, name: str, known: dict[str, str | Exception], not_found_ttl_s: float = 30.0) -> None:
        self.name = name
        self.known = known
        self.not_found_ttl_s = not_found_ttl_s
        self.asked: Counter[str] = Counter()
        self.gate: asyncio.Event | None = None
        self.closed = False

    async def resolve(self, base_model_name: str, adapter_name: str) -> str | None:
        assert base_model_name == "org/base"
        self.asked[adapter_name] += 1
        if self.gate is not None:
            await self.gate.wait()
        found = self.known.get(adapter_name)
        if isinstance(found, Exception):
            raise found
        return found

    async def aclose(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def chain(
    *resolvers: Table,
    clock: Callable[[], float] = lambda: 0.0,
    timeout_s: float = 30.0,
    max_remembered: int = 100,
) -> ResolverChain:
    return ResolverChain(
        resolvers,
        base_model_name="org/base",
        clock=clock,
        timeout_s=timeout_s,
        max_remembered=max_remembered,
    )


async def test_the_first_that_knows_the_name_wins() -> None:
    first, second = Table("one", {"a": "hf://org/a"}), Table("two", {"a": "hf://no/a", "b": "s3://bkt/b/"})
    resolvers = chain(first, second)

    assert await resolvers.resolve("a") == Resolution("hf://org/a", "one")
    assert await resolvers.resolve("b") == Resolution("s3://bkt/b", "two")
    assert await resolvers.resolve("c") is None
    assert second.asked["a"] == 0


async def test_parallel_first_requests_resolve_once() -> None:
    table = Table("one", {"a": "hf://org/a"})
    table.gate = asyncio.Event()
    resolvers = chain(table)
    waiting = [asyncio.create_task(resolvers.resolve("a")) for _ in range(50)]
    await asyncio.sleep(0)

    waiting[0].cancel()  # one of them leaving harms no other
    table.gate.set()
    answers = await asyncio.gather(*waiting[1:])

    assert set(answers) == {Resolution("hf://org/a", "one")}
    assert table.asked["a"] == 1


async def test_not_found_is_remembered_for_as_long_as_the_resolver_says() -> None:
    clock = Clock()
    slow, cheap = Table("slow", {}, not_found_ttl_s=10), Table("cheap", {}, not_found_ttl_s=0)
    resolvers = chain(slow, cheap, clock=clock)

    for _ in range(3):
        assert await resolvers.resolve("a") is None
    assert (slow.asked["a"], cheap.asked["a"]) == (1, 3)
    cheap.known["a"] = "/new/folder"
    assert await resolvers.resolve("a") == Resolution("file:///new/folder", "cheap")
    clock.now = 10.0
    await resolvers.resolve("a")
    assert slow.asked["a"] == 2
    resolvers.forget("a")
    await resolvers.resolve("a")
    assert slow.asked["a"] == 3


@pytest.mark.parametrize("error", [AdapterUnavailable, AdapterSourceAuth, AdapterIncompatible])
async def test_a_resolver_that_cannot_say_ends_the_search(error: type[AdapterUnavailable]) -> None:
    clock = Clock()
    first, second = Table("one", {"a": error("no")}), Table("two", {"a": "hf://other/a", "b": "hf://org/b"})
    resolvers = chain(first, second, clock=clock)

    for _ in range(3):
        with pytest.raises(error):
            await resolvers.resolve("a")

    assert first.asked["a"] == 1  # remembered for moments
    assert second.asked["a"] == 0  # it might be another adapter of that name
    assert await resolvers.resolve("b") == Resolution("hf://org/b", "two")
    first.known.clear()
    clock.now = 2.0
    assert await resolvers.resolve("a") == Resolution("hf://other/a", "two")


async def test_not_found_as_an_error_is_the_same_as_none() -> None:
    resolvers = chain(Table("one", {"a": AdapterNotFound("no")}), Table("two", {"a": "hf://org/a"}))

    assert await resolvers.resolve("a") == Resolution("hf://org/a", "two")


@pytest.mark.parametrize("broken", [KeyError("x"), RuntimeError("x"), "gopher://x", 7])
async def test_a_broken_resolver_is_skipped_and_named(
    broken: Exception | str, caplog: pytest.LogCaptureFixture
) -> None:
    resolvers = chain(Table("broken", {"a": broken, "b": broken}), Table("two", {"a": "hf://org/a"}))

    assert await resolvers.resolve("a") == Resolution("hf://org/a", "two")
    with pytest.raises(AdapterUnavailable, match="resolver broken failed for 'b'"):
        await resolvers.resolve("b")

    assert {vars(record)["resolver"] for record in caplog.records} == {"broken"}


async def test_a_resolver_that_takes_too_long_is_unavailable() -> None:
    table = Table("slow", {})
    table.gate = asyncio.Event()

    with pytest.raises(AdapterUnavailable, match="resolver slow did not answer"):
        await chain(table, timeout_s=0.01).resolve("a")


@pytest.mark.parametrize("name", ["", "a" * 257, "a\x00b", "a\nb", "../a", "a/../b", "\ud800"])
async def test_a_name_that_no_adapter_can_have_is_never_asked_for(name: str) -> None:
    table = Table("one", {name: "hf://org/a"})

    assert await chain(table).resolve(name) is None
    assert table.asked.total() == 0


async def test_a_flood_of_unknown_names_keeps_memory_flat() -> None:
    table = Table("one", {})
    resolvers = chain(table, max_remembered=1000)

    for number in range(20_000):
        await resolvers.resolve(f"unknown-{number}")
    table.asked.clear()
    held = sys.getsizeof(resolvers._remembered)
    await resolvers.resolve("unknown-19999")

    assert len(resolvers._remembered) == 1000
    assert not resolvers._flights
    assert held < 200_000
    assert table.asked.total() == 0


async def test_closing_stops_lookups_and_closes_resolvers() -> None:
    table = Table("one", {})
    table.gate = asyncio.Event()
    resolvers = chain(table)
    waiting = asyncio.create_task(resolvers.resolve("a"))
    await asyncio.sleep(0)

    await resolvers.aclose()

    assert table.closed
    with pytest.raises(asyncio.CancelledError):
        await waiting
