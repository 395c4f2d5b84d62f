"""Base products and LoRA of prompts on a CPU: both run at the speed of the product's own loop.

    out[t] = round(x[t] · Wᵀ * scale + bias + sum over parts of round(x[t] · A_partᵀ) · B_part)

A and B of an adapter are laid out as the strips of a product, some of k a lane, at the start of each call:
that is little beside a group's tokens. Then all parts' dots are one product, and B continues the base's:
k goes on in the same registers, with the dots for x and the lanes for W.

Like `lora.py` for few rows; the reference is `loramux.engine.kernels.lora.reference_lora`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numba import carray, njit, prange
from torch import Tensor

from loramux.engine.kernels.cpu.intrinsics import CACHE_LINE, Address
from loramux.engine.kernels.cpu.lora_loops import BEGIN, COUNT, FIRST, HEAD, OFFSET, RANK, WIDTH, Ints
from loramux.engine.kernels.cpu.lora_pack import pack_a, pack_b, padded
from loramux.engine.kernels.cpu.product import PackedLinear
from loramux.engine.kernels.cpu.product_strips import (
    NO_LANES,
    PANEL_ROWS,
    SCRATCH_BYTES,
    multiply_strips,
    strips_code,
)
from loramux.engine.kernels.cpu.threads import as_ints
from loramux.engine.kernels.cpu.vector_ir import LANES

LEAST_TOKENS: Final = 128  # of a group; with fewer, `lora.py` is faster
LEAST_PROMPT: Final = 17  # the same of a prompt: slower below some 100 tokens, but rounded once

_ZEROS: Final = np.zeros(LANES, dtype=np.float32)

Room = tuple[Address, Address, Address]  # of a group: A in strips, the dots, B in strips


class LoraPrompts:
    """Groups of at least LEAST_TOKENS tokens of one adapter; the same at every site."""

    __slots__ = ("_groups", "_num_parts", "_room", "_scratch", "_threads")

    def __init__(self, groups: Ints, num_parts: int, scratch: Tensor, threads: int, room: Tensor) -> None:
        """Args:
        groups: [num_groups, 4]: first token, tokens, first lane, lanes; in the order of tokens
        num_parts: the most of any site
        scratch: of so many threads, see `product.scratch`
        room: bytes to work in, resized as needed
        """
        self._groups = groups
        self._num_parts = num_parts
        self._scratch = scratch
        self._threads = threads
        self._room = room

    def multiply(self, linear: PackedLinear, x: Tensor, site: int) -> Tensor:
        """What `linear(x)` yields, with these groups' lanes added.

        Args:
            x: [num_tokens, in_features], contiguous
            site: address of its `site_table`
        """
        rows, in_features = x.shape
        out = torch.empty((rows, linear.out_features), dtype=x.dtype)
        size = _bytes(self._groups, self._num_parts, in_features, linear.out_features)
        if len(self._room) < size:
            self._room.resize_(size)
        places = (self._scratch.data_ptr(), self._room.data_ptr(), _ZEROS.ctypes.data)
        addresses = (x.data_ptr(), out.data_ptr(), rows, linear.address, site)
        _multiply(strips_code(torch.bfloat16), *addresses, self._groups, *places, self._threads)
        return out


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _multiply(
    code: int,
    x: Address,
    out: Address,
    rows: int,
    product: Address,
    site: Address,
    groups: Ints,
    scratch: Address,
    room: Address,
    zeros: Address,
    threads: int,
) -> None:
    """The module's equation; rows of no group get the base product."""
    linear = carray(as_ints(product), 7)
    pairs, columns = linear[5], linear[6]
    head = carray(as_ints(site), HEAD)
    num_parts = head[5]
    lanes = (head[0], head[2], carray(as_ints(site + HEAD * 8), (num_parts, 4)))
    ranks = carray(as_ints(head[3]), (num_parts, head[4]))
    twos = -(-columns // (2 * LANES))
    for thread in prange(threads):
        first, last = twos * thread // threads * 2, min(twos * (thread + 1) // threads * 2, columns // LANES)
        for g in range(len(groups)):
            places = _places(groups, g, num_parts, pairs, columns, room)
            pack_a(*lanes, ranks, groups[g], places[0], pairs, thread, threads)
            pack_b(lanes[2], ranks, groups[g], places[2], first, last)
    for thread in prange(threads):
        for g in range(len(groups)):
            places = _places(groups, g, num_parts, pairs, columns, room)
            width = _width(ranks, groups[g])
            begin = groups[g, COUNT] * thread // threads
            end = groups[g, COUNT] * (thread + 1) // threads
            source = x + (groups[g, BEGIN] + begin) * pairs * 4
            dots = (source, places[1] + begin * width * 2, end - begin, places[0])
            place = (0, zeros, 0, scratch + thread * SCRATCH_BYTES, pairs, width)
            multiply_strips(code, *dots, *place, 0, -(-width // LANES), 0, 0, *NO_LANES)
    for thread in prange(threads):
        first, last = twos * thread // threads * 2, min(twos * (thread + 1) // threads * 2, columns // LANES)
        place = scratch + thread * SCRATCH_BYTES
        own = (linear[1], linear[2], linear[3], linear[4], place, pairs, columns)
        row = 0
        for g in range(len(groups) + 1):
            begin = groups[g, BEGIN] if g < len(groups) else rows
            if begin > row:
                start = (x + row * pairs * 4, out + row * columns * 2, begin - row)
                multiply_strips(linear[0], *start, *own, first, last, 0, 0, *NO_LANES)
            if g < len(groups):
                places = _places(groups, g, num_parts, pairs, columns, room)
                _multiply_group(
                    *(linear[0], x, out, *own, lanes[2], ranks, groups[g], places[1], places[2], first, last)
                )
                row = begin + groups[g, COUNT]


@njit(cache=True, error_model="numpy")
def _multiply_group(
    code: int,
    x: Address,
    out: Address,
    weight: Address,
    scale: Address,
    bias: Address,
    bias_stride: int,
    scratch: Address,
    pairs: int,
    columns: int,
    parts: Ints,
    ranks: Ints,
    group: Ints,
    dots: Address,
    lanes: Address,
    first: int,
    last: int,
) -> None:
    """A group's rows of the strips [first, last)."""
    own = (weight, scale, bias, bias_stride, scratch, pairs, columns)
    width = _width(ranks, group)
    stride = padded(group[RANK], group[RANK]) * LANES * 2  # from one strip of B to the next
    panels = -(-group[COUNT] // PANEL_ROWS)
    for panel in range(panels):
        begin = group[COUNT] * panel // panels
        height = group[COUNT] * (panel + 1) // panels - begin
        row = group[BEGIN] + begin
        source, target = x + row * pairs * 4, out + row * columns * 2
        h = dots + begin * width * 2
        for part in range(len(parts)):
            rank = padded(ranks[part, group[FIRST]], group[RANK])
            left = max(first, parts[part, OFFSET] // LANES)
            right = min(last, (parts[part, OFFSET] + parts[part, WIDTH]) // LANES)
            strips = (code, source, target, height, *own, left, right, 0, 0)
            multiply_strips(*strips, h, width * 2, lanes, stride, rank // 2)
            h += rank * 2


@njit(cache=True, error_model="numpy")
def _places(groups: Ints, index: int, num_parts: int, pairs: int, columns: int, room: Address) -> Room:
    """Where a group's room lies."""
    room += _bytes(groups[:index], num_parts, 2 * pairs, columns)
    rank = padded(groups[index, RANK], groups[index, RANK])
    dots = room + -(-num_parts * rank // LANES) * LANES * pairs * 4
    return room, dots, dots + -(-groups[index, COUNT] * num_parts * rank * 2 // CACHE_LINE) * CACHE_LINE


@njit(cache=True, error_model="numpy")
def _bytes(groups: Ints, num_parts: int, in_features: int, out_features: int) -> int:
    """Of the room of all these groups."""
    total = 0
    for g in range(len(groups)):
        rank = padded(groups[g, RANK], groups[g, RANK])
        total += -(-num_parts * rank // LANES) * LANES * in_features * 2
        total += -(-groups[g, COUNT] * num_parts * rank * 2 // CACHE_LINE) * CACHE_LINE
        total += rank * out_features * 2
    return total


@njit(cache=True, error_model="numpy")
def _width(ranks: Ints, group: Ints) -> int:
    """Dots of a token: all parts' lanes."""
    width = 0
    for part in range(len(ranks)):
        width += padded(ranks[part, group[FIRST]], group[RANK])
    return width
