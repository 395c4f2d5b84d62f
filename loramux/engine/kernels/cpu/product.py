"""Products with a bfloat16 weight on CPUs that multiply pairs of bfloat16 (AVX512-BF16).

    out[r] = round(x[r] · Wᵀ + bias)

The weight lies in strips of sixteen output columns, [out_features / 16, in_features / 2, 16, 2]: a vector
holds a pair of k for sixteen columns, and a strip is read from its first byte to its last. Each thread
has a range of strips of its own.

- Few rows: a strip at a time with all rows; memory is read as one stream and is the limit.
- More rows: two strips at a time, which stay in the cache while blocks of rows pass; the first blocks ask
  for the next two meanwhile. Rows come in panels and k in chunks, so that this fits the cache.

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

from loramux.engine.kernels.cpu.intrinsics import CACHE_LINE, Address, units
from loramux.engine.kernels.cpu.product_ir import FROM_SUMS, INTO_SUMS, STEP, multiply_tile
from loramux.engine.kernels.cpu.vector_ir import LANES

FEW_ROWS: Final = 16
BLOCK_ROWS: Final = 8
PANEL_ROWS: Final = 128
CHUNK_PAIRS: Final = 2048
_LEAST_BLOCK: Final = 5  # rows of the smallest block of more than FEW_ROWS
_AHEAD: Final = 8192  # bytes that a stream is asked for before it is read
_NEAR: Final = 1024  # the same where it lies in the cache
_ALONE_BYTES: Final = 1 << 17  # a smaller weight is not worth a second thread
SUMS_BYTES: Final = PANEL_ROWS * 2 * LANES * 4  # that a thread keeps between chunks

Pairs = npt.NDArray[np.int32]

_ONE, _TWO = units(1), units(2)
_LEAST, _BLOCK, _FEW = units(_LEAST_BLOCK), units(BLOCK_ROWS), units(FEW_ROWS)
_FETCH = units(STEP)  # a line a pair: as much as one strip reads


class PackedLinear:
    """A weight in strips, and the product with it."""

    __slots__ = ("_bias", "_constants", "_packed", "_sums", "_table", "_threads", "address", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Args:
        weight: [out_features, in_features] bfloat16; a reordered copy is kept
        bias: [out_features]
        """
        assert supports(weight)
        self.out_features, in_features = weight.shape
        self._threads = max(torch.get_num_threads(), 1)
        self._packed = _pack(weight, self._threads)
        if self._packed.nbytes < _ALONE_BYTES:
            self._threads = 1
        self._bias = torch.zeros(LANES if bias is None else self._packed.shape[0] * LANES)
        if bias is not None:
            self._bias[: self.out_features] = bias
        self._sums = _sums(self._threads)
        self._constants = (
            *(self._packed.data_ptr(), self._bias.data_ptr(), 0 if bias is None else CACHE_LINE),
            *(self._sums.data_ptr(), in_features // 2, self.out_features, self._threads),
        )
        self._table = np.array([*self._constants[:3], *self._constants[4:6]], dtype=np.int64)
        self.address = self._table.ctypes.data  # of weight, bias, its stride, pairs and columns

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows, in_features] bfloat16 → [num_rows, out_features]."""
        x = x.contiguous()
        rows = x.shape[0]
        out = torch.empty((rows, self.out_features), dtype=torch.bfloat16)
        multiply(x.data_ptr(), out.data_ptr(), rows, *self._constants)
        return out


def supports(weight: Tensor) -> bool:
    """True if `PackedLinear` takes this weight on this machine."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % (2 * STEP) == 0
        and is_available()
    )


@cache
def is_available() -> bool:
    """True if this processor has the instruction, and no tiles (AMX), which oneDNN knows better."""
    overridden = numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None
    features = set(get_host_cpu_features().split(","))
    return not overridden and "+avx512bf16" in features and "+amx-bf16" not in features


@cache
def _sums(threads: int) -> Tensor:
    return torch.empty(threads * SUMS_BYTES // 4)


def _pack(weight: Tensor, threads: int) -> Tensor:
    """[strips, pairs, 32]: a copy in strips; columns that fill the last one up are zero."""
    columns, width = weight.shape
    strips = -(-columns // LANES)
    packed = torch.empty((strips, width // 2, 2 * LANES), dtype=weight.dtype)
    if columns % LANES:
        packed[-1] = 0
    _interleave(weight.contiguous().view(torch.int32).numpy(), packed.view(torch.int32).numpy(), threads)
    return packed


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _interleave(rows: Pairs, packed: Pairs, threads: int) -> None:
    """[columns, pairs] → [strips, pairs, 16]."""
    columns, pairs = rows.shape
    strips = packed.shape[0]
    for thread in prange(threads):
        for strip in range(strips * thread // threads, strips * (thread + 1) // threads):
            first = strip * LANES
            for pair in range(pairs):
                for column in range(min(LANES, columns - first)):
                    packed[strip, pair, column] = rows[first + column, pair]


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def multiply(
    x: Address,
    out: Address,
    rows: int,
    weight: Address,
    bias: Address,
    bias_stride: int,
    sums: Address,
    pairs: int,
    columns: int,
    threads: int,
) -> None:
    """The module's equation.

    Args:
        x: address of [rows, 2 * pairs] bfloat16; out: address of [rows, columns]
        weight: address of [strips, pairs, 16, 2]
        bias, bias_stride: address of a float32 for each column, and 64; or of sixteen zeros, and 0
        sums: address of memory for `threads` threads
    """
    strips = -(-columns // LANES)
    for thread in prange(threads):
        multiply_strips(
            *(x, out, rows, weight, bias, bias_stride, sums + thread * SUMS_BYTES, pairs, columns),
            *(strips * thread // threads, strips * (thread + 1) // threads),
        )


@njit(cache=True, error_model="numpy")
def multiply_strips(
    x: Address,
    out: Address,
    num_rows: int,
    weight: Address,
    bias: Address,
    bias_stride: int,
    sums: Address,
    pairs: int,
    columns: int,
    first: int,
    last: int,
) -> None:
    """The strips [first, last) of `multiply`."""
    is_few = num_rows <= FEW_ROWS
    panels = 1 if is_few else -(-num_rows // PANEL_ROWS)
    chunks = 1 if is_few else -(-pairs // CHUNK_PAIRS)
    size = -(-pairs // (chunks * STEP)) * STEP  # pairs of a chunk
    at_once = 1 if is_few else 2  # strips
    for panel in range(panels):
        begin = num_rows * panel // panels
        height = num_rows * (panel + 1) // panels - begin
        blocks = 1 if is_few else -(-height // BLOCK_ROWS)
        for strip in range(first, last, at_once):
            for pair in range(0, pairs, size):
                here = weight + (strip * pairs + pair) * CACHE_LINE
                ends = pair + size >= pairs
                following = here + (at_once * pairs - pair if ends else size) * CACHE_LINE
                for block in range(blocks):
                    row = height * block // blocks
                    rows = height * (block + 1) // blocks - row
                    stage = (FROM_SUMS if pair else 0) | (0 if ends else INTO_SUMS)
                    source = x + ((begin + row) * pairs + pair) * 4
                    kept = sums + row * 2 * LANES * 4
                    target = out + ((begin + row) * columns + strip * LANES) * 2
                    if is_few or strip + 1 == last:
                        multiply_tile(
                            *(_ONE, _FEW, _ONE, _FETCH, rows, source, pairs * 4, here, 0),
                            *(min(size, pairs - pair), here + _AHEAD, kept, stage),
                            *(bias + strip * bias_stride, bias_stride),
                            *(target, columns * 2, columns - strip * LANES),
                        )
                    else:
                        ahead = following + block * pairs * CACHE_LINE if block < 2 else here + _NEAR
                        multiply_tile(
                            *(
                                _LEAST,
                                _BLOCK,
                                _TWO,
                                _FETCH,
                                rows,
                                source,
                                pairs * 4,
                                here,
                                pairs * CACHE_LINE,
                            ),
                            *(min(size, pairs - pair), ahead, kept, stage),
                            *(bias + strip * bias_stride, bias_stride),
                            *(target, columns * 2, columns - strip * LANES),
                        )
