"""LoRA for decode rows on a CPU: each token reads exactly its own adapter's lanes, at true rank.

    out[t, part] += sum over lanes l of t's adapter of (x[t] · A[l, part]) * B_part[l]

One call does all parts of a site for all tokens. The reference is
`loramux.engine.kernels.lora.reference_lora`. Sums are float32 and rounded once, at the end. The lanes
are read eight at a time, so that a token's input and output are touched once for all eight.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from loramux.engine.kernels.cpu.intrinsics import (
    Address,
    Dtype,
    add_row,
    add_weighted_rows,
    dot_rows,
    item_size,
    units,
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

GROUP: Final = 8  # lanes at a time
_EIGHT: Final = units(GROUP)
_ONE: Final = units(1)


def row_scratch(widest: int) -> Floats:
    """[num_threads, ...] zeros for rows of sites whose widest part has so many features."""
    return np.zeros((max(torch.get_num_threads(), 1), GROUP + widest), dtype=np.float32)


@njit(cache=True, error_model="numpy")
def add_lora_rows(
    dtype: Dtype,
    x: Address,
    out: Address,
    a: Address,
    b: Ints,
    offsets: Ints,
    in_features: int,
    rows: Ints,
    first: Ints,
    rank: Ints,
    scratch: Floats,
    begin: int,
    end: int,
) -> None:
    """The module's equation, in place on `out`, for rows [begin, end) of the list.

    Args:
        dtype: of x, out, A and B (`BFLOAT16` or `FLOAT32`)
        x: address of [num_tokens, in_features]; out: address of [num_tokens, offsets[-1]]
        a: address of [num_lanes, num_parts, in_features]
        b: addresses of each part's [num_lanes, width], int64
        offsets: where each part starts in `out`, and the end, int64
        rows, first, rank: for each token with an adapter: its row, its first lane, its number of lanes
        scratch: one row of `row_scratch`; zeros again afterwards
    """
    item = item_size(dtype)
    num_parts = len(b)
    out_features = offsets[num_parts]
    stride = num_parts * in_features
    shrunk = scratch.ctypes.data
    total = shrunk + GROUP * 4
    for i in range(begin, end):
        token = x + rows[i] * in_features * item
        target = out + rows[i] * out_features * item
        for part in range(num_parts):
            width = offsets[part + 1] - offsets[part]
            lane_a = a + (first[i] * num_parts + part) * in_features * item
            lane_b = b[part] + first[i] * width * item
            lane = 0
            while lane + GROUP <= rank[i]:
                dot_rows(dtype, _EIGHT, in_features, token, lane_a + lane * stride * item, stride, shrunk)
                add_weighted_rows(dtype, _EIGHT, width, shrunk, lane_b + lane * width * item, total)
                lane += GROUP
            while lane < rank[i]:
                dot_rows(dtype, _ONE, in_features, token, lane_a + lane * stride * item, stride, shrunk)
                add_weighted_rows(dtype, _ONE, width, shrunk, lane_b + lane * width * item, total)
                lane += 1
            add_row(dtype, width, total, target + offsets[part] * item)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def add_lora_rows_parallel(
    dtype: Dtype,
    x: Address,
    out: Address,
    a: Address,
    b: Ints,
    offsets: Ints,
    in_features: int,
    rows: Ints,
    first: Ints,
    rank: Ints,
    scratch: Floats,
    bounds: Ints,
) -> None:
    """`add_lora_rows` in several threads; `scratch` has one row for each."""
    for i in prange(len(bounds) - 1):
        add_lora_rows(
            dtype,
            x,
            out,
            a,
            b,
            offsets,
            in_features,
            rows,
            first,
            rank,
            scratch[i],
            bounds[i],
            bounds[i + 1],
        )
