"""Products in bfloat16 on CPUs that multiply pairs of bfloat16 (AVX512-BF16).

    out[r] = round(x[r] · Wᵀ * scale + bias)

The weight lies in strips of sixteen output columns, [out_features / 16, in_features / 2, 16, 2]: a vector
holds a pair of k for sixteen columns, and a strip is read from its first byte to its last. Each thread
has a range of strips of its own.

It is bfloat16, without a scale; or int8, half the bytes, of which 64 hold two pairs for each four columns,
[out_features / 16, in_features / 4, 4, 2, 4, 2], each a sign and a magnitude. These become bfloat16 in
registers, without rounding.

- Few rows: a strip at a time with all rows; memory is read as one stream and is the limit.
- More rows: two strips at a time, which stay in the cache while blocks of rows pass; the first blocks ask
  for the next two meanwhile, a little with each pair, since a core has few places for what is on its
  way. Rows come in panels and k in chunks, so that this fits the cache. The first block leaves bytes in
  the cache as bfloat16.

Sums are taken in the order of k for any number of rows: a row's result does not depend on its company.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from numba.core.codegen import get_host_cpu_features
from torch import Tensor

from loramux.engine.kernels.cpu.intrinsics import CACHE_LINE
from loramux.engine.kernels.cpu.operations import PRODUCT_ARGUMENTS, product_code
from loramux.engine.kernels.cpu.product_ir import STEP
from loramux.engine.kernels.cpu.product_strips import SCRATCH_BYTES, strips_code
from loramux.engine.kernels.cpu.recording import Call, arguments
from loramux.engine.kernels.cpu.threads import is_alone
from loramux.engine.kernels.cpu.vector_ir import LANES

_ALONE_BYTES: Final = 1 << 17  # a smaller weight is not worth a second thread
_QUAD: Final = 4  # columns

Pairs = npt.NDArray[np.int32 | np.int16]


class PackedLinear:
    """A weight in strips, and the product with it."""

    __slots__ = (
        *("_bias", "_call", "_packed", "_scale", "_scratch", "_table"),
        *("address", "dtype", "out_features"),
    )

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        """Args:
        weight: [out_features, in_features] bfloat16, or int8 above -128; a reordered copy is kept
        bias: [out_features]
        scale: [out_features] float32, of an int8 weight
        """
        assert supports(weight)
        assert (scale is None) == (weight.dtype == torch.bfloat16)
        self.out_features, in_features = weight.shape
        self.dtype = weight.dtype
        threads = max(torch.get_num_threads(), 1)
        self._packed = _pack(weight, threads)
        if self._packed.nbytes < _ALONE_BYTES:
            threads = 1
        self._bias = self._by_column(bias)
        self._scale = self._by_column(scale)
        self._scratch = scratch(threads)
        self._table = arguments(
            *(strips_code(weight.dtype), self._packed.data_ptr(), self._scale.data_ptr()),
            *(self._bias.data_ptr(), 0 if bias is None else CACHE_LINE),
            *(in_features // 2, self.out_features),
        )
        self.address = self._table.ctypes.data  # of code, weight, scale, bias, its stride, pairs and columns
        self._call = Call(product_code(), PRODUCT_ARGUMENTS, threads)
        self._call.state.product_room = self._scratch.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows, in_features] bfloat16 → [num_rows, out_features]."""
        x = x.contiguous()
        rows = x.shape[0]
        out = torch.empty((rows, self.out_features), dtype=torch.bfloat16)
        self._call.arguments[:] = x.data_ptr(), out.data_ptr(), self.address
        self._call.state.rows = rows
        self._call(alone=is_alone(rows))
        return out

    def _by_column(self, values: Tensor | None) -> Tensor:
        """In float32, zero beyond the last column; sixteen zeros for None."""
        padded = torch.zeros(LANES if values is None else self._packed.shape[0] * LANES)
        if values is not None:
            padded[: self.out_features] = values
        return padded


def supports(weight: Tensor) -> bool:
    """True if `PackedLinear` takes this weight on this machine."""
    forms = {torch.bfloat16: is_available, torch.int8: _takes_bytes}
    is_one = weight.device.type == "cpu" and weight.dtype in forms and weight.shape[1] % (2 * STEP) == 0
    return is_one and forms[weight.dtype]()


@cache
def is_available() -> bool:
    """True if this processor has the instruction, and no tiles (AMX), which oneDNN knows better."""
    return has_pairs() and "+amx-bf16" not in _features()


def has_pairs() -> bool:
    """True if this processor multiplies pairs of bfloat16."""
    return "+avx512bf16" in _features()


@cache
def _takes_bytes() -> bool:
    """True if it can widen them, too; nobody else reads bytes faster, with tiles or without."""
    return {"+avx512bf16", "+avx512vbmi"} <= _features()


@cache
def _features() -> set[str]:
    """Of the processor that kernels are compiled for; none if that is not this one."""
    overridden = numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None
    return set() if overridden else set(get_host_cpu_features().split(","))


@cache
def scratch(threads: int) -> Tensor:
    """Memory of so many threads while they multiply; one for all products of an engine."""
    return torch.empty(threads * SCRATCH_BYTES, dtype=torch.uint8)


def renew_scratch() -> None:
    """What is made from now on shares none with what was: two engines may compute at the same time."""
    scratch.cache_clear()


def _pack(weight: Tensor, threads: int) -> Tensor:
    """[strips, lines, ...]: a copy in strips; columns that fill the last one up are zero."""
    columns, width = weight.shape
    strips = -(-columns // LANES)
    pair, together = (torch.int32, 1) if weight.dtype == torch.bfloat16 else (torch.int16, 2)
    packed = torch.empty((strips, width // 2 // together, LANES // _QUAD, together, _QUAD), dtype=pair)
    if columns % LANES:
        packed[-1] = 0
    if weight.dtype == torch.int8:
        weight = weight.abs().bitwise_or_(weight & -128)  # the magnitude, and the sign bit
    _interleave(weight.contiguous().view(pair).numpy(), packed.numpy(), threads)
    return packed


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _interleave(rows: Pairs, packed: Pairs, threads: int) -> None:
    """[columns, pairs] → [strips, pairs / n, 4, n, 4], n pairs a line."""
    columns, pairs = rows.shape
    strips, together = packed.shape[0], packed.shape[3]
    for thread in prange(threads):
        for strip in range(strips * thread // threads, strips * (thread + 1) // threads):
            first = strip * LANES
            for pair in range(pairs):
                line, place = pair // together, pair % together
                for column in range(min(LANES, columns - first)):
                    quad, lane = column // _QUAD, column % _QUAD
                    packed[strip, line, quad, place, lane] = rows[first + column, pair]
