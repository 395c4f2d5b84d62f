"""Inner loops of LoRA rows: blocks of lanes and tokens, a line of 32 elements at a time.

A line of bfloat16 is one AVX-512 register of 16 pairs. Dots take pairs as they are where the processor
multiplies them (AVX512-BF16) and widen the two halves of each pair elsewhere; both see the elements in the
same order. Addresses and sizes as in `intrinsics.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.vector_ir import LANES, Builder, Value, Vectors

LINE: Final = 2 * LANES  # elements
FROM_ZERO: Final = 1  # stages of `expand_block`
TO_OUT: Final = 2

_F32: Final = ir.FloatType()
_I32: Final = ir.IntType(32)
_VEC: Final = ir.VectorType(_F32, LANES)
_VEC_I32: Final = ir.VectorType(_I32, LANES)


@cache
def multiplies_pairs() -> bool:
    """True if this processor has AVX512-BF16."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


class Lines(Vectors):
    """Lines as two vectors of floats; of bfloat16, the even and the odd elements."""

    def load_bits(self, address: Value, index: Value) -> Value:
        """A line of bfloat16 as it is: 16 integers, each a pair."""
        base = self.b.inttoptr(address, ir.IntType(16).as_pointer())
        pointer = self.b.bitcast(self.b.gep(base, [index]), _VEC_I32.as_pointer())
        return self.b.load(pointer, align=2)

    def load_line(self, address: Value, index: Value, dtype: types.Type) -> tuple[Value, Value]:
        """The line from element `index` on."""
        if dtype == types.uint16:
            return self._halves(self.load_bits(address, index))
        second = self.b.add(index, self.i64(LANES))
        return self.load(address, index, dtype), self.load(address, second, dtype)

    def store_line(self, address: Value, index: Value, line: tuple[Value, Value], dtype: types.Type) -> None:
        """The line, rounded to the dtype."""
        if dtype == types.uint16:
            sixteen = ir.Constant(_VEC_I32, [16] * LANES)
            even, odd = (self._rounded(half) for half in line)
            high = self.b.and_(odd, ir.Constant(_VEC_I32, [-65536] * LANES))
            base = self.b.inttoptr(address, ir.IntType(16).as_pointer())
            pointer = self.b.bitcast(self.b.gep(base, [index]), _VEC_I32.as_pointer())
            self.b.store(self.b.or_(high, self.b.lshr(even, sixteen)), pointer, align=2)
        else:
            self.store(address, index, line[0], dtype)
            self.store(address, self.b.add(index, self.i64(LANES)), line[1], dtype)

    def load_raw(self, address: Value, index: Value, dtype: types.Type) -> tuple[Value, ...]:
        """The line from element `index` on, as `dot_line` takes it."""
        if dtype == types.uint16 and multiplies_pairs():
            return (self.load_bits(address, index),)
        return self.load_line(address, index, dtype)

    def dot_line(self, x: tuple[Value, ...], y: tuple[Value, ...], total: Value) -> Value:
        """total + the products of two lines."""
        if len(x) == 1:
            return self._call("llvm.x86.avx512bf16.dpbf16ps.512", _VEC, [total, *x, *y])
        for left, right in zip(x, y, strict=True):
            total = self.fma(left, right, total)
        return total

    def sums(self, values: list[Value]) -> Value:
        """The sum of each vector, in one vector; as many as a power of two, at most sixteen.

        A vector's halves are added, then the halves of that, and so on: together for all of them.
        """
        width = LANES  # partial sums that are left of each value
        while width > 1:
            half = width // 2
            lows, highs = (
                [start + side * half + i for start in range(0, 2 * LANES, width) for i in range(half)]
                for side in (0, 1)
            )
            if len(values) == 1:
                values = [values[0], ir.Constant(_VEC, ir.Undefined)]
            values = [
                self.b.fadd(self._shuffle(x, y, lows), self._shuffle(x, y, highs))
                for x, y in zip(values[::2], values[1::2], strict=True)
            ]
            width = half
        return values[0]

    def store_part(self, address: Value, value: Value, first: int, count: int) -> None:
        """Lanes [first, first + count) to floats at the address."""
        kind = ir.VectorType(_I32, count)
        part = self.b.shuffle_vector(value, value, ir.Constant(kind, list(range(first, first + count))))
        pointer = self.b.inttoptr(address, ir.VectorType(_F32, count).as_pointer())
        self.b.store(part, pointer, align=4)

    def prefetch_line(self, address: Value, index: Value, dtype: types.Type) -> None:
        """Ask for the line from element `index` on."""
        item = dtype.bitwidth // 8
        start = self.b.add(address, self.b.mul(index, self.i64(item)))
        for offset in range(0, LINE * item, 64):
            self.prefetch(start, offset)

    def _shuffle(self, x: Value, y: Value, lanes: list[int]) -> Value:
        return self.b.shuffle_vector(x, y, ir.Constant(_VEC_I32, lanes))

    def _halves(self, bits: Value) -> tuple[Value, Value]:
        even = self.b.shl(bits, ir.Constant(_VEC_I32, [16] * LANES))
        odd = self.b.and_(bits, ir.Constant(_VEC_I32, [-65536] * LANES))
        return self.b.bitcast(even, _VEC), self.b.bitcast(odd, _VEC)

    def _rounded(self, value: Value) -> Value:
        """float32 bits whose upper half is the nearest bfloat16, ties to even."""
        bits = self.b.bitcast(value, _VEC_I32)
        odd = self.b.lshr(bits, ir.Constant(_VEC_I32, [16] * LANES))
        odd = self.b.and_(odd, ir.Constant(_VEC_I32, [1] * LANES))
        return self.b.add(self.b.add(bits, ir.Constant(_VEC_I32, [0x7FFF] * LANES)), odd)


@intrinsic
def dot_block(
    typing: Any,
    dtype: Any,
    lanes: Any,
    tokens: Any,
    count: Any,
    x: Any,
    rows: Any,
    stride: Any,
    ahead: Any,
    out: Any,
    out_stride: Any,
) -> tuple[Any, Any]:
    """out[t, r] = sum of x[t, i] * rows[r, i] for i < count.

    Args:
        dtype: of x and rows
        lanes, tokens: numbers of rows and of x, as `units`; powers of two, at most 16 sums in all
        count: a multiple of 16
        x: address of [tokens, count]
        rows: address of the first row; stride: elements from one row to the next; ahead: of what is read next
        out: address of float32; out_stride: floats from one token to the next
    """
    num_lanes, num_tokens = lanes.count, tokens.count

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Lines(builder)
        count_, x_, rows_, stride_, ahead_, out_, out_stride_ = args[3:]
        totals = [[v.accumulator() for _ in range(num_lanes)] for _ in range(num_tokens)]
        starts = [builder.mul(stride_, v.i64(r)) for r in range(num_lanes)]
        tokens_ = [builder.mul(count_, v.i64(t)) for t in range(num_tokens)]

        def line(i: Value) -> None:
            inputs = [v.load_raw(x_, builder.add(t, i), dtype) for t in tokens_]
            for r, start in enumerate(starts):
                at = builder.add(start, i)
                row = v.load_raw(rows_, at, dtype)
                v.prefetch_line(ahead_, at, dtype)
                for own, value in zip(totals, inputs, strict=True):
                    builder.store(v.dot_line(row, value, builder.load(own[r])), own[r])

        def rest(i: Value) -> None:
            for t, own in zip(tokens_, totals, strict=True):
                value = v.load(x_, builder.add(t, i), dtype)
                for start, total in zip(starts, own, strict=True):
                    row = v.load(rows_, builder.add(start, i), dtype)
                    builder.store(v.fma(value, row, builder.load(total)), total)

        lines = builder.and_(count_, v.i64(-LINE))
        with cgutils.for_range_slice(builder, v.i64(0), lines, v.i64(LINE)) as (index, _):
            line(index)
        with builder.if_then(builder.icmp_signed("<", lines, count_)):
            rest(lines)
        sums = v.sums([builder.load(total) for own in totals for total in own])
        places = [builder.add(out_, builder.mul(out_stride_, v.i64(4 * t))) for t in range(num_tokens)]
        for t, place in enumerate(places):
            v.store_part(place, sums, t * num_lanes, num_lanes)
        return context.get_dummy_value()

    return types.void(dtype, lanes, tokens, *[types.int64] * 7), codegen


@intrinsic
def expand_block(
    typing: Any,
    dtype: Any,
    lanes: Any,
    tokens: Any,
    count: Any,
    weights: Any,
    weights_stride: Any,
    rows: Any,
    stride: Any,
    ahead: Any,
    totals: Any,
    totals_stride: Any,
    stage: Any,
    out: Any,
    out_stride: Any,
) -> tuple[Any, Any]:
    """totals[t, i] += sum of weights[t, r] * rows[r, i] for i < count; at the end out += totals, rounded.

    Args:
        dtype: of rows and out
        lanes, tokens: numbers of rows and of outputs, as `units`
        count: a multiple of 16
        weights: address of float32; weights_stride: floats from one token to the next
        rows: address of the first row; stride: elements from one row to the next
        ahead: address of the rows that are read next, with the same stride
        totals: address of float32; totals_stride: floats from one token to the next
        stage: `FROM_ZERO` if there are no totals yet, `TO_OUT` if they belong into out instead of being kept
        out: address; out_stride: elements from one token to the next
    """
    num_lanes, num_tokens = lanes.count, tokens.count

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        expand = _Expand(Lines(builder), dtype, num_lanes, num_tokens, *args[4:])
        v, count_ = expand.v, args[3]
        lines = builder.and_(count_, v.i64(-LINE))
        with cgutils.for_range_slice(builder, v.i64(0), lines, v.i64(LINE)) as (index, _):
            expand.columns(index, LINE)
        with builder.if_then(builder.icmp_signed("<", lines, count_)):
            expand.columns(lines, LANES)
        return context.get_dummy_value()

    return types.void(dtype, lanes, tokens, *[types.int64] * 11), codegen


class _Expand:
    """Code of `expand_block` for some columns."""

    def __init__(
        self,
        v: Lines,
        dtype: types.Type,
        num_lanes: int,
        num_tokens: int,
        weights: Value,
        weights_stride: Value,
        rows: Value,
        stride: Value,
        ahead: Value,
        totals: Value,
        totals_stride: Value,
        stage: Value,
        out: Value,
        out_stride: Value,
    ) -> None:
        self.v, self.dtype = v, dtype
        self.rows, self.ahead, self.totals, self.out, self.weights = rows, ahead, totals, out, weights
        self.lanes = [v.b.mul(stride, v.i64(lane)) for lane in range(num_lanes)]
        self.weights_of = [v.b.mul(weights_stride, v.i64(token)) for token in range(num_tokens)]
        self.totals_of = [v.b.mul(totals_stride, v.i64(token)) for token in range(num_tokens)]
        self.out_of = [v.b.mul(out_stride, v.i64(token)) for token in range(num_tokens)]
        self.begins, self.ends = (
            v.b.icmp_signed("!=", v.b.and_(stage, v.i64(flag)), v.i64(0)) for flag in (FROM_ZERO, TO_OUT)
        )

    def columns(self, index: Value, count: int) -> None:
        """The columns [index, index + count): a line, or one vector."""
        v, b, halves = self.v, self.v.b, count // LANES
        sums = [[v.accumulator() for _ in range(halves)] for _ in self.totals_of]
        with b.if_then(b.not_(self.begins)):
            for start, own in zip(self.totals_of, sums, strict=True):
                for half, value in zip(
                    own, self._load(self.totals, start, index, count, types.float32), strict=True
                ):
                    b.store(value, half)
        for lane, start in enumerate(self.lanes):
            at = b.add(start, index)
            row = self._load(self.rows, start, index, count, self.dtype)
            v.prefetch_line(self.ahead, at, self.dtype)
            for token, own in zip(self.weights_of, sums, strict=True):
                factor = v.splat(v.load_scalar(self.weights, b.add(token, v.i64(lane))))
                for half, value in zip(own, row, strict=True):
                    b.store(v.fma(factor, value, b.load(half)), half)
        with b.if_else(self.ends) as (then, otherwise):
            with then:
                for start, own in zip(self.out_of, sums, strict=True):
                    old = self._load(self.out, start, index, count, self.dtype)
                    new = [b.fadd(x, b.load(half)) for x, half in zip(old, own, strict=True)]
                    self._store(self.out, start, index, new, self.dtype)
            with otherwise:
                for start, own in zip(self.totals_of, sums, strict=True):
                    self._store(self.totals, start, index, [b.load(half) for half in own], types.float32)

    def _load(
        self, address: Value, start: Value, index: Value, count: int, dtype: types.Type
    ) -> Sequence[Value]:
        at = self.v.b.add(start, index)
        return self.v.load_line(address, at, dtype) if count == LINE else (self.v.load(address, at, dtype),)

    def _store(
        self, address: Value, start: Value, index: Value, values: list[Value], dtype: types.Type
    ) -> None:
        at = self.v.b.add(start, index)
        if len(values) == 1:
            self.v.store(address, at, values[0], dtype)
        else:
            self.v.store_line(address, at, (values[0], values[1]), dtype)
