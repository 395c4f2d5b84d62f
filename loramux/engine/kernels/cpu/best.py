"""The best token of every row of logits on a CPU, in the dtype of the logits."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.kernels.cpu.intrinsics import Address, Dtype, item_size
from loramux.engine.kernels.cpu.vector_ir import LANES, Builder, Value, Vectors

_STRETCH: Final = 64 * LANES  # of which the largest is found first, then its place
_CHAINS: Final = 4  # comparisons that do not wait for each other
_LOWEST: Final = float("-inf")


@njit(cache=True, nogil=True, error_model="numpy")
def best_tokens(dtype: Dtype, logits: Address, width: int, out: Ints) -> None:
    """out[row] = index of the first of the largest numbers of the row.

    NaN counts as nothing; where there is nothing above -inf, the index is 0.

    Args:
        dtype: of logits
        logits: address of [len(out), width]; width is a multiple of 16
    """
    item = item_size(dtype)
    for row in range(len(out)):
        at = logits + row * width * item
        top, place = np.float32(_LOWEST), 0
        for first in range(0, width, _STRETCH):
            value = _largest(dtype, min(_STRETCH, width - first), at + first * item)
            if value > top:
                top, place = value, first
        lane = LANES if top > np.float32(_LOWEST) else 0
        while lane == LANES:
            lane = _first_equal(dtype, at + place * item, top)
            place += lane
        out[row] = place


@intrinsic
def _largest(typing: Any, dtype: Any, count: Any, x: Any) -> tuple[Any, Any]:
    """The largest of x[i] for i < count; -inf of NaN alone."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, count_, x_ = args
        best = [cgutils.alloca_once_value(builder, v.const(_LOWEST)) for _ in range(_CHAINS)]

        def body(i: Value, chain: int) -> None:
            builder.store(v.larger(v.load(x_, i, dtype), builder.load(best[chain])), best[chain])

        v.unrolled(count_, body)
        left, right = (v.larger(builder.load(best[i]), builder.load(best[i + 2])) for i in (0, 1))
        return v.max(v.larger(left, right))

    return types.float32(dtype, types.int64, types.int64), codegen


@intrinsic
def _first_equal(typing: Any, dtype: Any, x: Any, value: Any) -> tuple[Any, Any]:
    """Index of the first of x[0] to x[15] that is equal to the value; 16 if none is."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, x_, value_ = args
        equal = builder.fcmp_ordered("==", v.load(x_, v.i64(0), dtype), v.splat(value_))
        bits = builder.zext(builder.bitcast(equal, ir.IntType(LANES)), ir.IntType(64))
        return builder.cttz(builder.or_(bits, v.i64(1 << LANES)), ir.Constant(ir.IntType(1), 1))

    return types.int64(dtype, types.int64, types.float32), codegen
