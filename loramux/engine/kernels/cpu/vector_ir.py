"""Sixteen floats at a time: the vector operations that numba's scalar loops cannot express.

`Vectors` writes LLVM vector code; `intrinsics.py` uses it for one inner loop each. Sixteen lanes are one
AVX-512 register; LLVM splits them for narrower machines, so the code is portable.

Arithmetic is float32. bfloat16 is widened in registers and rounded to nearest even, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

LANES: Final = 16

_F32: Final = ir.FloatType()
_I16: Final = ir.IntType(16)
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_VEC: Final = ir.VectorType(_F32, LANES)
_VEC_F16: Final = ir.VectorType(ir.HalfType(), LANES)
_VEC_I16: Final = ir.VectorType(_I16, LANES)
_VEC_I32: Final = ir.VectorType(_I32, LANES)

_HAS_WIDE_VECTORS: Final = binding.get_host_cpu_features().get("avx512f", False)
_HAS_PAIR_PRODUCTS: Final = binding.get_host_cpu_features().get("avx512bf16", False)

Builder = Any
Value = Any


class Vectors:
    """Vector loads, stores and arithmetic on one LLVM builder."""

    def __init__(self, builder: Builder) -> None:
        self.b = builder

    def i64(self, value: int) -> Value:
        """An integer constant."""
        return ir.Constant(_I64, value)

    def const(self, value: float) -> Value:
        """The same number in every lane."""
        return ir.Constant(_VEC, [float(np.float32(value))] * LANES)

    def splat(self, scalar: Value) -> Value:
        """A float in every lane."""
        undefined = ir.Constant(_VEC, ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(_VEC_I32, [0] * LANES))

    def load_scalar(self, address: Value, index: Value) -> Value:
        """One float."""
        base = self.b.inttoptr(address, _F32.as_pointer())
        return self.b.load(self.b.gep(base, [index]))

    def store_scalar(self, address: Value, index: Value, value: Value) -> None:
        """One float."""
        base = self.b.inttoptr(address, _F32.as_pointer())
        self.b.store(value, self.b.gep(base, [index]))

    def load(self, address: Value, index: Value, dtype: types.Type) -> Value:
        """Sixteen elements from `index` on, as float32."""
        is_half = dtype in (types.uint16, types.int16)
        pointer = self._pointer(address, index, is_half=is_half)
        value = self.b.load(pointer, align=2 if is_half else 4)
        if dtype == types.int16:  # bits of IEEE's half
            return self.b.fpext(self.b.bitcast(value, _VEC_F16), _VEC)
        return self.widen(value) if is_half else value

    def store(self, address: Value, index: Value, value: Value, dtype: types.Type) -> None:
        """Sixteen floats, rounded to the dtype."""
        is_half = dtype == types.uint16
        pointer = self._pointer(address, index, is_half=is_half)
        self.b.store(self.narrow(value) if is_half else value, pointer, align=2 if is_half else 4)

    def widen(self, bits: Value) -> Value:
        """bfloat16 bits to float32."""
        wide = self.b.zext(bits, _VEC_I32)
        return self.b.bitcast(self.b.shl(wide, ir.Constant(_VEC_I32, [16] * LANES)), _VEC)

    def narrow(self, value: Value) -> Value:
        """float32 to bfloat16 bits, to nearest even."""
        if _HAS_PAIR_PRODUCTS:
            return self._call("llvm.x86.avx512bf16.cvtneps2bf16.512", _VEC_I16, [value])
        bits = self.b.bitcast(value, _VEC_I32)
        sixteen = ir.Constant(_VEC_I32, [16] * LANES)
        odd = self.b.and_(self.b.lshr(bits, sixteen), ir.Constant(_VEC_I32, [1] * LANES))
        bits = self.b.add(self.b.add(bits, ir.Constant(_VEC_I32, [0x7FFF] * LANES)), odd)
        return self.b.trunc(self.b.lshr(bits, sixteen), _VEC_I16)

    def round(self, value: Value, dtype: types.Type) -> Value:
        """As it would be after a store and a load."""
        return self.widen(self.narrow(value)) if dtype == types.uint16 else value

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z in one rounding."""
        return self._call("llvm.fma.v16f32", _VEC, [x, y, z])

    def load_words(self, address: Value, dtype: types.Type) -> Value:
        """Sixteen 32-bit words, as `dot` takes them: floats, or pairs of bfloat16."""
        vector = _VEC_I32 if dtype == types.uint16 else _VEC
        return self.b.load(self.b.inttoptr(address, vector.as_pointer()), align=4)

    def splat_word(self, address: Value, dtype: types.Type) -> Value:
        """One 32-bit word in every lane."""
        element, vector = (_I32, _VEC_I32) if dtype == types.uint16 else (_F32, _VEC)
        word = self.b.load(self.b.inttoptr(address, element.as_pointer()), align=4)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.b.insert_element(undefined, word, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(_VEC_I32, [0] * LANES))

    def dot(self, total: Value, x: Value, y: Value, dtype: types.Type) -> Value:
        """total + x * y, word by word: a pair of bfloat16 adds both of its products."""
        if dtype != types.uint16:
            return self.fma(x, y, total)
        if _HAS_PAIR_PRODUCTS:
            return self._call("llvm.x86.avx512bf16.dpbf16ps.512", _VEC, [total, x, y])
        sixteen, upper = (ir.Constant(_VEC_I32, [n] * LANES) for n in (16, 0xFFFF0000))
        first = [self.b.bitcast(self.b.shl(word, sixteen), _VEC) for word in (x, y)]
        second = [self.b.bitcast(self.b.and_(word, upper), _VEC) for word in (x, y)]
        return self.fma(second[0], second[1], self.fma(first[0], first[1], total))

    def choose_bytes(self, index: Value, first: Value, second: Value) -> Value:
        """64 bytes of the table [first, second] of 128; indices are bytes, whose top bit is ignored."""
        return self._call("llvm.x86.avx512.vpermi2var.qi.512", index.type, [first, index, second])

    def store_half(self, target: Value, source: Value, index: Value, half: int) -> None:
        """Sixteen 16-bit elements into the lower (0) or upper (1) halves of words, the others untouched."""
        bits = self.b.load(self._pointer(source, index, is_half=True), align=2)
        lanes = [lane // 2 for lane in range(2 * LANES)]
        pairs = self.b.shuffle_vector(
            bits, ir.Constant(_VEC_I16, ir.Undefined), ir.Constant(ir.VectorType(_I32, 2 * LANES), lanes)
        )
        bit = ir.IntType(1)
        mask = ir.Constant(ir.VectorType(bit, 2 * LANES), [lane % 2 == half for lane in range(2 * LANES)])
        words = self.b.bitcast(self._pointer(target, index, is_half=False), pairs.type.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pairs.type, words.type, _I32, mask.type])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.masked.store.v32i16.p0")
        self.b.call(function, [pairs, words, ir.Constant(_I32, 2), mask])

    def sum(self, value: Value) -> Value:
        """All lanes added, in a fixed order that the compiler chooses."""
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(_F32, [_F32, _VEC]), "llvm.vector.reduce.fadd.v16f32"
        )
        return self.b.call(function, [ir.Constant(_F32, 0.0), value], fastmath=("reassoc",))

    def larger(self, x: Value, y: Value) -> Value:
        """The larger of both in each lane."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def smaller(self, x: Value, y: Value) -> Value:
        """The smaller of both in each lane."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def rough_inverse(self, x: Value) -> Value:
        """1 / x, relative error under 7e-5, where the machine has an operation for it; else 1 / x."""
        if not _HAS_WIDE_VECTORS:
            return self.b.fdiv(self.const(1.0), x)
        every = ir.Constant(_I16, -1)
        return self._call("llvm.x86.avx512.rcp14.ps.512", _VEC, [x, x, every])

    def max(self, value: Value) -> Value:
        """The largest lane."""
        return self._call("llvm.vector.reduce.fmax.v16f32", _F32, [value])

    def exp(self, x: Value) -> Value:
        """e to the x, relative error under 2e-7 on [-87, 88], clamped outside.

        Source: Cephes `expf`: split off a power of two, then a polynomial of degree five.
        """
        x = self.larger(x, self.const(-87.0))
        x = self._call("llvm.minnum.v16f32", _VEC, [x, self.const(88.0)])
        power = self._call("llvm.rint.v16f32", _VEC, [self.b.fmul(x, self.const(1.44269504))])
        rest = self.fma(power, self.const(-0.693359375), x)
        rest = self.fma(power, self.const(2.12194440e-4), rest)
        y = self.const(1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ):
            y = self.fma(y, rest, self.const(coefficient))
        y = self.fma(y, self.b.fmul(rest, rest), self.b.fadd(rest, self.const(1.0)))
        exponent = self.b.add(self.b.fptosi(power, _VEC_I32), ir.Constant(_VEC_I32, [127] * LANES))
        scale = self.b.bitcast(self.b.shl(exponent, ir.Constant(_VEC_I32, [23] * LANES)), _VEC)
        return self.b.fmul(y, scale)

    def rough_exp2(self, x: Value) -> Value:
        """2 to the x for x < 127, relative error under 8e-5, a twentieth of bfloat16's.

        The cubic is fitted to 2^x on [0, 1) for the least relative error.
        """
        x = self.larger(x, self.const(-126.0))
        power = self._call("llvm.floor.v16f32", _VEC, [x])
        rest = self.b.fsub(x, power)
        y = self.const(0.07802401)
        for coefficient in (0.22606706, 0.69583402, 0.99992512):
            y = self.fma(y, rest, self.const(coefficient))
        shift = self.b.shl(self.b.fptosi(power, _VEC_I32), ir.Constant(_VEC_I32, [23] * LANES))
        return self.b.bitcast(self.b.add(self.b.bitcast(y, _VEC_I32), shift), _VEC)

    def loop(self, count: Value, body: Callable[[Value], None]) -> None:
        """`body(i)` for i = 0, 16, 32, ... below count."""
        with cgutils.for_range_slice(self.b, self.i64(0), count, self.i64(LANES)) as (index, _):
            body(index)

    def unrolled(self, count: Value, body: Callable[[Value, int], None]) -> None:
        """`body(i, chain)` as in `loop`, four at a time; chain tells the four apart."""
        whole = self.b.and_(count, self.i64(-4 * LANES))
        with cgutils.for_range_slice(self.b, self.i64(0), whole, self.i64(4 * LANES)) as (index, _):
            for chain in range(4):
                body(self.b.add(index, self.i64(chain * LANES)), chain)
        with cgutils.for_range_slice(self.b, whole, count, self.i64(LANES)) as (index, _):
            body(index, 0)

    def accumulator(self) -> Value:
        """A vector variable, zero at first, that the optimiser keeps in a register."""
        slot = cgutils.alloca_once(self.b, _VEC)
        self.b.store(self.const(0.0), slot)
        return slot

    def prefetch(self, address: Value, offset: int) -> None:
        """Ask for the cache line at address + offset bytes; reading it later costs less."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        pointer = self.b.gep(self.b.inttoptr(address, byte), [self.i64(offset)])
        read, near, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        self.b.call(function, [pointer, read, near, data])

    def _pointer(self, address: Value, index: Value, *, is_half: bool) -> Value:
        element, vector = (_I16, _VEC_I16) if is_half else (_F32, _VEC)
        base = self.b.inttoptr(address, element.as_pointer())
        return self.b.bitcast(self.b.gep(base, [index]), vector.as_pointer())

    def _call(self, name: str, result: Any, args: list[Value]) -> Value:
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)
