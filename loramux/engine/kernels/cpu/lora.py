"""LoRA for decode rows on a CPU: each token reads exactly its own adapter's lanes, at true rank.

    out[t, part] += sum over lanes l of t's adapter of (x[t] · A[l, part]) * B_part[l]

One call does all parts of a site for all tokens. The reference is
`loramux.engine.kernels.lora.reference_lora`. Sums are float32 and rounded once, at the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from loramux.engine.kernels.cpu.intrinsics import Address, Dtype, add_weighted_rows, dot_row, item_size

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


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
) -> None:
    """The module's equation, in place on `out`.

    Args:
        dtype: of x, out, A and B (`BFLOAT16` or `FLOAT32`)
        x: address of [num_tokens, in_features]; out: address of [num_tokens, offsets[-1]]
        a: address of [num_lanes, num_parts, in_features]
        b: addresses of each part's [num_lanes, width], int64
        offsets: where each part starts in `out`, and the end, int64
        rows, first, rank: for each token with an adapter: its row, its first lane, its number of lanes
        scratch: float32, at least the largest rank
    """
    item = item_size(dtype)
    num_parts = len(b)
    out_features = offsets[num_parts]
    shrunk = scratch.ctypes.data
    for i in range(len(rows)):
        token = x + rows[i] * in_features * item
        target = out + rows[i] * out_features * item
        for part in range(num_parts):
            for lane in range(rank[i]):
                weight = a + ((first[i] + lane) * num_parts + part) * in_features * item
                scratch[lane] = dot_row(dtype, in_features, token, weight)
            width = offsets[part + 1] - offsets[part]
            lanes = b[part] + first[i] * width * item
            add_weighted_rows(dtype, width, rank[i], shrunk, lanes, target + offsets[part] * item)
