from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.adapters.lanes import LaneSpan, LaneTable


def test_ranks_pack_without_padding_to_a_common_size() -> None:
    table = LaneTable(64)

    assert table.place("r4", 4) == LaneSpan(0, 8, 4)
    assert table.place("r33", 33) == LaneSpan(8, 40, 33)
    assert table.place("r16", 16) == LaneSpan(48, 16, 16)
    assert table.num_used == 64


def test_pinned_adapter_is_never_evicted() -> None:
    table = LaneTable(16)
    table.place("a", 8)
    table.pin("a")
    table.place("b", 8)
    table.pin("b")

    assert table.place("c", 8) is None  # both pinned: the sequence waits

    table.unpin("a")
    assert table.place("c", 8) == LaneSpan(0, 8, 8)  # takes the lanes that "a" left
    assert table.residents == ["b", "c"]


def test_least_recently_used_adapter_goes_first() -> None:
    table = LaneTable(16)
    table.place("a", 8)
    table.place("b", 8)
    table.pin("a")
    table.unpin("a")

    table.place("c", 8)

    assert table.residents == ["a", "c"]


def test_failed_placement_evicts_nothing() -> None:
    table = LaneTable(24)
    table.place("small", 8)
    table.place("pinned", 8)
    table.pin("pinned")

    assert table.place("large", 16) is None
    assert table.residents == ["small", "pinned"]


def test_removed_adapter_frees_its_lanes() -> None:
    table = LaneTable(8)
    table.place("a", 8)

    table.remove("a")

    assert table.num_used == 0
    assert table.place("b", 8) == LaneSpan(0, 8, 8)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 40), st.booleans()), max_size=80))
@settings(max_examples=100, deadline=None)
def test_spans_never_overlap_and_pins_hold(events: list[tuple[str, int, bool]]) -> None:
    table = LaneTable(64)
    pinned: dict[str, LaneSpan] = {}
    for digest, rank, keep in events:
        if digest in pinned:
            table.unpin(digest)
            del pinned[digest]
        span = table.span(digest) or table.place(digest, rank)
        if span is not None and keep:
            table.pin(digest)
            pinned[digest] = span
        table.check_invariants()
        assert all(table.span(d) == s for d, s in pinned.items())


@pytest.mark.parametrize(("rank", "fits"), [(1, True), (64, True), (65, False)])
def test_rank_above_the_pool_does_not_fit(rank: int, fits: bool) -> None:
    assert LaneTable(64).fits(rank) is fits
