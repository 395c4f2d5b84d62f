"""Row-wise steps of a layer on a CPU: normalise, rotate and store keys, gate. Each is one pass.

The plain-torch forms stand in `loramux.engine.layers` (norm, rotary) and `models/decoder.py`; these
do the same arithmetic with the same roundings, without a dispatch and a temporary for every operator.
Addresses are `Tensor.data_ptr()`; shapes and contiguity are the callers' promise. Each kernel does rows
[begin, end); its `_parallel` form splits them at `bounds` between threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from loramux.engine.kernels.cpu.attention_ir import store_key, store_value
from loramux.engine.kernels.cpu.intrinsics import (
    BLOCK,
    Address,
    Dtype,
    Size,
    item_size,
    rotate_row,
    scale_row,
    silu_mul_row,
    sum_of_squares,
)
from loramux.engine.kernels.cpu.vector_ir import LANES

Ints = npt.NDArray[np.int64]


@njit(cache=True, error_model="numpy")
def rms_norm(
    dtype: Dtype,
    x: Address,
    delta: Address,
    weight: Address,
    out: Address,
    width: int,
    eps: float,
    begin: int,
    end: int,
) -> None:
    """x += delta (unless delta is 0); out = x / sqrt(mean(x²) + eps) * weight, a row at a time.

    Args:
        x, delta, out: addresses of [num_rows, width]
        weight: address of [width]
    """
    row_bytes = width * item_size(dtype)
    for row in range(begin, end):
        offset = row * row_bytes
        step = delta + offset if delta else 0
        squares = sum_of_squares(dtype, width, x + offset, step)
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + np.float32(eps))
        scale_row(dtype, width, x + offset, weight, out + offset, scale)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def rms_norm_parallel(
    dtype: Dtype,
    x: Address,
    delta: Address,
    weight: Address,
    out: Address,
    width: int,
    eps: float,
    bounds: Ints,
) -> None:
    """`rms_norm` in several threads."""
    for i in prange(len(bounds) - 1):
        rms_norm(dtype, x, delta, weight, out, width, eps, bounds[i], bounds[i + 1])


@njit(cache=True, error_model="numpy")
def rotate_and_store(
    dtype: Dtype,
    qkv: Address,
    cos: Address,
    sin: Address,
    q_weight: Address,
    k_weight: Address,
    eps: float,
    k_cache: Address,
    v_cache: Address,
    slots: Ints,
    heads: int,
    kv_heads: int,
    vectors: Size,
    begin: int,
    end: int,
) -> None:
    """Per token: RMS-normalise the heads of q and k (if weights are given), rotate them in place, and
    write k and v into the cache.

    Args:
        qkv: address of [num_tokens, heads + 2 * kv_heads, head_dim]; q and k are changed
        cos, sin: addresses of [num_tokens, head_dim], or 0 for no rotation
        q_weight, k_weight: addresses of [head_dim], or 0 for no norm
        k_cache, v_cache: addresses of [num_blocks, kv_heads, head_dim / word, 16, word] and [num_blocks,
            kv_heads, 16 / word, head_dim, word], `word` elements of 32 bits
        slots: [num_tokens] int64, block * 16 + offset of each token
        vectors: head_dim / 16, as `units`
    """
    head_dim = len(vectors) * LANES
    head_bytes = head_dim * item_size(dtype)
    row_bytes = (heads + 2 * kv_heads) * head_bytes
    word = 4 // item_size(dtype)  # elements of 32 bits
    for token in range(begin, end):
        row = qkv + token * row_bytes
        angle = token * head_bytes
        for h in range(heads + kv_heads):
            x = row + h * head_bytes
            weight = q_weight if h < heads else k_weight
            if weight:
                squares = sum_of_squares(dtype, head_dim, x, 0)
                scale = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + np.float32(eps))
                scale_row(dtype, head_dim, x, weight, x, scale)
            if cos:
                rotate_row(dtype, head_dim // 2, x, cos + angle, sin + angle, x)
        block, offset = slots[token] // BLOCK, slots[token] % BLOCK
        for h in range(kv_heads):
            base = (block * kv_heads + h) * BLOCK * head_bytes
            key = row + (heads + h) * head_bytes
            store_key(dtype, vectors, key, k_cache + base + offset * 4)
            line = v_cache + base + offset // word * word * head_bytes
            store_value(dtype, vectors, key + kv_heads * head_bytes, line, offset % word)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def rotate_and_store_parallel(
    dtype: Dtype,
    qkv: Address,
    cos: Address,
    sin: Address,
    q_weight: Address,
    k_weight: Address,
    eps: float,
    k_cache: Address,
    v_cache: Address,
    slots: Ints,
    heads: int,
    kv_heads: int,
    vectors: Size,
    bounds: Ints,
) -> None:
    """`rotate_and_store` in several threads."""
    for i in prange(len(bounds) - 1):
        rotate_and_store(
            dtype,
            qkv,
            cos,
            sin,
            q_weight,
            k_weight,
            eps,
            k_cache,
            v_cache,
            slots,
            heads,
            kv_heads,
            vectors,
            bounds[i],
            bounds[i + 1],
        )


@njit(cache=True, error_model="numpy")
def silu_mul(dtype: Dtype, gate_up: Address, out: Address, width: int, begin: int, end: int) -> None:
    """out = silu(gate) * up, a row at a time.

    Args:
        gate_up: address of [num_rows, 2 * width]
        out: address of [num_rows, width]
    """
    row_bytes = width * item_size(dtype)
    for row in range(begin, end):
        gate = gate_up + 2 * row * row_bytes
        silu_mul_row(dtype, width, gate, gate + row_bytes, out + row * row_bytes)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def silu_mul_parallel(dtype: Dtype, gate_up: Address, out: Address, width: int, bounds: Ints) -> None:
    """`silu_mul` in several threads."""
    for i in prange(len(bounds) - 1):
        silu_mul(dtype, gate_up, out, width, bounds[i], bounds[i + 1])
