"""From the qkv product to attention, in one kernel: LoRA's expand, head norms, RoPE, and the KV cache.

A program computes the rows of one tile and one head. Every step rounds where the operators of
`TorchAttention.store` round, which is this kernel's reference. Rotation pairs (i, i + head_dim / 2) and
cos, sin come per token, so every form of `layers/rotary.py` is served.

The cache is [num_blocks, num_kv_heads, block_size, head_dim]; as float8_e4m3fn it is scaled by 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.engine.kernels.attention import Angles, KVCache
from loramux.engine.kernels.gpu.expand import add_expand, own_rows, rounded
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.kernels.gpu.tiles import tile
from loramux.engine.layers.norm import RMSNorm

FP8_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def _write(cache: tl.tensor, at: tl.tensor, x: tl.tensor, wanted: tl.tensor) -> None:
    if cache.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)
    tl.store(cache + at, x.to(cache.dtype.element_ty), mask=wanted)


@triton.jit
def _normed(
    left: tl.tensor,
    right: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    is_q: tl.tensor,
    like: tl.tensor,
    eps: tl.tensor,
    i: tl.tensor,
    D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMS norm of a head, given as its halves."""
    mean = (tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)) / D
    scale = tl.rsqrt(mean + eps)[:, None]
    inside = i < D // 2
    j = i + D // 2
    w = tl.where(is_q, tl.load(q_norm + i, mask=inside), tl.load(k_norm + i, mask=inside)).to(tl.float32)
    left = rounded(rounded(left * scale, like) * w[None, :], like)
    w = tl.where(is_q, tl.load(q_norm + j, mask=inside), tl.load(k_norm + j, mask=inside)).to(tl.float32)
    right = rounded(rounded(right * scale, like) * w[None, :], like)
    return left, right


@triton.jit(do_not_specialize=["num_tokens"])
def store_qkv_kernel(
    qkv: tl.tensor, qkv_row: tl.tensor, q_out: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor,
    slots: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor, eps: tl.tensor,
    h: tl.tensor, h_row: tl.tensor, h_plane: tl.tensor, b: tl.tensor, b_lane: tl.tensor,
    token_lane: tl.tensor, token_rank: tl.tensor, tiles: tl.tensor, num_tokens: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROPE: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr, LORA: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, PLANES: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of tokens, one head of q, k or v; HALF is head_dim / 2, padded to a power of two."""
    first, end, lane, rank = own_rows(tl.program_id(0), num_tokens, token_lane, token_rank, tiles, M, LORA)
    if first >= end:  # nobody's tile
        return
    head = tl.program_id(1)
    rows = first + tl.arange(0, M)
    i = tl.arange(0, HALF)
    here = (rows < end)[:, None] & (i < D // 2)[None, :]
    at = qkv + rows[:, None] * qkv_row + (head * D + i)[None, :]
    left = tl.load(at, mask=here, other=0.0).to(tl.float32)
    right = tl.load(at + D // 2, mask=here, other=0.0).to(tl.float32)
    if LORA:
        part = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
        column = head * D + i
        left = add_expand(
            left, h, h_row, h_plane, b, b_lane, first, end, lane, rank, part,
            column, i < D // 2, M, R, PARTS, PLANES,
        )  # fmt: skip
        right = add_expand(
            right, h, h_row, h_plane, b, b_lane, first, end, lane, rank, part,
            column + D // 2, i < D // 2, M, R, PARTS, PLANES,
        )  # fmt: skip
    if head < HEADS + KV_HEADS:
        if NORM:
            left, right = _normed(left, right, q_norm, k_norm, head < HEADS, qkv, eps, i, D)
        if ROPE:
            angle = rows[:, None] * D + i[None, :]  # both halves of a row are the same
            c = tl.load(cos + angle, mask=here, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)
            turned = rounded(left * c, qkv) - rounded(right * s, qkv)
            right = rounded(right * c, qkv) + rounded(left * s, qkv)
            left = turned
    if head < HEADS:
        at_q = (rows[:, None] * HEADS + head) * D + i[None, :]
        tl.store(q_out + at_q, left.to(q_out.dtype.element_ty), mask=here)
        tl.store(q_out + at_q + D // 2, right.to(q_out.dtype.element_ty), mask=here)
    else:
        slot = tl.load(slots + rows, mask=rows < end, other=-1)
        wanted = here & (slot >= 0)[:, None]
        kv_head = (head - HEADS) % KV_HEADS
        row = ((slot // BLOCK).to(tl.int64) * KV_HEADS + kv_head) * BLOCK + slot % BLOCK
        at_cache = row[:, None] * D + i[None, :]
        if head < HEADS + KV_HEADS:
            _write(k_cache, at_cache, rounded(left, qkv), wanted)
            _write(k_cache, at_cache + D // 2, rounded(right, qkv), wanted)
        else:
            _write(v_cache, at_cache, left, wanted)
            _write(v_cache, at_cache + D // 2, right, wanted)


def store_qkv(
    qkv: SiteOutput,
    angles: Angles | None,
    norms: tuple[RMSNorm, RMSNorm] | None,
    cache: KVCache,
    slots: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """As `TorchAttention.store`, with LoRA's expand.

    Args:
        qkv: of (num_heads + 2 * num_kv_heads) * head_dim features
        slots: [num_tokens] int32: block * block_size + offset; -1 = padding, which writes nothing

    Returns:
        q, [num_tokens, num_heads, head_dim]
    """
    num_kv_heads, block_size, head_dim = cache.k.shape[1:]
    out, num_tokens = qkv.out, qkv.out.shape[0]
    num_lanes = qkv.pending.lora.num_lanes if qkv.pending else 0
    cut = tile("qkv", (head_dim, qkv.width), num_lanes, num_tokens)
    launch = qkv.launch(cut.rows, cut.lanes)
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=out.dtype, device=out.device)
    cos, sin = (out, out) if angles is None else angles
    q_norm, k_norm, eps = (
        (out, out, 0.0) if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
    )
    store_qkv_kernel[launch.programs, num_heads + 2 * num_kv_heads](
        *(out, out.stride(0), q, cache.k, cache.v, slots, cos, sin, q_norm, k_norm, eps),
        *launch.arguments,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        D=head_dim,
        HALF=max(16, triton.next_power_of_2(head_dim // 2)),
        BLOCK=block_size,
        ROPE=angles is not None,
        NORM=norms is not None,
        **launch.constants,
        num_warps=cut.num_warps,
        num_stages=launch.stages(cut.num_stages),
    )
    return q
