"""Inner loops of the CPU kernels, as functions that numba-compiled code can call.

Addresses are plain integers (`Tensor.data_ptr()`), which keeps calls cheap; the callers own the memory
and check the shapes. Counts are multiples of sixteen.

What varies with the model is known when the code is made, through the *types* of arguments that are
otherwise unused: the dtype through a scalar (`BFLOAT16`, `FLOAT32`), sizes through the length of a tuple
(`units(n)`). So each signature is cached on disk under its own key.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.vector_ir import LANES, Builder, Value, Vectors

CACHE_LINE: Final = 64  # bytes
BLOCK: Final = 16  # tokens of a KV block: one vector

Dtype = np.uint16 | np.float32
BFLOAT16: Final = np.uint16(0)  # uint16 holds bfloat16 bits
INT8: Final = np.int8(0)  # of weights only
FLOAT16: Final = np.int16(0)  # int16 holds float16 bits
FLOAT32: Final = np.float32(0)
Size = tuple[int, ...]
Address = int

_I64: Final = ir.IntType(64)
_LOG2_E: Final = 1.4426950408889634


def units(count: int) -> Size:
    """A size that the compiler shall know: its tuple type carries the length."""
    return (0,) * count


@intrinsic
def item_size(typing: Any, dtype: Any) -> tuple[Any, Any]:
    """Bytes of one element."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        return ir.Constant(_I64, dtype.bitwidth // 8)

    return types.int64(dtype), codegen


@intrinsic
def prefetch_block(typing: Any, dtype: Any, vectors: Any, block: Any) -> tuple[Any, Any]:
    """Ask for the [16, head_dim] elements at address `block`, which are read soon."""
    num_bytes = vectors.count * LANES * BLOCK * dtype.bitwidth // 8

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        for offset in range(0, num_bytes, CACHE_LINE):
            v.prefetch(args[2], offset)
        return context.get_dummy_value()

    return types.void(dtype, vectors, types.int64), codegen


@intrinsic
def copy_row(
    typing: Any, source: Any, target: Any, count: Any, src: Any, dst: Any, scale: Any
) -> tuple[Any, Any]:
    """dst[i] = src[i] * scale for i < count (a multiple of 16).

    Args:
        source, target: dtypes of src and dst
        src, dst: addresses
        scale: float32
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, _, count_, src_, dst_, scale_ = args
        factor = v.splat(scale_)

        def body(i: Value) -> None:
            v.store(dst_, i, builder.fmul(v.load(src_, i, source), factor), target)

        v.loop(count_, body)
        return context.get_dummy_value()

    return types.void(source, target, types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def sum_of_squares(typing: Any, dtype: Any, count: Any, x: Any, delta: Any) -> tuple[Any, Any]:
    """Sum of x[i]² for i < count; x += delta first (rounded to the dtype) unless delta is 0.

    Args:
        x, delta: addresses of [count] of dtype
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, count_, x_, delta_ = args
        total = v.accumulator()

        def add(i: Value) -> None:
            value = v.round(builder.fadd(v.load(x_, i, dtype), v.load(delta_, i, dtype)), dtype)
            v.store(x_, i, value, dtype)
            builder.store(v.fma(value, value, builder.load(total)), total)

        def keep(i: Value) -> None:
            value = v.load(x_, i, dtype)
            builder.store(v.fma(value, value, builder.load(total)), total)

        with builder.if_else(builder.icmp_signed("!=", delta_, v.i64(0))) as (then, otherwise):
            with then:
                v.loop(count_, add)
            with otherwise:
                v.loop(count_, keep)
        return v.sum(builder.load(total))

    return types.float32(dtype, types.int64, types.int64, types.int64), codegen


@intrinsic
def scale_row(
    typing: Any, dtype: Any, count: Any, x: Any, weight: Any, out: Any, scale: Any
) -> tuple[Any, Any]:
    """out[i] = round(x[i] * scale) * weight[i] for i < count, in the dtype's roundings."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, count_, x_, weight_, out_, scale_ = args
        factor = v.splat(scale_)

        def body(i: Value) -> None:
            value = v.round(builder.fmul(v.load(x_, i, dtype), factor), dtype)
            v.store(out_, i, builder.fmul(value, v.load(weight_, i, dtype)), dtype)

        v.loop(count_, body)
        return context.get_dummy_value()

    signature = types.void(dtype, types.int64, types.int64, types.int64, types.int64, types.float32)
    return signature, codegen


@intrinsic
def rotate_row(typing: Any, dtype: Any, half: Any, x: Any, cos: Any, sin: Any, out: Any) -> tuple[Any, Any]:
    """Rotate the pairs (i, i + half) of one head: in the dtype's roundings, from x to out.

    Args:
        half: head_dim / 2, a multiple of 16
        x, out: addresses of [2 * half]; may be the same
        cos, sin: addresses of [2 * half] of dtype
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, half_, x_, cos_, sin_, out_ = args

        def product(a: Value, address: Value, i: Value) -> Value:
            return v.round(builder.fmul(a, v.load(address, i, dtype)), dtype)

        def body(i: Value) -> None:
            j = builder.add(i, half_)
            left, right = v.load(x_, i, dtype), v.load(x_, j, dtype)
            v.store(out_, i, builder.fsub(product(left, cos_, i), product(right, sin_, i)), dtype)
            v.store(out_, j, builder.fadd(product(right, cos_, j), product(left, sin_, j)), dtype)

        v.loop(half_, body)
        return context.get_dummy_value()

    signature = types.void(dtype, types.int64, types.int64, types.int64, types.int64, types.int64)
    return signature, codegen


@intrinsic
def silu_mul_row(typing: Any, dtype: Any, count: Any, gate: Any, up: Any, out: Any) -> tuple[Any, Any]:
    """out[i] = round(gate[i] / (1 + exp(-gate[i]))) * up[i] for i < count.

    In bfloat16 the quotient is right to 2e-4, a twentieth of what rounding it costs.
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, count_, gate_, up_, out_ = args

        def body(i: Value) -> None:
            x = v.load(gate_, i, dtype)
            if dtype == types.uint16:
                power = v.smaller(builder.fmul(x, v.const(-_LOG2_E)), v.const(126.0))
                below = builder.fadd(v.const(1.0), v.rough_exp2(power))
                value = v.round(builder.fmul(x, v.rough_inverse(below)), dtype)
            else:
                below = builder.fadd(v.const(1.0), v.exp(builder.fsub(v.const(0.0), x)))
                value = builder.fdiv(x, below)
            v.store(out_, i, builder.fmul(value, v.load(up_, i, dtype)), dtype)

        v.loop(count_, body)
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64, types.int64, types.int64), codegen
