"""The inner loop of the bfloat16 products: a tile of rows times strips, its sums in registers.

A strip is sixteen output columns, one vector; `product.py` says how weights lie in memory. The tile's size
is known when the code is made, so one call emits the code of every size that it may meet, and branches.

A weight of bytes is widened in registers: its magnitudes, 0 to 127, are exact in bfloat16 and choose the
upper and the lower byte of it from two tables of 128; the sign bit is that of the number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.intrinsics import CACHE_LINE
from loramux.engine.kernels.cpu.vector_ir import LANES, Builder, Value, Vectors

STEP: Final = 2  # pairs that one turn of the inner loop takes; `pairs` is a multiple of it
FROM_SUMS: Final = 1  # the tile goes on from `sums`
INTO_SUMS: Final = 2  # the tile leaves its result in `sums`, unrounded and without the bias
WIDENED: Final = 4  # the tile reads `wide` instead of a weight of bytes

_I16: Final = ir.IntType(16)
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_BYTE: Final = ir.IntType(8).as_pointer()
_SUMS: Final = ir.VectorType(ir.FloatType(), LANES)
_PAIRS: Final = ir.VectorType(_I32, LANES)  # each two bfloat16
_HALVES: Final = ir.VectorType(_I16, LANES)
_BYTES: Final = ir.VectorType(ir.IntType(8), CACHE_LINE)
_SIGN: Final = ir.Constant(_BYTES, [0x80] * CACHE_LINE)
_NUMBERS: Final = np.arange(128, dtype=np.float32).view(np.uint32) >> 16  # as bfloat16, exact


@intrinsic
def multiply_tile(
    typing: Any,
    form: Any,
    least: Any,
    most: Any,
    strips: Any,
    num_rows: Any,
    x: Any,
    x_stride: Any,
    weight: Any,
    weight_stride: Any,
    pairs: Any,
    ahead: Any,
    other: Any,
    other_last: Any,
    wide: Any,
    sums: Any,
    stage: Any,
    scale: Any,
    bias: Any,
    bias_stride: Any,
    out: Any,
    out_stride: Any,
    columns: Any,
    more: Any,
) -> tuple[Any, Any]:
    """out[r, c] = round(scale[c] * sum over k of x[r, k] * weight[k, c] + dots[r] · lanes[c] + bias[c]).

    Sums are float32, in the order of k whatever the tile's size. Addresses and strides are bytes.

    Args:
        form: of the weight, as a type: BFLOAT16 (then there is no scale) or INT8
        least, most, strips: bounds of num_rows, and strips of the tile, as `units`
        num_rows, pairs: rows of the tile; pairs of k
        x, x_stride: the first row's first pair; from one row to the next
        weight, weight_stride: the first strip's first pair; from one strip to the next
        ahead, other: where two streams begin that are asked for meanwhile; the second ends at `other_last`
        wide: address of the strips in bfloat16: several strips leave bytes there, or find them, see `stage`
        sums: address of [most, strips * 16] float32, used as `stage` says
        stage: any of FROM_SUMS, INTO_SUMS, WIDENED
        scale: the first strip's sixteen float32, followed by the next one's
        bias, bias_stride: the first strip's sixteen float32; from one strip to the next
        out, out_stride, columns: the first row's first column; to the next row; how many may be written
        more: like (x, x_stride, weight, weight_stride, pairs) the dots and lanes, unless INTO_SUMS
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        rows, *rest = list(args[4:-1]) + cgutils.unpack_tuple(builder, args[-1])
        end = builder.append_basic_block("tiled")
        switch = builder.switch(rows, end)
        for count in range(least.count, most.count + 1):
            block = builder.append_basic_block(f"rows_{count}")
            switch.add_case(ir.Constant(_I64, count), block)
            builder.position_at_end(block)
            _Tile(builder, form, count, strips.count, *rest).emit()
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(form, least, most, strips, *[types.int64] * 18, types.UniTuple(types.int64, 5)), codegen


class _Tile:
    """Code of one tile size; the arguments are those of `multiply_tile`."""

    def __init__(
        self,
        builder: Builder,
        form: types.Type,
        rows: int,
        strips: int,
        x: Value,
        x_stride: Value,
        weight: Value,
        weight_stride: Value,
        pairs: Value,
        ahead: Value,
        other: Value,
        other_last: Value,
        wide: Value,
        sums: Value,
        stage: Value,
        scale: Value,
        bias: Value,
        bias_stride: Value,
        out: Value,
        out_stride: Value,
        columns: Value,
        dots: Value,
        dots_stride: Value,
        lanes: Value,
        lanes_stride: Value,
        rank: Value,
    ) -> None:
        self.b, self.v = builder, Vectors(builder)
        self.is_bytes = form == types.int8
        self.cells = [(row, strip) for row in range(rows) for strip in range(strips)]
        self.x = [self._at(x, x_stride, row) for row in range(rows)]
        self.weight = [self._at(weight, weight_stride, strip) for strip in range(strips)]
        wide_stride = builder.mul(pairs, self.v.i64(CACHE_LINE))
        self.wide = [self._at(wide, wide_stride, strip) for strip in range(strips)]
        self.scale = [self._at(scale, self.v.i64(CACHE_LINE), strip) for strip in range(strips)]
        self.bias = [self._at(bias, bias_stride, strip) for strip in range(strips)]
        self.out = [self._at(out, out_stride, row) for row in range(rows)]
        lines = form.bitwidth * 2 * LANES * STEP // 8 // CACHE_LINE if strips == 1 else 1  # of a stream
        self.ahead, self.other, self.other_last = ahead, other, other_last
        self.ahead_stride = self.v.i64(lines * CACHE_LINE)  # for STEP pairs
        self.pairs, self.sums, self.stage, self.columns = pairs, sums, stage, columns
        self.dots, self.dots_stride, self.rank = dots, dots_stride, rank
        self.lanes, self.lanes_stride = lanes, lanes_stride

    def emit(self) -> None:
        """The whole tile, from where its weight lies."""
        if not self.is_bytes:
            self._multiply(lambda pair: self._words(self.weight, pair))
        elif len(self.weight) == 1:
            self._multiply(self._widened)
        else:
            with self.b.if_else(self._has(WIDENED)) as (then, otherwise):
                with then:
                    self._multiply(lambda pair: self._words(self.wide, pair))
                with otherwise:
                    self._multiply(self._widened_and_kept)

    def _multiply(self, vectors: Callable[[Value], list[list[Value]]]) -> None:
        """Begin, multiply, end.

        Args:
            vectors: emits STEP pairs of all strips, [STEP][strips]
        """
        found = self._loop(self._begin(), self.x, self.pairs, vectors, self._ask)
        with self.b.if_else(self._has(INTO_SUMS)) as (then, otherwise):
            with then:
                for i, total in enumerate(found):
                    self.v.store(self.sums, self.v.i64(i * LANES), total, types.float32)
            with otherwise:
                self._end(found)

    def _loop(
        self,
        first: list[Value],
        x: list[Value],
        pairs: Value,
        vectors: Callable[[Value], list[list[Value]]],
        also: Callable[[Value], None] | None = None,
    ) -> list[Value]:
        """The totals after so many pairs of k, STEP a turn; emits `also` in each."""
        before = self.b.block
        loop = self.b.append_basic_block("pairs")
        after = self.b.append_basic_block("multiplied")
        self.b.branch(loop)
        self.b.position_at_end(loop)
        pair = self.b.phi(_I64)
        totals = [self.b.phi(_SUMS) for _ in self.cells]
        following = self.b.add(pair, self.v.i64(STEP))
        found = self._step(pair, list(totals), x, vectors(pair))
        if also is not None:
            also(pair)
        for phi, start, again in zip(
            (pair, *totals), (self.v.i64(0), *first), (following, *found), strict=True
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(again, loop)
        self.b.cbranch(self.b.icmp_signed("<", following, pairs), loop, after)
        self.b.position_at_end(after)
        return found

    def _begin(self) -> list[Value]:
        """What each cell starts with: zero, or what an earlier tile left."""
        slots = [self.v.accumulator() for _ in self.cells]
        with self.b.if_then(self._has(FROM_SUMS)):
            for i, slot in enumerate(slots):
                self.b.store(self.v.load(self.sums, self.v.i64(i * LANES), types.float32), slot)
        return [self.b.load(slot) for slot in slots]

    def _step(
        self, pair: Value, totals: list[Value], x: list[Value], vectors: list[list[Value]]
    ) -> list[Value]:
        """STEP pairs: each row's pair once into every lane."""
        for offset in range(STEP):
            index = self.b.add(pair, self.v.i64(offset))
            values = [self._splat(self._load(start, index, _I32, 4)) for start in x]
            for i, (row, strip) in enumerate(self.cells):
                totals[i] = self.v.dot(totals[i], values[row], vectors[offset][strip], types.uint16)
        return totals

    def _ask(self, pair: Value) -> None:
        """For the two streams, as much as belongs to STEP pairs."""
        later = self.b.mul(self.b.sdiv(pair, self.v.i64(STEP)), self.ahead_stride)
        self.v.prefetch(self.b.add(self.ahead, later), 0)
        other = self.b.add(self.other, later)
        is_inside = self.b.icmp_signed("<", other, self.other_last)
        self.v.prefetch(self.b.select(is_inside, other, self.other_last), 0)

    def _words(self, starts: list[Value], pair: Value) -> list[list[Value]]:
        """Pairs of bfloat16, as they lie."""
        indices = [self.b.add(pair, self.v.i64(offset)) for offset in range(STEP)]
        return [[self._load(start, index, _PAIRS, CACHE_LINE) for start in starts] for index in indices]

    def _widened(self, pair: Value) -> list[list[Value]]:
        """Pairs of bytes, STEP a line, as pairs of bfloat16."""
        line = self.b.sdiv(pair, self.v.i64(STEP))
        strips = [self._widen(self._load(start, line, _BYTES, CACHE_LINE)) for start in self.weight]
        return [list(vectors) for vectors in zip(*strips, strict=True)]

    def _widened_and_kept(self, pair: Value) -> list[list[Value]]:
        """The same, left in `wide` for the rows that follow."""
        vectors = self._widened(pair)
        for offset, strips in enumerate(vectors):
            index = self.b.add(pair, self.v.i64(offset))
            for start, vector in zip(self.wide, strips, strict=True):
                self.b.store(vector, self._address(start, index, _PAIRS, CACHE_LINE), align=CACHE_LINE)
        return vectors

    def _widen(self, numbers: Value) -> list[Value]:
        """A line of signs and magnitudes to STEP vectors; `product.py` says in which order bytes lie."""
        tables = [
            [ir.Constant(_BYTES, [int(byte) for byte in half]) for half in (table[:64], table[64:])]
            for table in (_NUMBERS & 0xFF, _NUMBERS >> 8)
        ]
        low, high = (self.v.choose_bytes(numbers, *halves) for halves in tables)
        high = self.b.or_(high, self.b.and_(numbers, _SIGN))
        vectors = []
        for offset in range(STEP):
            lanes = [16 * (i // 16) + 8 * offset + i % 16 // 2 + i % 2 * 64 for i in range(CACHE_LINE)]
            mask = ir.Constant(ir.VectorType(_I32, CACHE_LINE), lanes)
            vectors.append(self.b.bitcast(self.b.shuffle_vector(low, high, mask), _PAIRS))
        return vectors

    def _end(self, totals: list[Value]) -> None:
        """Scale, add the bias, round, and write the columns that exist."""
        biases = [self.v.load(start, self.v.i64(0), types.float32) for start in self.bias]
        lanes = [ir.Constant(_PAIRS, [i * LANES + j for j in range(LANES)]) for i in range(len(self.bias))]
        limit = self._splat(self.b.trunc(self.columns, _I32))
        exists = [self.b.icmp_signed("<", lane, limit) for lane in lanes]
        kind = ir.FunctionType(ir.VoidType(), [_HALVES, _HALVES.as_pointer(), _I32, exists[0].type])
        write = cgutils.get_or_insert_function(self.b.module, kind, "llvm.masked.store.v16i16.p0")
        if self.is_bytes:
            scales = [self.v.load(start, self.v.i64(0), types.float32) for start in self.scale]
            totals = [
                self.b.fmul(total, scales[strip])
                for (_, strip), total in zip(self.cells, totals, strict=True)
            ]
        totals = self._with_lanes(totals)
        for (row, strip), total in zip(self.cells, totals, strict=True):
            rounded = self.v.narrow(self.b.fadd(total, biases[strip]))
            target = self.b.inttoptr(
                self.b.add(self.out[row], self.v.i64(strip * LANES * 2)), _HALVES.as_pointer()
            )
            self.b.call(write, [rounded, target, ir.Constant(_I32, 2), exists[strip]])

    def _with_lanes(self, totals: list[Value]) -> list[Value]:
        """k goes on with the dots and the lanes."""
        slots = [self.v.accumulator() for _ in totals]
        for total, slot in zip(totals, slots, strict=True):
            self.b.store(total, slot)
        with self.b.if_then(self.b.icmp_signed(">", self.rank, self.v.i64(0))):
            dots = [self._at(self.dots, self.dots_stride, row) for row in range(len(self.x))]
            lanes = [self._at(self.lanes, self.lanes_stride, strip) for strip in range(len(self.weight))]
            found = self._loop(totals, dots, self.rank, lambda pair: self._words(lanes, pair))
            for total, slot in zip(found, slots, strict=True):
                self.b.store(total, slot)
        return [self.b.load(slot) for slot in slots]

    def _load(self, start: Value, index: Value, kind: Any, size: int) -> Value:
        return self.b.load(self._address(start, index, kind, size), align=size)

    def _address(self, start: Value, index: Value, kind: Any, size: int) -> Value:
        """Through an index: sixteen addresses that each move on do not fit the registers."""
        address = self.b.gep(self.b.inttoptr(start, _BYTE), [self.b.mul(index, self.v.i64(size))])
        return self.b.bitcast(address, kind.as_pointer())

    def _splat(self, value: Value) -> Value:
        undefined = ir.Constant(_PAIRS, ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(_PAIRS, [0] * LANES))

    def _at(self, start: Value, stride: Value, index: int) -> Value:
        return self.b.add(start, self.b.mul(stride, self.v.i64(index)))

    def _has(self, stage: int) -> Value:
        return self.b.icmp_signed("!=", self.b.and_(self.stage, self.v.i64(stage)), self.v.i64(0))
