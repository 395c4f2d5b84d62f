"""The strips of a bfloat16 product that one thread computes, as code that others call by its address.

The code of all tiles takes seconds to compile, and compiled functions that call each other are compiled anew
with each caller: by its address, it is compiled once for each form of the weight. `product.py` says how
weights lie in memory and how they are read.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from loramux.engine.kernels.cpu.intrinsics import BFLOAT16, CACHE_LINE, INT8, Address, item_size, units
from loramux.engine.kernels.cpu.product_ir import FROM_SUMS, INTO_SUMS, STEP, WIDENED, multiply_tile
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
_SUMS_BYTES: Final = PANEL_ROWS * 2 * LANES * 4  # that a thread keeps between chunks
_WIDE_BYTES: Final = CHUNK_PAIRS * 2 * CACHE_LINE  # two strips of a chunk in bfloat16
SCRATCH_BYTES: Final = _SUMS_BYTES + _WIDE_BYTES  # of a thread

Form = np.uint16 | np.int8  # BFLOAT16 | INT8
NO_LANES: Final = (0, 0, 0, 0, 0)  # the last arguments of `multiply_strips`, without any

_ONE, _TWO = units(1), units(2)
_LEAST, _BLOCK, _FEW = units(_LEAST_BLOCK), units(BLOCK_ROWS), units(FEW_ROWS)
_NUM_ARGUMENTS: Final = 19


@cache
def _load(weight: torch.dtype) -> Any:
    signature = types.void(types.CPointer(types.int64))
    function = {torch.bfloat16: _of_bfloat16, torch.int8: _of_int8}[weight]
    return cfunc(signature, cache=True, error_model="numpy")(function)


def strips_code(weight: torch.dtype) -> int:
    """Address of the code for weights of this form, for `multiply_strips`; it stays loaded."""
    address: int = _load(weight).address
    return address


def _of_bfloat16(arguments: Any) -> None:
    _multiply_strips(BFLOAT16, *to_fixed_tuple(carray(arguments, _NUM_ARGUMENTS), _NUM_ARGUMENTS))


def _of_int8(arguments: Any) -> None:
    _multiply_strips(INT8, *to_fixed_tuple(carray(arguments, _NUM_ARGUMENTS), _NUM_ARGUMENTS))


@intrinsic
def multiply_strips(
    typing: Any,
    code: Any,
    x: Any,
    out: Any,
    num_rows: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    bias_stride: Any,
    scratch: Any,
    pairs: Any,
    columns: Any,
    first: Any,
    last: Any,
    spare: Any,
    spare_end: Any,
    dots: Any,
    dots_stride: Any,
    lanes: Any,
    lanes_stride: Any,
    rank: Any,
) -> tuple[Any, Any]:
    """The strips [first, last) of a product; meanwhile ask for [spare, spare_end), read next.

    Args:
        code: `strips_code` of the weight
        x: address of [num_rows, 2 * pairs] bfloat16; out: address of [num_rows, columns]
        weight: address of the strips
        scale: address of a float32 for each column, if the form has one
        bias, bias_stride: address of a float32 for each column, and 64; or of sixteen zeros, and 0
        scratch: address of SCRATCH_BYTES
        dots, dots_stride: of all rows, in bytes, with which k goes on
        lanes, lanes_stride: of all strips, in bytes
        rank: pairs of lanes; 0 without any
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        room = cgutils.alloca_once(builder, word, _NUM_ARGUMENTS)
        for index, value in enumerate(args[1:]):
            builder.store(value, builder.gep(room, [ir.Constant(word, index)]))
        kind = ir.FunctionType(ir.VoidType(), [word.as_pointer()]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [room])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (1 + _NUM_ARGUMENTS)), codegen


@njit(cache=True, error_model="numpy")
def _multiply_strips(
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
    dots: Address,
    dots_stride: int,
    lanes: Address,
    lanes_stride: int,
    rank: int,
) -> None:
    """What `multiply_strips` says."""
    is_few = num_rows <= (FEW_ROWS if item_size(form) == 2 else FEW_BYTE_ROWS)
    panels, chunks = -(-num_rows // PANEL_ROWS), 1 if is_few else -(-pairs // CHUNK_PAIRS)
    size = -(-pairs // (chunks * STEP)) * STEP  # pairs of a chunk
    at_once = 1 if is_few else 2  # strips
    pair_bytes, strip_bytes = 2 * LANES * item_size(form), pairs * 2 * LANES * item_size(form)
    lines = pair_bytes * STEP // CACHE_LINE  # of a strip, for STEP pairs
    for panel in range(panels):
        begin = num_rows * panel // panels
        height = num_rows * (panel + 1) // panels - begin
        blocks = 1 if is_few else -(-height // BLOCK_ROWS)
        for strip in range(first, last, at_once):
            scales, biases = scale + strip * CACHE_LINE, bias + strip * bias_stride
            b = lanes + strip * lanes_stride
            for pair in range(0, pairs, size):
                here = weight + (strip * pairs + pair) * pair_bytes
                ends, count = pair + size >= pairs, min(size, pairs - pair)
                following = here + (at_once * pairs - pair if ends else size) * pair_bytes
                part = (FROM_SUMS if pair else 0) | (0 if ends else INTO_SUMS)
                for block in range(blocks):
                    row = height * block // blocks
                    rows = height * (block + 1) // blocks - row
                    stage = part | (WIDENED if block else 0)
                    source = x + ((begin + row) * pairs + pair) * 4
                    target = out + ((begin + row) * columns + strip * LANES) * 2
                    place = (scratch, scratch + _WIDE_BYTES + row * 2 * LANES * 4, stage, scales, biases)
                    then = (dots + (begin + row) * dots_stride, dots_stride, b, lanes_stride, rank)
                    goal = (bias_stride, target, columns * 2, columns - strip * LANES, then)
                    tile = (rows, source, pairs * 4, here, strip_bytes, count)
                    if is_few or strip + 1 == last:
                        asked = (here + _AHEAD, here + _AHEAD + (lines - 1) * CACHE_LINE, _NO_LIMIT)
                        multiply_tile(form, _ONE, _FEW, _ONE, *tile, *asked, *place, *goal)
                    else:
                        share = count // STEP * CACHE_LINE
                        whole = (block, blocks, lines, share, here, following, strip_bytes)
                        asked = _asked(*whole, spare, spare_end)
                        spare += share if asked[1] == spare else 0
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
