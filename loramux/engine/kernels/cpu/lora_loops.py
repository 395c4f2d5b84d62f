"""The two phases of LoRA rows, as one thread runs them; `lora.py` says what they are for.

`shrink` computes the dots of some lanes, `expand` adds what all dots yield to some columns of the output.
Addresses and sizes as in `intrinsics.py`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import njit

from loramux.engine.kernels.cpu.intrinsics import Address, Dtype, item_size, units
from loramux.engine.kernels.cpu.lora_ir import FROM_ZERO, TO_OUT, dot_block, expand_block

Ints = npt.NDArray[np.int64]

READ_COST: Final = 8  # what fetching a lane costs, in tokens computed with it
OCTET: Final = 8  # lanes at a time
BLOCK: Final = 4  # tokens at a time when columns are added

_ONE: Final = units(1)
_TWO: Final = units(2)
_BLOCK: Final = units(BLOCK)
_OCTET: Final = units(OCTET)

BEGIN, COUNT, FIRST, RANK, SUMS = range(5)  # columns of `groups`; the last: tokens * lanes before
B, OFFSET, WIDTH, STRIDE = range(4)  # columns of `parts`
HEAD: Final = 6  # numbers of a site's table before its parts


@njit(cache=True, error_model="numpy")
def shrink(
    dtype: Dtype,
    x: Address,
    a: Address,
    in_features: int,
    stride: int,
    parts: Ints,
    ranks: Ints,
    groups: Ints,
    sums: Address,
    thread: int,
    num_threads: int,
) -> None:
    """A thread's share of all dots: as many lanes as the others, weighted by their tokens."""
    item = item_size(dtype)
    num_parts = len(parts)
    cost = 0
    for g in range(len(groups)):
        for part in range(num_parts):
            cost += min(groups[g, RANK], ranks[part, groups[g, FIRST]]) * (READ_COST + groups[g, COUNT])
    begin, end = cost * thread // num_threads, cost * (thread + 1) // num_threads
    position = 0
    group, rows, lanes, target = -1, 0, 0, 0  # what is computed when it is known what comes next
    for g in range(len(groups)):
        first, rank = groups[g, FIRST], groups[g, RANK]
        for lane in range(0, rank, OCTET):
            for part in range(num_parts):
                count = min(OCTET, min(rank, ranks[part, first]) - lane)
                if count <= 0:
                    continue
                if begin <= position < end:
                    following = a + ((first + lane) * stride + part * in_features) * item
                    if group >= 0:
                        _dots(
                            *(dtype, x, in_features, stride, num_parts, groups, group),
                            *(rows, lanes, following, target),
                        )
                    group, rows, lanes = g, following, count
                    target = sums + (groups[g, SUMS] * num_parts + part * rank + lane) * 4
                position += count * (READ_COST + groups[g, COUNT])
    if group >= 0:
        _dots(dtype, x, in_features, stride, num_parts, groups, group, rows, lanes, rows, target)


@njit(cache=True, error_model="numpy")
def _dots(
    dtype: Dtype,
    x: Address,
    in_features: int,
    stride: int,
    num_parts: int,
    groups: Ints,
    group: int,
    rows: Address,
    lanes: int,
    ahead: Address,
    target: Address,
) -> None:
    """Up to eight lanes of one part with all tokens of their group."""
    item = item_size(dtype)
    row = num_parts * groups[group, RANK]
    end = groups[group, COUNT]
    token = 0
    while token < end:
        value = x + (groups[group, BEGIN] + token) * in_features * item
        sums = target + token * row * 4
        if lanes < OCTET:
            for lane in range(lanes):
                one = rows + lane * stride * item
                dot_block(dtype, _ONE, _ONE, in_features, value, one, stride, one, sums + lane * 4, row)
            token += 1
        elif token + 2 <= end:
            dot_block(dtype, _OCTET, _TWO, in_features, value, rows, stride, ahead, sums, row)
            token += 2
        else:
            dot_block(dtype, _OCTET, _ONE, in_features, value, rows, stride, ahead, sums, row)
            token += 1


@njit(cache=True, error_model="numpy")
def expand(
    dtype: Dtype,
    out: Address,
    parts: Ints,
    ranks: Ints,
    groups: Ints,
    sums: Address,
    totals: Address,
    begin: int,
    end: int,
) -> None:
    """What the dots add to the columns [begin, end) of the output, for all tokens."""
    item = item_size(dtype)
    num_parts = len(parts)
    out_features = parts[num_parts - 1, OFFSET] + parts[num_parts - 1, WIDTH]
    for part in range(num_parts):
        width, offset, stride = parts[part, WIDTH], parts[part, OFFSET], parts[part, STRIDE]
        left, right = max(begin - offset, 0), min(end - offset, width)
        if left >= right:
            continue
        column = parts[part, B] + left * item
        target = out + (offset + left) * item
        for g in range(len(groups)):
            first = groups[g, FIRST]
            following = groups[g + 1, FIRST] if g + 1 < len(groups) else first
            rank = min(groups[g, RANK], ranks[part, first])
            weights = sums + (groups[g, SUMS] * num_parts + part * groups[g, RANK]) * 4
            rows, ahead = column + first * stride * item, column + following * stride * item
            for token in range(0, groups[g, COUNT], BLOCK):
                _add_columns(
                    dtype,
                    right - left,
                    min(BLOCK, groups[g, COUNT] - token),
                    rank,
                    weights + token * num_parts * groups[g, RANK] * 4,
                    num_parts * groups[g, RANK],
                    rows,
                    stride,
                    ahead,
                    totals,
                    target + (groups[g, BEGIN] + token) * out_features * item,
                    out_features,
                )


@njit(cache=True, error_model="numpy")
def _add_columns(
    dtype: Dtype,
    columns: int,
    tokens: int,
    rank: int,
    weights: Address,
    weights_stride: int,
    rows: Address,
    stride: int,
    following: Address,
    totals: Address,
    out: Address,
    out_features: int,
) -> None:
    """All lanes of one part of a group, for up to four of its tokens."""
    item = item_size(dtype)
    lane = 0
    while lane < rank:
        count = OCTET if lane + OCTET <= rank else 1
        stage = (FROM_ZERO if lane == 0 else 0) | (TO_OUT if lane + count == rank else 0)
        here = rows + lane * stride * item
        ahead = here + OCTET * stride * item if lane + OCTET < rank else following
        for token in range(1 if tokens == BLOCK else tokens):
            h, goal = weights + (token * weights_stride + lane) * 4, out + token * out_features * item
            kept = totals + token * columns * 4
            place = (h, weights_stride, here, stride, ahead, kept, columns, stage, goal, out_features)
            if tokens == BLOCK and count == OCTET:
                expand_block(dtype, _OCTET, _BLOCK, columns, *place)
            elif tokens == BLOCK:
                expand_block(dtype, _ONE, _BLOCK, columns, *place)
            elif count == OCTET:
                expand_block(dtype, _OCTET, _ONE, columns, *place)
            else:
                expand_block(dtype, _ONE, _ONE, columns, *place)
        lane += count


@njit(cache=True, error_model="numpy")
def runs_to_read(
    dtype: Dtype,
    a: Address,
    in_features: int,
    stride: int,
    parts: Ints,
    ranks: Ints,
    groups: Ints,
    of_b: int,
    thread: int,
    num_threads: int,
    runs: Ints,
) -> int:
    """Where a thread's share of all lanes lies, about as `shrink` and `expand` read them.

    Args:
        of_b: 1 for B, 0 for A
        runs: [num_parts * num_groups, 2] to be filled: the first address, and the one behind the last

    Returns:
        the number of runs
    """
    first_part, last_part = (0, len(parts)) if of_b else (-1, 0)
    total = 0
    for part in range(first_part, last_part):
        for g in range(len(groups)):
            total += _lanes(dtype, a, stride, parts, ranks, groups, part, g)[1]
    begin, end = total * thread // num_threads, total * (thread + 1) // num_threads
    at, count = 0, 0
    for part in range(first_part, last_part):
        for g in range(len(groups)):
            address, size = _lanes(dtype, a, stride, parts, ranks, groups, part, g)
            left, right = max(begin - at, 0), min(end - at, size)
            at += size
            if left >= right:
                continue
            if count and runs[count - 1, 1] == address + left:
                runs[count - 1, 1] = address + right
            else:
                runs[count, 0], runs[count, 1] = address + left, address + right
                count += 1
    return count


@njit(cache=True, error_model="numpy")
def _lanes(
    dtype: Dtype, a: Address, stride: int, parts: Ints, ranks: Ints, groups: Ints, part: int, group: int
) -> tuple[Address, int]:
    """Address and bytes of a group's A (part -1), or of its B of one part."""
    item = item_size(dtype)
    first, rank = groups[group, FIRST], groups[group, RANK]
    if part < 0:
        return a + first * stride * item, rank * stride * item
    stride = parts[part, STRIDE]
    return parts[part, B] + first * stride * item, min(rank, ranks[part, first]) * stride * item
