"""Paged causal attention in Triton: one program an item (see attention_input.py) and KV head.

    out[i] = softmax(cap(q[i] · K[lo:pos+1]ᵀ · scale)) · V[lo:pos+1]        cap(s) = c · tanh(s / c)

The query heads that share a KV head are rows of one tile, so that each key is read once for all of
them. The softmax is online, in base 2 and fp32. Keys that some row of the tile must not see lie at the
ends of its range: only there scores are masked, in loops of their own (`MASK_ALL`: everywhere, for
tiles so short that one loop is faster).

A tile whose keys are split leaves its parts in scratch, and the program that ends last adds them up
in their order, so equal steps give equal bits. Its counter is zero again afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from loramux.engine.kernels.gpu import attention_input as columns

# Under the interpreter tl.dot of bfloat16 operands is silently wrong: they are widened first.
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))
MASKED: tl.constexpr = tl.constexpr(-1.0e30)  # a score that must not count
LOWEST: tl.constexpr = tl.constexpr(-1.0e20)  # below every score and far above MASKED: exp2 of that is 0
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

_BLOCK_START: tl.constexpr = tl.constexpr(columns.BLOCK_START)
_FIRST_TOKEN: tl.constexpr = tl.constexpr(columns.FIRST_TOKEN)
_NUM_TOKENS: tl.constexpr = tl.constexpr(columns.NUM_TOKENS)
_POSITION: tl.constexpr = tl.constexpr(columns.POSITION)
_KEY_BEGIN: tl.constexpr = tl.constexpr(columns.KEY_BEGIN)
_KEY_END: tl.constexpr = tl.constexpr(columns.KEY_END)
_FIRST_ITEM: tl.constexpr = tl.constexpr(columns.FIRST_ITEM)
_NUM_PARTS: tl.constexpr = tl.constexpr(columns.NUM_PARTS)
_NUM_COLUMNS: tl.constexpr = tl.constexpr(columns.NUM_COLUMNS)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(cache: tl.tensor, at: tl.tensor, wanted: tl.tensor, IS_MASKED: tl.constexpr) -> tl.tensor:
    if IS_MASKED:
        return tl.load(cache + at, mask=wanted, other=0.0)
    return tl.load(cache + at)


@triton.jit
def _attend_keys(
    q: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    position: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    blocks: tl.tensor,
    head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """A step of the online softmax for every BLOCK_N keys; `top` is the largest score so far."""
    columns = tl.arange(0, acc.shape[1])
    is_padded: tl.constexpr = acc.shape[1] != HEAD_DIM
    is_widened: tl.constexpr = v_cache.dtype.element_ty != q.dtype
    factor: tl.constexpr = LOG2_E if SOFT_CAP > 0 else SCALE * LOG2_E
    keys = begin + tl.arange(0, BLOCK_N)
    block = tl.load(blocks + keys // BLOCK_SIZE, mask=keys < end, other=0)
    for _ in tl.range(begin, end, BLOCK_N):
        row = (block.to(tl.int64) * NUM_KV_HEADS + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        at = row[:, None] * HEAD_DIM + columns[None, :]
        # A step ahead: were a key's address read in the step that needs it, keys could not be fetched ahead.
        block = tl.load(blocks + (keys + BLOCK_N) // BLOCK_SIZE, mask=keys + BLOCK_N < end, other=0)
        inside = (columns < HEAD_DIM)[None, :]
        k = _load(k_cache, at, inside, is_padded).to(q.dtype)
        # What lies behind the last key may be anything, also not a number. 8-bit values are cleared once
        # they are widened: under a mask they would be fetched in pieces of 8 bytes.
        if is_widened or not IS_MASKED:
            v = _load(v_cache, at, inside, is_padded).to(q.dtype)
        else:
            v = tl.load(v_cache + at, mask=(keys < end)[:, None] & inside, other=0.0)
        if is_widened and IS_MASKED:
            v = tl.where((keys < end)[:, None], v, 0.0)
        scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if SOFT_CAP > 0:  # c · tanh(x) = c - 2c / (e²ˣ + 1)
            doubled = tl.exp2(scores * (2 * LOG2_E * SCALE / SOFT_CAP))
            scores = SOFT_CAP - 2 * SOFT_CAP / (doubled + 1)
        if IS_MASKED:
            seen = (keys[None, :] <= position[:, None]) & (keys < end)[None, :]
            if WINDOW > 0:
                seen = seen & (keys[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, MASKED)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores * factor - (new_top * factor)[:, None])
        fade = tl.exp2((top - new_top) * factor)
        total = total * fade + tl.sum(weights, 1)
        acc = _dot(weights.to(q.dtype), v, acc * fade[:, None])
        top = new_top
        keys += BLOCK_N
    return acc, top, total


@triton.jit
def _leave_part(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    part_out: tl.tensor,
    part_stats: tl.tensor,
    part: tl.tensor,
    is_row: tl.tensor,
    counter: tl.tensor,
) -> tl.tensor:
    """Write a part to the scratch; returns how many of its tile's others were there before."""
    rows, columns = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    slot = (part * acc.shape[0] + rows).to(tl.int64)
    tl.store(part_out + slot[:, None] * acc.shape[1] + columns[None, :], acc, mask=is_row[:, None])
    tl.store(part_stats + slot * 2, top, mask=is_row)
    tl.store(part_stats + slot * 2 + 1, total, mask=is_row)
    tl.debug_barrier()  # every thread's share is written before the part counts as there
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _add_parts(
    part_out: tl.tensor,
    part_stats: tl.tensor,
    first_part: tl.tensor,
    num_parts: tl.tensor,
    head: tl.tensor,
    is_row: tl.tensor,
    FACTOR: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The parts of a tile, added up in their order: the sum of the values and that of the weights."""
    rows, columns = tl.arange(0, is_row.shape[0]), tl.arange(0, DIM)
    acc = tl.zeros([is_row.shape[0], DIM], tl.float32)
    top = tl.full([is_row.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([is_row.shape[0]], tl.float32)
    for start in tl.range(0, num_parts, UNROLL):
        for ahead in tl.static_range(UNROLL):
            part = start + ahead
            live = is_row & (part < num_parts)
            slot = (((first_part + part) * NUM_KV_HEADS + head) * is_row.shape[0] + rows).to(tl.int64)
            at = slot[:, None] * DIM + columns[None, :]
            # Written by other programs of this launch: not from a multiprocessor's own cache.
            part_top = tl.load(part_stats + slot * 2, mask=live, other=LOWEST, cache_modifier=".cg")
            part_total = tl.load(part_stats + slot * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
            part_acc = tl.load(part_out + at, mask=live[:, None], other=0.0, cache_modifier=".cg")
            new_top = tl.maximum(top, part_top)
            fade, part_fade = tl.exp2((top - new_top) * FACTOR), tl.exp2((part_top - new_top) * FACTOR)
            acc = acc * fade[:, None] + part_acc * part_fade[:, None]
            total = total * fade + part_total * part_fade
            top = new_top
    return acc, total


@triton.jit
def attend_items(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    items: tl.tensor,
    block_ids: tl.tensor,
    part_out: tl.tensor,
    part_stats: tl.tensor,
    counters: tl.tensor,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_ALL: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """One item and KV head: grid (num_kv_heads, num_items). SOFT_CAP, WINDOW: 0 = none."""
    head, item_id = tl.program_id(0), tl.program_id(1)
    item = items + item_id * _NUM_COLUMNS
    num_parts = tl.load(item + _NUM_PARTS)
    if num_parts == 0:
        return
    first_token, num_tokens = tl.load(item + _FIRST_TOKEN), tl.load(item + _NUM_TOKENS)
    first_position = tl.load(item + _POSITION)
    begin, end = tl.load(item + _KEY_BEGIN), tl.load(item + _KEY_END)
    blocks = block_ids + tl.load(item + _BLOCK_START)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    is_row = rows < num_tokens * GROUP
    at = ((first_token + rows // GROUP) * NUM_KV_HEADS + head) * GROUP + rows % GROUP
    at = at[:, None] * HEAD_DIM + columns[None, :]
    wanted = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    tile = tl.load(q + at, mask=wanted, other=0.0)
    if k_cache.dtype.element_ty == tl.float8e4nv and tile.dtype == tl.bfloat16:
        tile = tile.to(tl.float16)  # 8-bit values become float16 in one instruction, bfloat16 in three
    acc, top, total = _attend_range(
        tile, first_position, num_tokens,
        k_cache, v_cache, blocks, head, begin, end, SCALE, SOFT_CAP, WINDOW,
        NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, BLOCK_N, MASK_ALL,
    )  # fmt: skip
    if num_parts > 1:
        first_item = tl.load(item + _FIRST_ITEM)
        counter = counters + first_item * NUM_KV_HEADS + head
        part = item_id * NUM_KV_HEADS + head
        if _leave_part(acc, top, total, part_out, part_stats, part, is_row, counter) < num_parts - 1:
            return
        tl.store(counter, 0)
        factor: tl.constexpr = LOG2_E if SOFT_CAP > 0 else SCALE * LOG2_E
        acc, total = _add_parts(
            part_out, part_stats, first_item, num_parts, head, is_row, factor, NUM_KV_HEADS, DIM, UNROLL
        )
    total = tl.where(is_row, total, 1.0)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _attend_range(
    q: tl.tensor,
    first_position: tl.tensor,
    num_tokens: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    blocks: tl.tensor,
    head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_ALL: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """An item's keys: those before the window of its last token, those that all see, and the rest."""
    acc = tl.zeros(q.shape, tl.float32)
    top = tl.full([q.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    position = first_position + tl.arange(0, q.shape[0]) // GROUP
    middle = begin
    if not MASK_ALL:
        if WINDOW > 0:
            middle = tl.cdiv(tl.maximum(first_position + num_tokens - WINDOW, begin), BLOCK_N) * BLOCK_N
            middle = tl.minimum(middle, end)
            acc, top, total = _attend_keys(
                q, acc, top, total, position, k_cache, v_cache, blocks, head, begin, middle,
                SCALE, SOFT_CAP, WINDOW, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, True,
            )  # fmt: skip
        begin = middle
        middle = tl.maximum(
            tl.minimum((first_position + 1) // BLOCK_N * BLOCK_N, end // BLOCK_N * BLOCK_N), begin
        )
        acc, top, total = _attend_keys(
            q, acc, top, total, position, k_cache, v_cache, blocks, head, begin, middle,
            SCALE, SOFT_CAP, WINDOW, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, False,
        )  # fmt: skip
    acc, top, total = _attend_keys(
        q, acc, top, total, position, k_cache, v_cache, blocks, head, middle, end,
        SCALE, SOFT_CAP, WINDOW, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, True,
    )  # fmt: skip
    return acc, top, total
