"""LoRA for rows on a CPU: each token reads exactly its own adapter's lanes, at true rank.

    out[t, part] += sum over lanes l of t's adapter of (x[t] · A[l, part]) * B_part[l]

One call does all parts of a site for all tokens. The reference is
`loramux.engine.kernels.lora.reference_lora`. Sums are float32 and rounded once, at the end.

Tokens of one adapter form a group, whose lanes come from memory once, eight at a time. Threads share
first the dots (by lanes), then what these add (by columns of the output): a single large adapter keeps
all of them busy, and no sum depends on their number.

Where the base weight is a `PackedLinear`, the same call multiplies by it, too: threads are woken once for
both, nobody waits for the others' dots, as strips of the product lie between, and the output is still in
the cache when the lanes are added to it. With more than a few rows the product leaves memory idle: its
first half asks for A, its second one for B.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numba
import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from loramux.engine.kernels.cpu.intrinsics import BFLOAT16, CACHE_LINE, FLOAT32, Dtype
from loramux.engine.kernels.cpu.lora_ir import LINE
from loramux.engine.kernels.cpu.lora_loops import (
    BLOCK,
    COUNT,
    HEAD,
    OFFSET,
    RANK,
    WIDTH,
    Ints,
    expand,
    runs_to_read,
    shrink,
)
from loramux.engine.kernels.cpu.lora_prompts import LoraPrompts
from loramux.engine.kernels.cpu.product import PackedLinear, has_pairs, scratch
from loramux.engine.kernels.cpu.product_strips import (
    FEW_ROWS,
    NO_LANES,
    PANEL_ROWS,
    SCRATCH_BYTES,
    multiply_strips,
)
from loramux.engine.kernels.cpu.recording import Call, operation_code
from loramux.engine.kernels.cpu.threads import arrive, as_ints, await_all, is_alone, team, wait
from loramux.engine.kernels.cpu.vector_ir import LANES

_ADD_ARGUMENTS: Final = 3  # of `_add_code`
_PRODUCT_ARGUMENTS: Final = 4  # of `product_code`
PARALLEL_LANES: Final = 8  # of all groups together, from which a second thread pays for its waking


class _Rows(ctypes.Structure):
    """What all sites of a step share; addresses are integers."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("barrier", "give_way", "meeting"),
            *("groups", "num_groups", "sums", "totals", "widest", "runs"),
        )
    )


_ROWS: Final = numba.from_dtype(np.dtype(_Rows))


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
        self._num_threads = 1 if threads is None else num_threads or torch.get_num_threads()
        self._num_parts = num_parts
        self._widest = widest
        self._sums = np.zeros(0, dtype=np.float32)
        self._totals = np.zeros(self._num_threads * BLOCK * widest, dtype=np.float32)
        self._scratch = scratch(self._num_threads)
        self._meeting = np.zeros(16, dtype=np.int64)
        self._room_of_prompts = torch.empty(0, dtype=torch.uint8)
        self.takes_prompts = dtype == torch.bfloat16 and has_pairs()
        functions = (0, 0) if threads is None else (threads.barrier, threads.give_way)
        self._room = (*functions, self._meeting.ctypes.data)
        self._add = Call(_add_code(dtype), _ADD_ARGUMENTS, self._num_threads)
        self._multiply: Call | None = None
        if self.takes_prompts:
            self._multiply = Call(product_code(), _PRODUCT_ARGUMENTS, self._num_threads)
            self._multiply.state.product_room = self._scratch.data_ptr()

    def plan(self, groups: Ints) -> LoraRows:
        """A step's rows.

        Args:
            groups: [num_groups, 4]: first token, tokens, first lane, lanes
        """
        sums = np.cumsum(groups[:, COUNT] * groups[:, RANK])
        if len(self._sums) < sums[-1] * self._num_parts:
            self._sums = np.zeros(2 * int(sums[-1]) * self._num_parts, dtype=np.float32)
        table = np.column_stack((groups, np.concatenate(([0], sums[:-1]))))
        room = (self._sums.ctypes.data, self._totals.ctypes.data, self._widest)
        runs = np.zeros(self._num_threads * self._num_parts * len(table) * 2, dtype=np.int64)
        rows = _Rows(*self._room, table.ctypes.data, len(table), *room, runs.ctypes.data)
        is_small = bool(groups[:, RANK].sum() < PARALLEL_LANES)
        return LoraRows(self, rows, (table, runs, self._sums, self._totals), is_small=is_small)

    def add(self, x: int, out: int, site: int, lora: int, *, alone: bool) -> None:
        """Call `_add_code` with these addresses; lora: of the `LoraRows`."""
        self._add.arguments[:] = x, out, site
        self._add.state.lora = lora
        self._add(alone=alone)

    def multiply(self, rows: int, x: int, out: int, product: int, site: int, lora: int) -> None:
        """Call `product_code` with these addresses; lora: of the `LoraRows`."""
        assert self._multiply is not None
        self._multiply.arguments[:] = x, out, product, site
        self._multiply.state.rows, self._multiply.state.lora = rows, lora
        self._multiply(alone=is_alone(rows))

    def plan_prompts(self, groups: Ints) -> LoraPrompts:
        """A step's groups that are long enough for it; as for `plan`, if it `takes_prompts`."""
        room = self._room_of_prompts
        return LoraPrompts(groups, self._num_parts, self._scratch, self._num_threads, room)


class LoraRows:
    """Tokens with an adapter, for the compiled kernel; the same at every site."""

    __slots__ = ("_is_small", "_keep", "_kernel", "address")

    def __init__(self, kernel: LoraKernel, rows: _Rows, keep: tuple[Any, ...], *, is_small: bool) -> None:
        self._kernel = kernel
        self._keep = (rows, keep)  # and what it has the addresses of
        self._is_small = is_small
        self.address = ctypes.addressof(rows)  # for a `StepState`

    def add(self, out: Tensor, x: Tensor, site: int) -> None:
        """The module's equation, in place.

        Args:
            out: [num_tokens, out_features], contiguous
            x: [num_tokens, in_features], contiguous
            site: address of its `site_table`
        """
        self._kernel.add(x.data_ptr(), out.data_ptr(), site, self.address, alone=self._is_small)

    def multiply(self, linear: PackedLinear, x: Tensor, site: int) -> Tensor:
        """The base output with the module's equation added: what `linear(x)` and then `add` yield.

        Args:
            x: [num_tokens, in_features], contiguous
            site: address of its `site_table`
        """
        rows = x.shape[0]
        out = torch.empty((rows, linear.out_features), dtype=x.dtype)
        self._kernel.multiply(rows, x.data_ptr(), out.data_ptr(), linear.address, site, self.address)
        return out


def site_table(a: Tensor, b: list[Tensor], ranks: Ints) -> Ints:
    """What the kernel knows of a site: addresses and shapes.

    Args:
        a: [num_lanes, num_parts, in_features]
        b: one a part: [num_lanes, width]
        ranks: [num_parts, num_lanes]: at an adapter's first lane, how many of its lanes the part has
    """
    table = [a.data_ptr(), a.shape[2], a.stride(0), ranks.ctypes.data, a.shape[0], len(b)]
    offset = 0
    for part in b:
        table += [part.data_ptr(), offset, part.shape[1], part.stride(0)]
        offset += part.shape[1]
    return np.array(table, dtype=np.int64)


def _add_code(dtype: torch.dtype) -> int:
    """Operation: the module's equation, in place. Arguments: x, out, a `site_table`'s address."""
    return operation_code({torch.bfloat16: _add_bfloat16, torch.float32: _add_float32}[dtype])


def product_code() -> int:
    """`operations.product_code` with the lanes' part added.

    Arguments: x, out, a `PackedLinear`'s address, a `site_table`'s address.
    """
    return operation_code(_multiply_bfloat16)


def _add_bfloat16(values: Any, states: Any, thread: int, num_threads: int) -> None:
    shared = carray(_as_rows(carray(states, 1)[0].lora), 1)[0]
    _add(BFLOAT16, carray(values, _ADD_ARGUMENTS), shared, thread, num_threads)


def _add_float32(values: Any, states: Any, thread: int, num_threads: int) -> None:
    shared = carray(_as_rows(carray(states, 1)[0].lora), 1)[0]
    _add(FLOAT32, carray(values, _ADD_ARGUMENTS), shared, thread, num_threads)


def _multiply_bfloat16(values: Any, states: Any, thread: int, num_threads: int) -> None:
    state = carray(states, 1)[0]
    shared = carray(_as_rows(state.lora), 1)[0]
    _multiply(BFLOAT16, carray(values, _PRODUCT_ARGUMENTS), state, shared, thread, num_threads)


@intrinsic
def _as_rows(typing: Any, address: Any) -> tuple[Any, Any]:
    """An address as a pointer to `_Rows`, for `numba.carray`."""
    kind = types.CPointer(_ROWS)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64), codegen


@njit(cache=True, error_model="numpy")
def _add(dtype: Dtype, values: Ints, shared: Any, thread: int, num_threads: int) -> None:
    """One thread's part of a site."""
    x, out, site = values[0], values[1], values[2]
    head = carray(as_ints(site), HEAD)
    a, in_features, stride, num_lanes, num_parts = head[0], head[1], head[2], head[4], head[5]
    ranks = carray(as_ints(head[3]), (num_parts, num_lanes))
    parts = carray(as_ints(site + HEAD * 8), (num_parts, 4))
    groups = carray(as_ints(shared.groups), (shared.num_groups, 5))
    shrink(dtype, x, a, in_features, stride, parts, ranks, groups, shared.sums, thread, num_threads)
    if num_threads > 1:
        wait(shared.barrier)
    totals = shared.totals + thread * BLOCK * shared.widest * 4
    out_features = parts[num_parts - 1, OFFSET] + parts[num_parts - 1, WIDTH]
    lines = out_features // LINE
    begin = lines * thread // num_threads * LINE
    end = lines * (thread + 1) // num_threads * LINE if thread + 1 < num_threads else out_features
    expand(dtype, out, parts, ranks, groups, shared.sums, totals, begin, end)


@njit(cache=True, error_model="numpy")
def _multiply(dtype: Dtype, values: Ints, state: Any, shared: Any, thread: int, num_threads: int) -> None:
    """One thread's part of a site and of its base product."""
    x, out, product, site, rows = values[0], values[1], values[2], values[3], state.rows
    head = carray(as_ints(site), HEAD)
    a, in_features, stride, num_lanes, num_parts = head[0], head[1], head[2], head[4], head[5]
    ranks = carray(as_ints(head[3]), (num_parts, num_lanes))
    parts = carray(as_ints(site + HEAD * 8), (num_parts, 4))
    groups = carray(as_ints(shared.groups), (shared.num_groups, 5))
    linear = carray(as_ints(product), 7)
    code, weight, scale, bias, bias_stride = linear[0], linear[1], linear[2], linear[3], linear[4]
    pairs, columns = linear[5], linear[6]
    twos = -(-columns // (2 * LANES))
    first, last = twos * thread // num_threads * 2, twos * (thread + 1) // num_threads * 2
    last = min(last, -(-columns // LANES))
    place = state.product_room + thread * SCRATCH_BYTES
    strips = (code, x, out, rows, weight, scale, bias, bias_stride, place, pairs, columns)
    lanes = (a, in_features, stride, parts, ranks, groups)
    asks = FEW_ROWS < rows <= PANEL_ROWS
    middle = min(first + (last - first + 3) // 4 * 2, last) if asks else first
    runs = carray(as_ints(shared.runs), (num_threads, num_parts * shared.num_groups, 2))[thread]
    for half in range(2):
        begin, end = (middle, last) if half else (first, middle)
        num_runs = runs_to_read(dtype, *lanes, half, thread, num_threads, runs) if asks else 0
        _multiply_and_ask(strips, begin, end, runs[:num_runs])
        if half == 0:
            shrink(dtype, x, *lanes, shared.sums, thread, num_threads)
            arrive(shared.meeting)
    await_all(shared.meeting, num_threads, shared.give_way)
    totals = shared.totals + thread * BLOCK * shared.widest * 4
    begin, end = first * LANES, min(last * LANES, columns)
    expand(dtype, out, parts, ranks, groups, shared.sums, totals, begin, end)


@njit(cache=True, error_model="numpy")
def _multiply_and_ask(strips: Any, first: int, last: int, runs: Ints) -> None:
    """The strips [first, last); meanwhile ask for these addresses, as much with each two strips.

    Args:
        strips: the arguments of `multiply_strips`
        runs: [num_runs, 2]: the first address, and the one behind the last
    """
    left = 0
    for begin, end in runs:
        left += end - begin
    at_once = 2 if left else max(last - first, 1)
    run, asked = 0, 0  # of the present run: bytes
    for strip in range(first, last, at_once):
        begin, end = 0, 0
        if run < len(runs):
            share = -(-left // ((last - strip + 1) // 2 * CACHE_LINE)) * CACHE_LINE
            begin = runs[run, 0] + asked
            end = min(begin + share, runs[run, 1])
            asked += end - begin
            if end == runs[run, 1]:
                run, asked = run + 1, 0
        left -= end - begin
        multiply_strips(*strips, strip, min(strip + at_once, last), begin, end, *NO_LANES)
