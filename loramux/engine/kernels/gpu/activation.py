"""What stands between the two products of an MLP, in one kernel: LoRA's expand, act(gate) · up.

`layers/activation.py` is the reference: each step rounds where its operators round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.engine.kernels.gpu.expand import add_expand, own_rows, rounded
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.kernels.gpu.tiles import tile

SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)


@triton.jit
def activated(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """An activation of `families.py` in float32."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    if KIND == "relu":
        return tl.maximum(x, 0.0)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    inner = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh) is a sigmoid of twice the argument


@triton.jit(do_not_specialize=["num_tokens"])
def activation_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    out: tl.tensor,
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
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    M: tl.constexpr,
    LORA: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
) -> None:
    """One tile of tokens, N features of WIDTH."""
    first, end, lane, rank = own_rows(tl.program_id(0), num_tokens, token_lane, token_rank, tiles, M, LORA)
    if first >= end:  # nobody's tile
        return
    rows = first + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    wanted = column < WIDTH
    here = (rows < end)[:, None] & wanted[None, :]
    at = x + rows[:, None] * x_row + column[None, :]
    y = tl.load(at, mask=here, other=0.0).to(tl.float32)
    if LORA:
        y = add_expand(
            y, h, h_row, h_plane, b, b_lane, first, end, lane, rank, 0,
            column, wanted, M, R, PARTS, PLANES,
        )  # fmt: skip
    y = activated(y, KIND)
    if GATED:
        up = tl.load(at + WIDTH, mask=here, other=0.0).to(tl.float32)
        if LORA:
            up = add_expand(
                up, h, h_row, h_plane, b, b_lane, first, end, lane, rank, 1,
                column + WIDTH, wanted, M, R, PARTS, PLANES,
            )  # fmt: skip
        y = rounded(y, x) * up
    tl.store(out + rows[:, None] * WIDTH + column[None, :], y.to(out.dtype.element_ty), mask=here)


def activate(x: SiteOutput, kind: str, *, is_gated: bool) -> Tensor:
    """act(x), or act(gate) · up where the site yields both side by side: [num_tokens, width of one].

    Args:
        kind: silu | relu | gelu | gelu_tanh
    """
    num_tokens, width = x.out.shape[0], x.width // 2 if is_gated else x.width
    num_lanes = x.pending.lora.num_lanes if x.pending else 0
    cut = tile("activation", (width, x.width), num_lanes, num_tokens)
    launch = x.launch(cut.rows, cut.lanes)
    out = torch.empty((num_tokens, width), dtype=x.out.dtype, device=x.out.device)
    activation_kernel[launch.programs, triton.cdiv(width, cut.columns)](
        *(x.out, x.out.stride(0), out),
        *launch.arguments,
        WIDTH=width,
        N=cut.columns,
        KIND=kind,
        GATED=is_gated,
        **launch.constants,
        num_warps=cut.num_warps,
        num_stages=launch.stages(cut.num_stages),
    )
    return out
