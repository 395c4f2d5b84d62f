"""Shrink and expand as kernels of their own, where a site's plan does not fuse them.

    shrink   h[t, l] = x[t] · A[l]                 l over the lanes of t's adapter, all parts
    expand   y[t, part] += Σ h[t, l] · B_part[l]

The shrink works on tiles, or parts of them, at the adapter's true rank. Lanes of all parts of one
adapter are consecutive rows of A, so parts need no care there. With few tiles its input features are
split into planes of float32, each written by one program, which the expand adds up in order: no
atomics, hence the same bits for the same batch. `kernels/lora.py` is the reference of both.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.engine.kernels.gpu.expand import INTERPRETED, add_expand, own_rows
from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.kernels.gpu.tiles import tile
from loramux.engine.kernels.lora import SiteLanes


@triton.jit
def shrink_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    a: tl.tensor,
    h: tl.tensor,
    h_row: tl.tensor,
    h_plane: tl.tensor,
    tiles: tl.tensor,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    J: tl.constexpr,
) -> None:
    """M rows of a tile, one range of input features, every so many J rows of A."""
    tile_id = tl.program_id(0) // (TILE // M)
    first, end, lane, rank = own_rows(tile_id, 0, tiles, tiles, tiles, TILE, True)
    first += tl.program_id(0) % (TILE // M) * M
    if first >= end:
        return
    plane = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(WIDTH, K), PLANES) * K
    low = plane * share
    high = tl.minimum(low + share, WIDTH)
    rows = first + tl.arange(0, M)
    live = (rows < end)[:, None]
    for begin in range(tl.program_id(1) * J, rank * PARTS, tl.num_programs(1) * J):
        own = begin + tl.arange(0, J)
        of_adapter = own < rank * PARTS
        y = tl.zeros((M, J), dtype=tl.float32)
        for start in range(low, high, K):
            k = start + tl.arange(0, K)
            inside = k < high
            at_x = x + rows[:, None] * x_row + k[None, :]
            at_a = a + (lane * PARTS + own)[None, :] * WIDTH + k[:, None]
            x_block = tl.load(at_x, mask=live & inside[None, :], other=0.0)
            a_block = tl.load(at_a, mask=inside[:, None] & of_adapter[None, :], other=0.0)
            if INTERPRETED:
                y = tl.dot(x_block.to(tl.float32), a_block.to(tl.float32), y, input_precision="ieee")
            else:
                y = tl.dot(x_block, a_block, y, input_precision="ieee")
        at_h = h + plane * h_plane + rows[:, None] * h_row + (lane * PARTS + own)[None, :]
        tl.store(at_h, y.to(h.dtype.element_ty), mask=live & of_adapter[None, :])


def shrink(x: Tensor, site: SiteLanes, lora: GpuLoraInput, planes: int) -> Tensor:
    """[planes, num_tokens, num_lanes * parts]; written where a token's own lanes are, nowhere else.

    Args:
        x: [num_tokens, in_features]
        planes: 1, or ranges of input features computed at the same time; then the result is float32
    """
    num_parts, in_features = site.a.shape[1:]
    cut = tile("shrink", (in_features, site.offsets[-1]), lora.num_lanes, x.shape[0])
    shape = (planes, x.shape[0], lora.num_lanes * num_parts)
    h = torch.empty(shape, dtype=x.dtype if planes == 1 else torch.float32, device=x.device)
    rows = min(cut.rows, lora.tile_rows)
    shrink_kernel[lora.tiles.shape[0] * (lora.tile_rows // rows), cut.columns, planes](
        *(x, x.stride(0), site.a, h, h.stride(1), h.stride(0), lora.tiles),
        WIDTH=in_features,
        K=cut.features,
        PARTS=num_parts,
        PLANES=planes,
        M=rows,
        TILE=lora.tile_rows,
        J=cut.lanes,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    return h


@triton.jit(do_not_specialize=["num_tokens"])
def expand_kernel(
    y: tl.tensor,
    y_row: tl.tensor,
    h: tl.tensor,
    h_row: tl.tensor,
    h_plane: tl.tensor,
    b: tl.tensor,
    b_lane: tl.tensor,
    token_lane: tl.tensor,
    token_rank: tl.tensor,
    tiles: tl.tensor,
    num_tokens: tl.tensor,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    LORA: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
) -> None:
    """One tile, N features of one part; W0, W1, W2 are the widths of the parts, 0 where there is none."""
    first, end, lane, rank = own_rows(tl.program_id(0), num_tokens, token_lane, token_rank, tiles, M, LORA)
    block = tl.program_id(1)
    after_0: tl.constexpr = (W0 + N - 1) // N
    after_1: tl.constexpr = after_0 + (W1 + N - 1) // N
    part = (block >= after_0).to(tl.int32) + (block >= after_1).to(tl.int32)
    start = tl.where(part == 0, 0, tl.where(part == 1, W0, W0 + W1))
    width = tl.where(part == 0, W0, tl.where(part == 1, W1, W2))
    block -= tl.where(part == 0, 0, tl.where(part == 1, after_0, after_1))
    if rank > 0:
        rows = first + tl.arange(0, M)
        own = block * N + tl.arange(0, N)
        here = (rows < end)[:, None] & (own < width)[None, :]
        at = y + rows[:, None] * y_row + (start + own)[None, :]
        total = tl.load(at, mask=here, other=0.0).to(tl.float32)
        total = add_expand(
            total, h, h_row, h_plane, b, b_lane, first, end, lane, rank, part,
            start + own, own < width, M, R, PARTS, PLANES,
        )  # fmt: skip
        tl.store(at, total.to(y.dtype.element_ty), mask=here)


def expanded(site_output: SiteOutput) -> SiteOutput:
    """The same with what was pending added, in place."""
    pending, out = site_output.pending, site_output.out
    if pending is None:
        return site_output
    offsets = pending.site.offsets
    widths = [end - begin for begin, end in pairwise(offsets)]
    shape = (pending.site.a.shape[2], site_output.width)
    cut = tile("expand", shape, pending.lora.num_lanes, out.shape[0])
    launch = site_output.launch(1, cut.lanes)
    w0, w1, w2 = [*widths, 0, 0][:3]
    expand_kernel[launch.programs, sum(triton.cdiv(width, cut.columns) for width in widths)](
        *(out, out.stride(0)),
        *launch.arguments,
        W0=w0,
        W1=w1,
        W2=w2,
        N=cut.columns,
        **launch.constants,
        num_warps=cut.num_warps,
        num_stages=launch.stages(cut.num_stages),
    )
    return SiteOutput(out, site_output.width)
