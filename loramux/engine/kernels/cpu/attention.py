"""Paged attention on a CPU, a tile of rows and one KV head at a time.

    out[i] = softmax(q[i] · K[lo:end]ᵀ · scale) · V[lo:end]      lo = max(0, end - window)

A tile is one token that decodes, or several consecutive tokens of a prompt, each with all query heads
that share the KV head: its rows. Blocks are read where they lie, once a tile; nothing is gathered. All
scores of a tile are kept, so the softmax needs one pass. `attention_ir.py` holds the inner loops and the
layout of the cache.

The reference is `loramux.engine.kernels.attention.reference_attention`. Measured with figures of the whole
step in benchmarks/LOG.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from loramux.engine.kernels.cpu.attention_ir import score_rows, softmax_row, sum_values
from loramux.engine.kernels.cpu.intrinsics import (
    BLOCK,
    Address,
    Dtype,
    Size,
    copy_row,
    item_size,
    prefetch_block,
    units,
)
from loramux.engine.kernels.cpu.vector_ir import LANES

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Parts = tuple[int, int, int, int, int]  # of scratch

NEVER = np.float32(-1e30)  # a score that exp turns into zero; not -inf, whose difference is NaN
ROWS = 24  # of a prompt's tile: enough to use each key and value that was read many times
_REGISTERS = 24  # vectors that hold sums; eight are left for what is multiplied


@dataclass(frozen=True, slots=True)
class Tile:
    """How many rows the kernels take at once, as `units`: each combination is compiled on its own."""

    tokens: int  # at most
    rows: Size  # tokens * group, rounded up
    score_rows: Size  # divides rows
    score_blocks: Size
    value_rows: Size  # divides rows


def tile_of(group: int, vectors: int, *, is_prompt: bool) -> Tile:
    """The tile for a model's shape.

    Args:
        group: query heads a KV head
        vectors: head_dim / 16
    """
    tokens = max(1, ROWS // group) if is_prompt else 1
    used = tokens * group
    most = max(1, _REGISTERS // vectors)
    value_rows = -(-used // -(-used // most))
    rows = -(-used // value_rows) * value_rows
    score_rows = max(n for n in range(1, 13) if rows % n == 0)
    blocks = min(_REGISTERS // score_rows, 8 if score_rows < 3 else 4)
    return Tile(tokens, units(rows), units(score_rows), units(blocks), units(value_rows))


def scratch_size(tile: Tile, head_dim: int, longest: int) -> int:
    """Floats that a thread needs for tables of `longest` blocks."""
    width: int = _row_width(longest, len(tile.score_blocks))
    return len(tile.rows) * (2 * head_dim + 2 * width + 1)


@njit(cache=True, error_model="numpy")
def _row_width(num_blocks: int, step: int) -> int:
    """Floats from one row of scores to the next: not a power of two, so that rows share no cache set."""
    width: int = (-(-num_blocks // step) * step + 1) * BLOCK
    return width


@njit(cache=True, error_model="numpy")
def attend_range(
    dtype: Dtype,
    vectors: Size,
    rows: Size,
    score_size: Size,
    score_blocks: Size,
    value_size: Size,
    group: int,
    q: Address,
    q_bytes: int,
    k: Address,
    v: Address,
    out: Address,
    block_ids: Ints,
    tiles: Ints,
    window: int,
    scale: float,
    kv_heads: int,
    scratch: Floats,
    begin: int,
    end: int,
) -> None:
    """Work items [begin, end) of num_tiles * kv_heads; item i is tile i // kv_heads, head i % kv_heads.

    Args:
        dtype: of q, k, v and out (`BFLOAT16` or `FLOAT32`)
        vectors: head_dim / 16, as `units`; rows and the three sizes: of the `Tile`
        group: query heads a KV head
        q: address of [num_tokens, kv_heads * group, head_dim]; q_bytes: from one token to the next
        k, v: addresses of the caches; out: of [num_tokens, kv_heads * group * head_dim]
        block_ids: block tables, one behind the other, int64
        tiles: [num_tiles, 4]: where its table starts in block_ids (tiles may share one), position after
            its first token, the first token's row of q, number of tokens
        window: sliding window in tokens, 0 for full attention
        scratch: float32, of `scratch_size`
    """
    num_rows, head_dim = len(rows), len(vectors) * LANES
    row_bytes = head_dim * item_size(dtype)
    sizes = (vectors, rows, score_size, score_blocks)
    for work in range(begin, end):
        head = work % kv_heads
        start, after, token, count = tiles[work // kv_heads]
        skipped = (max(0, after - window) if window else 0) // BLOCK  # blocks before the window
        num_blocks = (after + count - 1 + BLOCK - 1) // BLOCK - skipped
        table = block_ids[start + skipped : start + skipped + num_blocks]
        at = (token * kv_heads + head) * group * row_bytes
        parts = _parts(num_rows, head_dim, _row_width(num_blocks, len(score_blocks)))
        first = q + token * q_bytes + head * group * row_bytes
        _take_queries(dtype, num_rows, head_dim, group, count, first, q_bytes, scratch)
        _score(dtype, sizes, k, v, table, kv_heads, head, scratch, parts)
        _weigh(dtype, group, count, window, after, skipped, num_blocks, scale, scratch, parts)
        _sum(dtype, vectors, rows, value_size, v, table, kv_heads, head, scratch, parts)
        _give(dtype, count * group, head_dim, group, kv_heads * group * row_bytes, out + at, scratch, parts)


@njit(cache=True, error_model="numpy")
def _parts(num_rows: int, head_dim: int, width: int) -> Parts:
    """Where scratch holds sums, factors, scores and probabilities; the queries come first."""
    sums = num_rows * head_dim
    inverse = 2 * sums
    scores = inverse + num_rows
    return sums, inverse, scores, scores + num_rows * width, width


@njit(cache=True, error_model="numpy")
def _take_queries(
    dtype: Dtype,
    num_rows: int,
    head_dim: int,
    group: int,
    count: int,
    q: Address,
    q_bytes: int,
    scratch: Floats,
) -> None:
    """A tile's queries, one behind the other; rows beyond its tokens repeat the last one."""
    row_bytes = head_dim * item_size(dtype)
    for row in range(num_rows):
        source = q + min(row // group, count - 1) * q_bytes + row % group * row_bytes
        copy_row(dtype, dtype, head_dim, source, scratch.ctypes.data + row * row_bytes, np.float32(1))


@njit(cache=True, error_model="numpy")
def _give(
    dtype: Dtype,
    used: int,
    head_dim: int,
    group: int,
    out_bytes: int,
    out: Address,
    scratch: Floats,
    parts: Parts,
) -> None:
    """The sums, each row times its factor, rounded."""
    sums, inverse = parts[0], parts[1]
    for row in range(used):
        source = scratch.ctypes.data + (sums + row * head_dim) * 4
        target = out + row // group * out_bytes + row % group * head_dim * item_size(dtype)
        copy_row(np.float32(0), dtype, head_dim, source, target, scratch[inverse + row])


@njit(cache=True, error_model="numpy")
def _score(
    dtype: Dtype,
    sizes: tuple[Size, Size, Size, Size],
    k: Address,
    v: Address,
    table: Ints,
    kv_heads: int,
    head: int,
    scratch: Floats,
    parts: Parts,
) -> None:
    """Scores of every block; what is read next is asked for meanwhile."""
    vectors, rows, score_size, score_blocks = sizes
    head_dim, step, width = len(vectors) * LANES, len(score_blocks), parts[4]
    row_bytes = head_dim * item_size(dtype)
    stride, offset = kv_heads * BLOCK * row_bytes, head * BLOCK * row_bytes
    queries = scratch.ctypes.data
    target = queries + parts[2] * 4
    ids = np.empty(8, dtype=np.int64)
    last = len(table) - 1
    for i in range(0, len(table), step):
        for b in range(step):
            ids[b] = table[min(i + b, last)]
            if len(rows) < ROWS:  # of a prompt's blocks all but the newest are in the cache
                prefetch_block(dtype, vectors, k + offset + table[min(i + step + b, last)] * stride)
                prefetch_block(dtype, vectors, v + offset + ids[b] * stride)
        for row in range(0, len(rows), len(score_size)):
            source, at = queries + row * row_bytes, target + (row * width + i * BLOCK) * 4
            score_rows(
                *(dtype, score_size, score_blocks, vectors),
                *(source, k + offset, stride, ids.ctypes.data, at, width * 4),
            )


@njit(cache=True, error_model="numpy")
def _weigh(
    dtype: Dtype,
    group: int,
    count: int,
    window: int,
    after: int,
    skipped: int,
    num_blocks: int,
    scale: float,
    scratch: Floats,
    parts: Parts,
) -> None:
    """Scores become probabilities, each row within what its token sees."""
    for row in range(count * group):
        last = after + row // group
        low = max(0, last - window) if window else 0
        low, high = low - skipped * BLOCK, last - skipped * BLOCK
        scratch[parts[1] + row] = _softmax(dtype, scratch, row, parts, num_blocks, low, high, scale)


@njit(cache=True, error_model="numpy")
def _softmax(
    dtype: Dtype,
    scratch: Floats,
    row: int,
    parts: Parts,
    num_blocks: int,
    low: int,
    high: int,
    scale: float,
) -> float:
    """Scores of one row become exp(score - best), zero outside [low, high); returns 1 / their sum."""
    width = parts[4]
    scores = parts[2] + row * width
    begin, end = low // BLOCK * BLOCK, (high + BLOCK - 1) // BLOCK * BLOCK
    for t in range(begin, low):
        scratch[scores + t] = NEVER
    for t in range(high, end):
        scratch[scores + t] = NEVER
    item = item_size(dtype)
    target = parts[3] + row * width * item // 4
    scratch[target : target + begin * item // 4] = 0
    scratch[target + end * item // 4 : target + num_blocks * BLOCK * item // 4] = 0
    base = scratch.ctypes.data
    inverse: float = softmax_row(
        dtype, end - begin, base + (scores + begin) * 4, base + target * 4 + begin * item, scale
    )
    return inverse


@njit(cache=True, error_model="numpy")
def _sum(
    dtype: Dtype,
    vectors: Size,
    rows: Size,
    value_size: Size,
    v: Address,
    table: Ints,
    kv_heads: int,
    head: int,
    scratch: Floats,
    parts: Parts,
) -> None:
    sums, probs, width = parts[0], parts[3], parts[4]
    head_dim, item = len(vectors) * LANES, item_size(dtype)
    block_bytes = head_dim * BLOCK * item
    base = scratch.ctypes.data
    for row in range(0, len(rows), len(value_size)):
        sum_values(
            dtype,
            value_size,
            vectors,
            base + probs * 4 + row * width * item,
            width * item,
            v + head * block_bytes,
            kv_heads * block_bytes,
            table.ctypes.data,
            len(table),
            base + (sums + row * head_dim) * 4,
        )
