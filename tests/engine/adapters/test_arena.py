"""The host memory of adapters: pages that never fragment, and what lies beyond them."""

from __future__ import annotations

import logging

import pytest
import torch

from loramux.engine.adapters.arena import PAGE_BYTES, HostArena, HostBytes

CPU = torch.device("cpu")


def write(held: HostBytes, value: int) -> None:
    for _, part in held.parts(0, held.nbytes, at_most=PAGE_BYTES):
        part.fill_(value)


def content(held: HostBytes) -> set[int]:
    parts = held.parts(0, held.nbytes, at_most=PAGE_BYTES)
    return {int(value) for _, part in parts for value in part[:: PAGE_BYTES // 64]}


def test_pages_come_back_when_nobody_holds_them_and_never_fragment() -> None:
    arena = HostArena(6 * PAGE_BYTES, CPU)
    held = {index: arena.allocate(PAGE_BYTES) for index in range(6)}
    for index, own in held.items():
        write(own, index)

    del held[1], held[3], held[4]
    large = arena.allocate(2 * PAGE_BYTES + 5)  # in two pieces
    write(large, 99)

    assert large.nbytes == 3 * PAGE_BYTES
    assert len(list(large.parts(0, large.nbytes, at_most=8 * PAGE_BYTES))) == 2
    assert content(large) == {99}
    assert {index: content(own) for index, own in held.items()} == {0: {0}, 2: {2}, 5: {5}}


def test_what_does_not_fit_gets_ordinary_memory(caplog: pytest.LogCaptureFixture) -> None:
    arena = HostArena(2 * PAGE_BYTES, CPU)
    first = arena.allocate(PAGE_BYTES)

    with caplog.at_level(logging.WARNING):
        second = arena.allocate(2 * PAGE_BYTES)
    write(first, 1)
    write(second, 2)

    assert "outside the page-locked memory" in caplog.text
    assert (content(first), content(second)) == ({1}, {2})
    assert arena.allocate(PAGE_BYTES).nbytes == PAGE_BYTES  # the other page is still there


def test_parts_cover_a_range_in_order() -> None:
    held = HostBytes([torch.arange(0, 10, dtype=torch.uint8), torch.arange(10, 25, dtype=torch.uint8)])

    parts = list(held.parts(3, 22, at_most=6))

    assert [(start, len(part)) for start, part in parts] == [(3, 6), (9, 1), (10, 6), (16, 6)]
    assert torch.cat([part for _, part in parts]).tolist() == list(range(3, 22))
