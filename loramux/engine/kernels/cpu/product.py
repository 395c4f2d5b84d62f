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

from loramux.engine.kernels.cpu.intrinsics import BFLOAT16, CACHE_LINE, INT8, Address, item_size, units
from loramux.engine.kernels.cpu.product_ir import FROM_SUMS, INTO_SUMS, STEP, WIDENED, multiply_tile
from loramux.engine.kernels.cpu.threads import is_alone
from loramux.engine.kernels.cpu.vector_ir import LANES

FEW_ROWS: Final = 16
FEW_BYTE_ROWS: Final = 12  # the same for int8, which one strip at a time would widen for all rows anew
BLOCK_ROWS: Final = 8
PANEL_ROWS: Final = 128
CHUNK_PAIRS: Final = 2048
_LEAST_BLOCK: Final = 5  # rows of the smallest block of more than FEW_ROWS
_AHEAD: Final = 8192  # bytes that a stream is asked for before it is read
_NO_LIMIT: Final = 1 << 62  # to addresses that are asked for
_NEAR: Final = 1024  # the same where it lies in the cache
_ALONE_BYTES: Final = 1 << 17  # a smaller weight is not worth a second thread
_SUMS_BYTES: Final = PANEL_ROWS * 2 * LANES * 4  # that a thread keeps between chunks
_WIDE_BYTES: Final = CHUNK_PAIRS * 2 * CACHE_LINE  # two strips of a chunk in bfloat16
SCRATCH_BYTES: Final = _SUMS_BYTES + _WIDE_BYTES  # of a thread
_QUAD: Final = 4  # columns

Pairs = npt.NDArray[np.int32 | np.int16]
Form = np.uint16 | np.int8  # BFLOAT16 | INT8
More = tuple[Address, int, Address, int, int]  # dots of all rows and lanes of all strips, see `multiply_tile`
NO_LANES: Final[More] = (0, 0, 0, 0, 0)

_ONE, _TWO = units(1), units(2)
_LEAST, _BLOCK, _FEW = units(_LEAST_BLOCK), units(BLOCK_ROWS), units(FEW_ROWS)


class PackedLinear:
    """A weight in strips, and the product with it."""

    __slots__ = (
        *("_alone", "_bias", "_constants", "_form", "_packed", "_scale", "_scratch", "_table", "_threads"),
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
        self._form: Form = BFLOAT16 if scale is None else INT8
        self._threads = max(torch.get_num_threads(), 1)
        self._packed = _pack(weight, self._threads)
        if self._packed.nbytes < _ALONE_BYTES:
            self._threads = 1
        self._bias = self._by_column(bias)
        self._scale = self._by_column(scale)
        self._scratch = scratch(self._threads)
        self._constants = (
            *(self._packed.data_ptr(), self._scale.data_ptr()),
            *(self._bias.data_ptr(), 0 if bias is None else CACHE_LINE),
            *(self._scratch.data_ptr(), in_features // 2, self.out_features, self._threads),
        )
        self._alone = (*self._constants[:-1], 1)
        self._table = np.array([*self._constants[:4], *self._constants[5:7]], dtype=np.int64)
        self.address = self._table.ctypes.data  # of weight, scale, bias, its stride, pairs and columns

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows, in_features] bfloat16 → [num_rows, out_features]."""
        x = x.contiguous()
        rows = x.shape[0]
        out = torch.empty((rows, self.out_features), dtype=torch.bfloat16)
        constants = self._alone if is_alone(rows) else self._constants
        multiply(self._form, x.data_ptr(), out.data_ptr(), rows, *constants)
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


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def multiply(
    form: Form,
    x: Address,
    out: Address,
    rows: int,
    weight: Address,
    scale: Address,
    bias: Address,
    bias_stride: int,
    scratch: Address,
    pairs: int,
    columns: int,
    threads: int,
) -> None:
    """The module's equation.

    Args:
        form: of the weight
        x: address of [rows, 2 * pairs] bfloat16; out: address of [rows, columns]
        weight: address of the strips
        scale: address of a float32 for each column, if the form has one
        bias, bias_stride: address of a float32 for each column, and 64; or of sixteen zeros, and 0
        scratch: address of memory for `threads` threads
    """
    strips = -(-columns // LANES)
    if threads == 1:  # the others are not even woken
        multiply_strips(
            *(form, x, out, rows, weight, scale, bias, bias_stride, scratch),
            *(pairs, columns, 0, strips, 0, 0, NO_LANES),
        )
        return
    for thread in prange(threads):
        multiply_strips(
            *(form, x, out, rows, weight, scale, bias, bias_stride, scratch + thread * SCRATCH_BYTES),
            *(pairs, columns, strips * thread // threads, strips * (thread + 1) // threads, 0, 0),
            NO_LANES,
        )


@njit(cache=True, error_model="numpy")
def multiply_strips(
    form: Form,
    x: Address,
    out: Address,
    num_rows: int,
    weight: Address,
    scale: Address,
    bias: Address,
    bias_stride: int,
    scratch: Address,
    pairs: int,
    columns: int,
    first: int,
    last: int,
    spare: Address,
    spare_end: Address,
    more: More,
) -> None:
    """The strips [first, last) of `multiply`; meanwhile ask for [spare, spare_end), which is read next."""
    dots, dots_stride, lanes, lanes_stride, rank = more
    is_few = num_rows <= (FEW_ROWS if item_size(form) == 2 else FEW_BYTE_ROWS)
    panels = 1 if is_few else -(-num_rows // PANEL_ROWS)
    chunks = 1 if is_few else -(-pairs // CHUNK_PAIRS)
    size = -(-pairs // (chunks * STEP)) * STEP  # pairs of a chunk
    at_once = 1 if is_few else 2  # strips
    pair_bytes = 2 * LANES * item_size(form)  # of a strip
    lines = pair_bytes * STEP // CACHE_LINE  # of a strip, for STEP pairs
    for panel in range(panels):
        begin = num_rows * panel // panels
        height = num_rows * (panel + 1) // panels - begin
        blocks = 1 if is_few else -(-height // BLOCK_ROWS)
        for strip in range(first, last, at_once):
            scales, biases = scale + strip * CACHE_LINE, bias + strip * bias_stride
            for pair in range(0, pairs, size):
                here = weight + (strip * pairs + pair) * pair_bytes
                ends, count = pair + size >= pairs, min(size, pairs - pair)
                following = here + (at_once * pairs - pair if ends else size) * pair_bytes
                for block in range(blocks):
                    row = height * block // blocks
                    rows = height * (block + 1) // blocks - row
                    stage = (
                        (FROM_SUMS if pair else 0) | (0 if ends else INTO_SUMS) | (WIDENED if block else 0)
                    )
                    source = x + ((begin + row) * pairs + pair) * 4
                    target = out + ((begin + row) * columns + strip * LANES) * 2
                    place = (scratch, scratch + _WIDE_BYTES + row * 2 * LANES * 4, stage, scales, biases)
                    h, b = dots + (begin + row) * dots_stride, lanes + strip * lanes_stride
                    then = (h, dots_stride, b, lanes_stride, rank)
                    goal = (bias_stride, target, columns * 2, columns - strip * LANES, then)
                    if is_few or strip + 1 == last:
                        asked = (here + _AHEAD, here + _AHEAD + (lines - 1) * CACHE_LINE, _NO_LIMIT)
                        tile = (rows, source, pairs * 4, here, 0, count)
                        multiply_tile(form, _ONE, _FEW, _ONE, *tile, *asked, *place, *goal)
                    else:
                        share, next_strip = count // STEP * CACHE_LINE, pairs * pair_bytes
                        whole = (block, blocks, lines, share, here, following, next_strip)
                        asked = _asked(*whole, spare, spare_end)
                        spare += share if asked[1] == spare else 0
                        tile = (rows, source, pairs * 4, here, next_strip, count)
                        multiply_tile(form, _LEAST, _BLOCK, _TWO, *tile, *asked, *place, *goal)


@njit(cache=True, error_model="numpy")
def _asked(
    block: int,
    blocks: int,
    lines: int,
    share: int,
    here: Address,
    following: Address,
    strip_bytes: int,
    spare: Address,
    spare_end: Address,
) -> tuple[Address, Address, Address]:
    """The two streams that a block asks for, and the second one's end, as for `multiply_tile`.

    Args:
        lines: how many blocks share one of the two strips that are next
        share: bytes of a stream
        here, following: addresses of the present and of the next strips
        strip_bytes: from one of these to the other
    """
    ahead, other, other_last = here + _NEAR, here + _NEAR, _NO_LIMIT
    if block < 2 * lines:
        ahead = following + block // lines * strip_bytes + block % lines * share
    if block == 0 and blocks < 2 * lines:  # there is a block too few
        other = following + strip_bytes + share
    elif spare < spare_end:
        other, other_last = spare, spare_end - CACHE_LINE
    return ahead, other, other_last
