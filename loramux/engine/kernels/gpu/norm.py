"""Residual addition and RMS norm, in one kernel, with the expand of the product that is added.

    x ← x + delta          out = x / sqrt(mean(x²) + eps) · w

`layers/norm.py` is the reference: each step rounds where its operators round. One program a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.engine.kernels.gpu.expand import add_expand, own_rows, rounded
from loramux.engine.kernels.gpu.lora import expanded
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.kernels.gpu.tiles import tile


@triton.jit(do_not_specialize=["num_tokens"])
def rms_norm_kernel(
    x: tl.tensor,
    delta: tl.tensor,
    delta_row: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    h: tl.tensor,
    h_row: tl.tensor,
    h_plane: tl.tensor,
    b: tl.tensor,
    b_lane: tl.tensor,
    token_lane: tl.tensor,
    token_rank: tl.tensor,
    tiles: tl.tensor,
    num_tokens: tl.tensor,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    ADD: tl.constexpr,
    M: tl.constexpr,
    LORA: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
) -> None:
    """One token; N is WIDTH padded to a power of two."""
    first, end, lane, rank = own_rows(tl.program_id(0), num_tokens, token_lane, token_rank, tiles, M, LORA)
    column = tl.arange(0, N)
    wanted = column < WIDTH
    at = x + first * WIDTH + column
    y = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(delta + first * delta_row + column, mask=wanted, other=0.0).to(tl.float32)
        if LORA:
            added = tl.reshape(
                add_expand(
                    added[None, :], h, h_row, h_plane, b, b_lane, first, end, lane, rank, 0,
                    column, wanted, M, R, PARTS, PLANES,
                ),
                [N],
            )  # fmt: skip
        y = rounded(y + added, x)
        tl.store(at, y.to(x.dtype.element_ty), mask=wanted)
    scale = tl.rsqrt(tl.sum(y * y, axis=0) / WIDTH + eps)
    w = tl.load(weight + column, mask=wanted, other=0.0).to(tl.float32)
    y = rounded(y * scale, x) * w
    tl.store(out + first * WIDTH + column, y.to(out.dtype.element_ty), mask=wanted)


def rms_norm(x: Tensor, delta: SiteOutput | None, weight: Tensor, eps: float) -> Tensor:
    """The norm of x, after delta was added to x in place.

    Args:
        x: [num_tokens, features], contiguous
        weight: [features]
    """
    num_tokens, width = x.shape
    if delta is not None and delta.pending is not None and delta.pending.by_tile:
        delta = expanded(delta)  # a program here has one token
    pending = delta.pending if delta is not None else None
    cut = tile("norm", (width, width), pending.lora.num_lanes if pending else 0, num_tokens)
    padded = triton.next_power_of_2(width)
    source = delta if delta is not None else SiteOutput(x, width)
    launch = source.launch(1, max(1, min(cut.lanes, 32768 // padded)))
    out = torch.empty_like(x)
    rms_norm_kernel[launch.programs,](
        *(x, source.out, source.out.stride(0), out, weight, eps),
        *launch.arguments,
        WIDTH=width,
        N=padded,
        ADD=delta is not None,
        **launch.constants,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    return out
