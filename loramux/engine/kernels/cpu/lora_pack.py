"""An adapter's A and B as the strips of a product, see `product.py` for how these lie.

A strip's lines of sixteen pairs are filled four lanes, or one pair of lanes, at a time, so that a part
begins anywhere. Lanes up to a multiple of four are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.intrinsics import CACHE_LINE, Address
from loramux.engine.kernels.cpu.lora_loops import FIRST, OFFSET, RANK, STRIDE, WIDTH, B, Ints
from loramux.engine.kernels.cpu.product_ir import STEP
from loramux.engine.kernels.cpu.vector_ir import LANES, Builder, Value

LANE_MULTIPLE: Final = 2 * STEP

_PAIRS: Final = 8  # of k that are turned together
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)


@njit(cache=True, error_model="numpy")
def pack_a(
    a: Address,
    stride: int,
    parts: Ints,
    ranks: Ints,
    group: Ints,
    packed: Address,
    pairs: int,
    thread: int,
    threads: int,
) -> None:
    """A thread's share of k of a group's A, all parts side by side: [width / 16, pairs, 16] pairs."""
    eights = pairs // _PAIRS
    first, last = eights * thread // threads * _PAIRS, eights * (thread + 1) // threads * _PAIRS
    column = 0
    for part in range(len(parts)):
        rank = min(group[RANK], ranks[part, group[FIRST]])
        for lane in range(0, rank, LANE_MULTIPLE):
            source = a + ((group[FIRST] + lane) * stride + part * 2 * pairs) * 2
            target = packed + column // LANES * pairs * CACHE_LINE + column % LANES * 4
            for pair in range(first, last, _PAIRS):
                _turn(source + pair * 4, stride * 2, rank - lane, target + pair * CACHE_LINE)
            column += LANE_MULTIPLE


@njit(cache=True, error_model="numpy")
def pack_b(parts: Ints, ranks: Ints, group: Ints, packed: Address, first: int, last: int) -> None:
    """The strips [first, last) of a group's B: [columns / 16, lanes / 2, 16] pairs."""
    pairs = padded(group[RANK], group[RANK]) // 2
    for part in range(len(parts)):
        rank = min(group[RANK], ranks[part, group[FIRST]])
        left = max(first, parts[part, OFFSET] // LANES)
        right = min(last, (parts[part, OFFSET] + parts[part, WIDTH]) // LANES)
        row = parts[part, STRIDE] * 2
        for lane in range(0, padded(rank, rank), 2):
            source = parts[part, B] + (group[FIRST] + lane) * row - parts[part, OFFSET] * 2
            for strip in range(left, right):
                place = packed + (strip * pairs + lane // 2) * CACHE_LINE
                _interleave(source + strip * LANES * 2, row, rank - lane, place)


@njit(cache=True, error_model="numpy")
def padded(rank: int, most: int) -> int:
    """Lanes of a part as a product takes them."""
    return -(-min(rank, most) // LANE_MULTIPLE) * LANE_MULTIPLE


@intrinsic
def _turn(typing: Any, source: Any, stride: Any, count: Any, target: Any) -> tuple[Any, Any]:
    """Eight pairs of four rows into four columns of eight lines.

    Args:
        source, stride: address of the first row; bytes to the next
        count: rows that exist, from 1 on; the others are zeros
        target: address of the first line's first of these columns
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        vector = ir.VectorType(_I32, _PAIRS)
        rows = [_row(builder, args, row, vector, 4) for row in range(LANE_MULTIPLE)]
        upper, lower = (_shuffled(builder, rows[i], rows[i + 1], range(2 * _PAIRS)) for i in (0, 2))
        for pair in range(_PAIRS):
            lanes = [pair, pair + _PAIRS, pair + 2 * _PAIRS, pair + 3 * _PAIRS]
            place = builder.add(args[3], ir.Constant(_I64, pair * CACHE_LINE))
            value = _shuffled(builder, upper, lower, lanes)
            builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


@intrinsic
def _interleave(typing: Any, source: Any, stride: Any, count: Any, target: Any) -> tuple[Any, Any]:
    """Sixteen columns of two rows as one line of pairs; arguments as those of `_turn`."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        vector = ir.VectorType(ir.IntType(16), LANES)
        upper, lower = (_row(builder, args, row, vector, 2) for row in range(2))
        lanes = [lane // 2 + lane % 2 * LANES for lane in range(2 * LANES)]
        value = _shuffled(builder, upper, lower, lanes)
        builder.store(value, builder.inttoptr(args[3], value.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


def _row(builder: Builder, args: Any, row: int, vector: ir.Type, align: int) -> Value:
    """The numbers of one row, or zeros in the place of one that does not exist."""
    source, stride, count, _ = args
    exists = builder.icmp_signed("<", ir.Constant(_I64, row), count)
    offset = builder.select(exists, builder.mul(stride, ir.Constant(_I64, row)), ir.Constant(_I64, 0))
    place = builder.inttoptr(builder.add(source, offset), vector.as_pointer())
    return builder.select(exists, builder.load(place, align=align), ir.Constant(vector, None))


def _shuffled(builder: Builder, first: Value, second: Value, lanes: Sequence[int]) -> Value:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))
