"""Paged attention on a CPU, one row (a token) and KV head at a time.

    out[i] = softmax(q[i] · K[lo:end]ᵀ · scale) · V[lo:end]      lo = max(0, end - window)

Keys are stored with the head dimension before the token, [num_blocks, num_kv_heads, head_dim, 16]:
the scores of a block are then one vector a query head, without a sum across lanes. Blocks are read
where they lie, each once, for all query heads that share the KV head; nothing is gathered or padded.

The reference is `loramux.engine.kernels.attention.reference_attention`. Measured on one core of a
Zen 5 machine (group 3, head_dim 64, context 192): 4.6 µs a sequence, 31 GB/s, where gathering and
`bmm` take 350 µs; nearly all of the latter is starting and waking threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from loramux.engine.kernels.cpu.intrinsics import (
    BLOCK,
    Address,
    Dtype,
    Size,
    attend_scores,
    attend_values,
    copy_row,
    exp_in_place,
    item_size,
    prefetch_block,
    vector_max,
)
from loramux.engine.kernels.cpu.vector_ir import LANES

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NEVER = np.float32(-1e30)  # a score that exp turns into zero; not -inf, whose difference is NaN


@njit(cache=True, error_model="numpy")
def attend_range(
    dtype: Dtype,
    group: Size,
    vectors: Size,
    q: Address,
    k: Address,
    v: Address,
    out: Address,
    block_ids: Ints,
    starts: Ints,
    ends: Ints,
    tokens: Ints,
    window: int,
    scale: float,
    kv_heads: int,
    scratch: Floats,
    begin: int,
    end: int,
) -> None:
    """Work items [begin, end) of num_rows * kv_heads; item i is row i // kv_heads, head i % kv_heads.

    Args:
        dtype: of q, k, v and out (`BFLOAT16` or `FLOAT32`)
        group, vectors: query heads a KV head, head_dim / 16, both as `units`
        q, out: addresses of [num_tokens, kv_heads * group, head_dim]
        k: address of [num_blocks, kv_heads, head_dim, 16]; v: [num_blocks, kv_heads, 16, head_dim]
        block_ids: block tables, one behind the other, int64
        starts: where each row's table starts in block_ids; rows may share one
        ends: position after each row's token
        tokens: which row of q it is
        window: sliding window in tokens, 0 for full attention
        scratch: float32, 2 * group * head_dim + group * 16 * (longest table): queries, sums, scores
    """
    heads, head_dim = len(group), len(vectors) * LANES
    row_bytes = heads * head_dim * item_size(dtype)
    scores = 2 * heads * head_dim  # where they start in scratch
    for work in range(begin, end):
        seq, head = work // kv_heads, work % kv_heads
        first = max(0, ends[seq] - window) if window else 0
        skipped = first // BLOCK  # blocks before the window
        num_blocks = (ends[seq] + BLOCK - 1) // BLOCK - skipped
        table = block_ids[starts[seq] + skipped : starts[seq] + skipped + num_blocks]
        row = (tokens[seq] * kv_heads + head) * row_bytes
        _take_queries(dtype, heads, head_dim, q + row, scratch, scale)
        _score(dtype, group, vectors, k, v, table, kv_heads, head, scratch)
        _hide(scratch, scores, heads, num_blocks, first - skipped * BLOCK, ends[seq] - skipped * BLOCK)
        _normalise(scratch, scores, heads, num_blocks)
        _sum_values(dtype, group, vectors, v, table, kv_heads, head, scratch)
        _give(dtype, heads, head_dim, out + row, scratch)


@njit(cache=True, error_model="numpy")
def _take_queries(dtype: Dtype, heads: int, head_dim: int, q: Address, scratch: Floats, scale: float) -> None:
    """Queries as [head_dim, heads], so that the heads of one d lie side by side."""
    sums = scratch.ctypes.data + heads * head_dim * 4
    copy_row(dtype, np.float32(0), heads * head_dim, q, sums, scale)
    for g in range(heads):
        for d in range(head_dim):
            scratch[d * heads + g] = scratch[(heads + g) * head_dim + d]


@njit(cache=True, error_model="numpy")
def _score(
    dtype: Dtype,
    group: Size,
    vectors: Size,
    k: Address,
    v: Address,
    table: Ints,
    kv_heads: int,
    head: int,
    scratch: Floats,
) -> None:
    """Scores of every block; what is read next is asked for meanwhile."""
    heads, head_dim = len(group), len(vectors) * LANES
    block_bytes = head_dim * BLOCK * item_size(dtype)
    queries = scratch.ctypes.data
    scores = queries + 2 * heads * head_dim * 4
    last = len(table) - 1
    for i in range(len(table)):
        block = (table[i] * kv_heads + head) * block_bytes
        prefetch_block(dtype, vectors, k + (table[min(i + 1, last)] * kv_heads + head) * block_bytes)
        prefetch_block(dtype, vectors, v + block)
        attend_scores(dtype, group, vectors, queries, k + block, scores + i * heads * BLOCK * 4)


@njit(cache=True, error_model="numpy")
def _hide(scratch: Floats, scores: int, heads: int, num_blocks: int, low: int, high: int) -> None:
    """Scores of tokens before `low` and from `high` on become NEVER."""
    for g in range(heads):
        for t in range(low):
            scratch[scores + g * BLOCK + t] = NEVER
        for t in range(high - (num_blocks - 1) * BLOCK, BLOCK):
            scratch[scores + ((num_blocks - 1) * heads + g) * BLOCK + t] = NEVER


@njit(cache=True, error_model="numpy")
def _normalise(scratch: Floats, scores: int, heads: int, num_blocks: int) -> None:
    """Scores become exp(score - best); 1 / their sum goes where the queries were, one a head."""
    base = scratch.ctypes.data + scores * 4
    for g in range(heads):
        best = NEVER
        for i in range(num_blocks):
            best = max(best, vector_max(base + (i * heads + g) * BLOCK * 4))
        total = np.float32(0)
        for i in range(num_blocks):
            total += exp_in_place(base + (i * heads + g) * BLOCK * 4, best)
        scratch[g] = np.float32(1) / total


@njit(cache=True, error_model="numpy")
def _sum_values(
    dtype: Dtype,
    group: Size,
    vectors: Size,
    v: Address,
    table: Ints,
    kv_heads: int,
    head: int,
    scratch: Floats,
) -> None:
    heads, head_dim = len(group), len(vectors) * LANES
    block_bytes = head_dim * BLOCK * item_size(dtype)
    sums = scratch.ctypes.data + heads * head_dim * 4
    scores = sums + heads * head_dim * 4
    scratch[heads * head_dim : 2 * heads * head_dim] = 0
    for i in range(len(table)):
        block = (table[i] * kv_heads + head) * block_bytes
        attend_values(dtype, group, vectors, scores + i * heads * BLOCK * 4, v + block, sums)


@njit(cache=True, error_model="numpy")
def _give(dtype: Dtype, heads: int, head_dim: int, out: Address, scratch: Floats) -> None:
    """The sums, each head times its factor, rounded."""
    sums = scratch.ctypes.data + heads * head_dim * 4
    for g in range(heads):
        target = out + g * head_dim * item_size(dtype)
        copy_row(np.float32(0), dtype, head_dim, sums + g * head_dim * 4, target, scratch[g])


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def attend_parallel(
    dtype: Dtype,
    group: Size,
    vectors: Size,
    q: Address,
    k: Address,
    v: Address,
    out: Address,
    block_ids: Ints,
    starts: Ints,
    ends: Ints,
    tokens: Ints,
    window: int,
    scale: float,
    kv_heads: int,
    scratch: Floats,
    bounds: Ints,
) -> None:
    """`attend_range` in several threads; thread i does items [bounds[i], bounds[i + 1])."""
    for i in prange(len(bounds) - 1):
        attend_range(
            dtype,
            group,
            vectors,
            q,
            k,
            v,
            out,
            block_ids,
            starts,
            ends,
            tokens,
            window,
            scale,
            kv_heads,
            scratch[i],
            bounds[i],
            bounds[i + 1],
        )
