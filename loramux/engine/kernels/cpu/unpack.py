"""An adapter's bytes → lanes, compiled: one call, in which other threads may use the interpreter.

    lanes[target + l, c] = cast(source[l * lane_stride + c * column_stride] * scale)     l < rank
                         = 0                                                             rank <= l < count

for each row of the table (an A or a B of one module; see `adapters/packed.py`), as on a GPU. A number that
is not finite is never written: the lane gets 0, and the row's flag is set.

What is read as sixteen lanes may be fewer: `PADDING` bytes behind the source must be readable.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.intrinsics import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Address,
    Dtype,
    item_size,
)
from loramux.engine.kernels.cpu.vector_ir import LANES, Builder, Value, Vectors

Ints = npt.NDArray[np.int64]

PADDING: Final = 64  # bytes: sixteen of the widest elements
SOURCE, LANE_STRIDE, COLUMN_STRIDE, KIND, RANK, COLUMNS, TARGET, TARGET_STRIDE, SCALE = range(
    9
)  # as `Column` in packed.py

_BITS: Final = ir.IntType(LANES)
_I32: Final = ir.IntType(32)
_VEC_I32: Final = ir.VectorType(_I32, LANES)


class _Finite(Vectors):
    """Stores that leave out what is not finite, and remember that there was something."""

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self._bad = cgutils.alloca_once_value(builder, ir.Constant(_BITS, 0))

    def put(self, address: Value, index: Value, value: Value, dtype: types.Type) -> None:
        """Sixteen floats, rounded to the dtype, zeros in the place of those that are not finite then."""
        rounded = self.round(value, dtype)  # may make infinity of a number, and a number of NaN
        is_bad = self.b.or_(self._is_bad(value), self._is_bad(rounded))
        self.b.store(self.b.or_(self.b.load(self._bad), self.b.bitcast(is_bad, _BITS)), self._bad)
        self.store(address, index, self.b.select(is_bad, self.const(0.0), rounded), dtype)

    def _is_bad(self, value: Value) -> Value:
        size = self.b.and_(self.b.bitcast(value, _VEC_I32), ir.Constant(_VEC_I32, [0x7FFFFFFF] * LANES))
        return self.b.icmp_unsigned(">=", size, ir.Constant(_VEC_I32, [0x7F800000] * LANES))

    def found_bad(self) -> Value:
        """1 if there was one, else 0."""
        return self.b.zext(
            self.b.icmp_unsigned("!=", self.b.load(self._bad), ir.Constant(_BITS, 0)), ir.IntType(64)
        )

    def transposed(self, rows: list[Value]) -> list[Value]:
        """Element j of vector i as element i of vector j."""
        out = list(rows)
        for distance in (1, 2, 4, 8):
            low = [j if not j & distance else LANES + (j ^ distance) for j in range(LANES)]
            high = [j ^ distance if not j & distance else LANES + j for j in range(LANES)]
            for i in range(LANES):
                if not i & distance:
                    pair = out[i], out[i | distance]
                    out[i] = self.b.shuffle_vector(*pair, ir.Constant(_VEC_I32, low))
                    out[i | distance] = self.b.shuffle_vector(*pair, ir.Constant(_VEC_I32, high))
        return out


@intrinsic
def _convert(
    typing: Any, kind: Any, dtype: Any, count: Any, src: Any, dst: Any, scale: Any
) -> tuple[Any, Any]:
    """dst[i] = src[i] * scale for i < count (a multiple of 16); 1 if one was not finite.

    Args:
        kind, dtype: of src and dst
        src, dst: addresses
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = _Finite(builder)
        _, _, count_, src_, dst_, scale_ = args
        factor = v.splat(scale_)
        v.loop(count_, lambda i: v.put(dst_, i, builder.fmul(v.load(src_, i, kind), factor), dtype))
        return v.found_bad()

    return types.int64(kind, dtype, types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def _turn(
    typing: Any,
    kind: Any,
    dtype: Any,
    rank: Any,
    src: Any,
    stride: Any,
    dst: Any,
    dst_stride: Any,
    scale: Any,
) -> tuple[Any, Any]:
    """dst[l * dst_stride + c] = src[c * stride + l] * scale for c < 16 and l < min(rank, 16).

    Args:
        kind, dtype: of src and dst
        src, dst: addresses; strides in elements
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = _Finite(builder)
        _, _, rank_, src_, stride_, dst_, dst_stride_, scale_ = args
        factor = v.splat(scale_)
        columns = [
            builder.fmul(v.load(src_, builder.mul(stride_, v.i64(c)), kind), factor) for c in range(LANES)
        ]
        for lane, row in enumerate(v.transposed(columns)):
            with builder.if_then(builder.icmp_signed("<", v.i64(lane), rank_)):
                v.put(dst_, builder.mul(dst_stride_, v.i64(lane)), row, dtype)
        return v.found_bad()

    ints = (types.int64,) * 5
    return types.int64(kind, dtype, *ints, types.float32), codegen


@intrinsic
def _clear(typing: Any, dtype: Any, count: Any, dst: Any) -> tuple[Any, Any]:
    """dst[i] = 0 for i < count (a multiple of 16)."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        v.loop(args[1], lambda i: v.store(args[2], i, v.const(0.0), dtype))
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64), codegen


@intrinsic
def _as_float(typing: Any, bits: Any) -> tuple[Any, Any]:
    """The float32 whose bits these are."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        return builder.bitcast(builder.trunc(args[0], _I32), ir.FloatType())

    return types.float32(types.int64), codegen


@njit(cache=True, nogil=True, error_model="numpy")
def unpack(dtype: Dtype, table: Ints, begin: int, end: int, source: Address, count: int, flags: Ints) -> None:
    """Write the lanes of some rows of the table.

    Args:
        dtype: of the lanes
        table: [rows, 9], as `Column` says, with TARGET at the first lane to write
        begin, end: which rows
        source: what SOURCE counts from
        count: lanes to write; those above a row's rank become zero
        flags: [rows]: set to 1 where a number was not finite
    """
    for index in range(begin, end):
        row = table[index]
        if row[KIND] == 0:
            bad = _unpack_row(BFLOAT16, dtype, row, source)
        elif row[KIND] == 1:
            bad = _unpack_row(FLOAT16, dtype, row, source)
        else:
            bad = _unpack_row(FLOAT32, dtype, row, source)
        if bad:
            flags[index] = 1
        for lane in range(row[RANK], count):
            _clear(dtype, row[COLUMNS], row[TARGET] + lane * row[TARGET_STRIDE] * item_size(dtype))


@njit(cache=True, nogil=True, error_model="numpy")
def _unpack_row(kind: Any, dtype: Dtype, row: Ints, source: Address) -> int:
    """The lanes that carry weights; not 0 if a number was not finite."""
    begin, rank, scale = source + row[SOURCE], row[RANK], _as_float(row[SCALE])
    size, item = item_size(kind), item_size(dtype)
    bad = 0
    if row[COLUMN_STRIDE] == 1:
        for lane in range(rank):
            target = row[TARGET] + lane * row[TARGET_STRIDE] * item
            bad |= _convert(kind, dtype, row[COLUMNS], begin + lane * row[LANE_STRIDE] * size, target, scale)
        return bad
    for column in range(0, row[COLUMNS], LANES):
        for lane in range(0, rank, LANES):
            bad |= _turn(
                kind,
                dtype,
                rank - lane,
                begin + (column * row[COLUMN_STRIDE] + lane * row[LANE_STRIDE]) * size,
                row[COLUMN_STRIDE],
                row[TARGET] + (lane * row[TARGET_STRIDE] + column) * item,
                row[TARGET_STRIDE],
                scale,
            )
    return bad


def compile_for(dtype: Dtype) -> None:
    """Compile, or read from the cache: the first adapter should not wait for it."""
    unpack.compile(
        (
            numba.typeof(dtype),
            types.int64[:, ::1],
            types.int64,
            types.int64,
            types.int64,
            types.int64,
            types.int64[::1],
        )
    )
