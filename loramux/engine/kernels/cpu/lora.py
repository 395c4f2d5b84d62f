"""LoRA for rows on a CPU: each token reads exactly its own adapter's lanes, at true rank.

    out[t, part] += sum over lanes l of t's adapter of (x[t] · A[l, part]) * B_part[l]

One call does all parts of a site for all tokens. The reference is
`loramux.engine.kernels.lora.reference_lora`. Sums are float32 and rounded once, at the end.

Tokens of one adapter form a group, whose lanes come from memory once, eight at a time. Threads share
first the dots (by lanes), then what these add (by columns of the output): a single large adapter keeps
all of them busy, and no sum depends on their number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from loramux.engine.kernels.cpu.intrinsics import BFLOAT16, FLOAT32, Address, Dtype, item_size, units
from loramux.engine.kernels.cpu.lora_ir import FROM_ZERO, LINE, TO_OUT, dot_block, expand_block
from loramux.engine.kernels.cpu.threads import as_ints, ask, team, wait

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

PARALLEL_LANES: Final = 8  # of all groups together, from which a second thread pays for its waking
READ_COST: Final = 8  # what fetching a lane costs, in tokens computed with it
OCTET: Final = 8  # lanes at a time
BLOCK: Final = 4  # tokens at a time when columns are added

_ONE: Final = units(1)
_TWO: Final = units(2)
_BLOCK: Final = units(BLOCK)
_OCTET: Final = units(OCTET)

BEGIN, COUNT, FIRST, RANK, SUMS = range(5)  # columns of `groups`; the last: tokens * lanes before
B, OFFSET, WIDTH = range(3)  # columns of `parts`
_HEAD: Final = 5  # numbers of a site's table before its parts


class _Call(ctypes.Structure):
    """What the calls of a step share, then what is set before each; addresses are integers."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("thread_num", "num_threads", "barrier"),
            *("groups", "num_groups", "sums", "totals", "widest"),
            *("site", "x", "out"),
        )
    )


_SIGNATURE: Final = types.void(types.CPointer(numba.from_dtype(np.dtype(_Call))))


class LoraKernel:
    """The compiled kernel for lanes of one dtype, and the room in which it works."""

    def __init__(
        self, dtype: torch.dtype, num_parts: int, widest: int, num_threads: int | None = None
    ) -> None:
        """Args:
        num_parts: the most of any site
        widest: the largest part's out_features
        num_threads: torch's, unless given
        """
        threads = team()
        self._run = threads.run if threads is not None else _run_alone
        self._functions = threads[1:] if threads is not None else (0, 0, 0)
        self._num_threads = 1 if threads is None else num_threads or torch.get_num_threads()
        self._work = _compiled(dtype)
        self._num_parts = num_parts
        self._widest = widest
        self._sums = np.zeros(0, dtype=np.float32)
        self._totals = np.zeros(self._num_threads * BLOCK * widest, dtype=np.float32)

    def plan(self, groups: Ints) -> LoraRows:
        """A step's rows; the plan before it is not valid any more.

        Args:
            groups: [num_groups, 4]: first token, tokens, first lane, lanes
        """
        sums = np.cumsum(groups[:, COUNT] * groups[:, RANK])
        if len(self._sums) < sums[-1] * self._num_parts:
            self._sums = np.zeros(2 * int(sums[-1]) * self._num_parts, dtype=np.float32)
        table = np.column_stack((groups, np.concatenate(([0], sums[:-1]))))
        room = (self._sums.ctypes.data, self._totals.ctypes.data, self._widest)
        call = _Call(*self._functions, table.ctypes.data, len(table), *room)
        num_threads = self._num_threads if groups[:, RANK].sum() >= PARALLEL_LANES else 1
        run = partial(self._run, self._work, ctypes.addressof(call), num_threads, 0)
        return LoraRows(call, run, (table, self._sums, self._totals))


class LoraRows:
    """Tokens with an adapter, for the compiled kernel; the same at every site."""

    __slots__ = ("_call", "_keep", "_run")

    def __init__(self, call: _Call, run: Callable[[], None], keep: tuple[Any, ...]) -> None:
        self._call = call
        self._run = run
        self._keep = keep  # what the call has the addresses of

    def add(self, out: Tensor, x: Tensor, site: int) -> None:
        """The module's equation, in place.

        Args:
            out: [num_tokens, out_features], contiguous
            x: [num_tokens, in_features], contiguous
            site: address of its `site_table`
        """
        call = self._call
        call.site = site
        call.x = x.data_ptr()
        call.out = out.data_ptr()
        self._run()


def site_table(a: Tensor, b: list[Tensor], ranks: Ints) -> Ints:
    """What the kernel knows of a site: addresses and shapes.

    Args:
        a: [num_lanes, num_parts, in_features]
        b: one a part: [num_lanes, width]
        ranks: [num_parts, num_lanes]: at an adapter's first lane, how many of its lanes the part has
    """
    table = [a.data_ptr(), a.shape[2], ranks.ctypes.data, a.shape[0], len(b)]
    offset = 0
    for part in b:
        table += [part.data_ptr(), offset, part.shape[1]]
        offset += part.shape[1]
    return np.array(table, dtype=np.int64)


def _run_alone(work: int, argument: int, num_threads: int, flags: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(argument)


@cache
def _compiled(dtype: torch.dtype) -> int:
    """Address of the code for one dtype; it stays loaded."""
    function = {torch.bfloat16: _add_bfloat16, torch.float32: _add_float32}[dtype]
    address: int = _load(function).address
    return address


@cache
def _load(function: Callable[[Any], None]) -> Any:
    return cfunc(_SIGNATURE, cache=True, error_model="numpy")(function)


def _add_bfloat16(call: Any) -> None:
    _add(BFLOAT16, carray(call, 1)[0])


def _add_float32(call: Any) -> None:
    _add(FLOAT32, carray(call, 1)[0])


@njit(cache=True, error_model="numpy")
def _add(dtype: Dtype, call: Any) -> None:
    """One thread's part of a site."""
    thread, num_threads = 0, 1
    if call.num_threads:
        thread, num_threads = ask(call.thread_num), ask(call.num_threads)
    head = carray(as_ints(call.site), _HEAD)
    a, in_features, num_lanes, num_parts = head[0], head[1], head[3], head[4]
    ranks = carray(as_ints(head[2]), (num_parts, num_lanes))
    parts = carray(as_ints(call.site + _HEAD * 8), (num_parts, 3))
    groups = carray(as_ints(call.groups), (call.num_groups, 5))
    _shrink(dtype, call.x, a, in_features, parts, ranks, groups, call.sums, thread, num_threads)
    if num_threads > 1:
        wait(call.barrier)
    totals = call.totals + thread * BLOCK * call.widest * 4
    _expand(dtype, call.out, parts, ranks, groups, call.sums, totals, thread, num_threads)


@njit(cache=True, error_model="numpy")
def _shrink(
    dtype: Dtype,
    x: Address,
    a: Address,
    in_features: int,
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
                    following = a + ((first + lane) * num_parts + part) * in_features * item
                    if group >= 0:
                        _dots(dtype, x, in_features, num_parts, groups, group, rows, lanes, following, target)
                    group, rows, lanes = g, following, count
                    target = sums + (groups[g, SUMS] * num_parts + part * rank + lane) * 4
                position += count * (READ_COST + groups[g, COUNT])
    if group >= 0:
        _dots(dtype, x, in_features, num_parts, groups, group, rows, lanes, rows, target)


@njit(cache=True, error_model="numpy")
def _dots(
    dtype: Dtype,
    x: Address,
    in_features: int,
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
    stride, row = num_parts * in_features, num_parts * groups[group, RANK]
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
def _expand(
    dtype: Dtype,
    out: Address,
    parts: Ints,
    ranks: Ints,
    groups: Ints,
    sums: Address,
    totals: Address,
    thread: int,
    num_threads: int,
) -> None:
    """What the dots add to a thread's columns of the output, for all tokens."""
    item = item_size(dtype)
    num_parts = len(parts)
    out_features = parts[num_parts - 1, OFFSET] + parts[num_parts - 1, WIDTH]
    lines = out_features // LINE
    begin = lines * thread // num_threads * LINE
    end = lines * (thread + 1) // num_threads * LINE if thread + 1 < num_threads else out_features
    for part in range(num_parts):
        width, offset = parts[part, WIDTH], parts[part, OFFSET]
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
            rows, ahead = column + first * width * item, column + following * width * item
            for token in range(0, groups[g, COUNT], BLOCK):
                _add_columns(
                    dtype,
                    right - left,
                    min(BLOCK, groups[g, COUNT] - token),
                    rank,
                    weights + token * num_parts * groups[g, RANK] * 4,
                    num_parts * groups[g, RANK],
                    rows,
                    width,
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
    width: int,
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
        here = rows + lane * width * item
        ahead = here + OCTET * width * item if lane + OCTET < rank else following
        for token in range(1 if tokens == BLOCK else tokens):
            h, goal = weights + (token * weights_stride + lane) * 4, out + token * out_features * item
            kept = totals + token * columns * 4
            place = (h, weights_stride, here, width, ahead, kept, columns, stage, goal, out_features)
            if tokens == BLOCK and count == OCTET:
                expand_block(dtype, _OCTET, _BLOCK, columns, *place)
            elif tokens == BLOCK:
                expand_block(dtype, _ONE, _BLOCK, columns, *place)
            elif count == OCTET:
                expand_block(dtype, _OCTET, _ONE, columns, *place)
            else:
                expand_block(dtype, _ONE, _ONE, columns, *place)
        lane += count
