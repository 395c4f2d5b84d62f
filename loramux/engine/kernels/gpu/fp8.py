"""Rows in e4m3 with one scale each, in one launch: the input of an fp8 product.

`quantize_rows` of `layers/fp8_linear.py` is the reference.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from loramux.engine.layers.fp8_linear import FP8, FP8_MAX, MIN_SCALE

_CUTS: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))  # the interpreter does not round to e4m3
_MAX: tl.constexpr = tl.constexpr(FP8_MAX)
_MIN_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)
NUMBERS_PER_WARP: Final = 2048  # 64 in each thread's registers
MAX_WARPS: Final = 16


@triton.jit
def _to_nearest(values: tl.tensor) -> tl.tensor:
    """The nearest numbers of e4m3, in float32."""
    bits = values.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    subnormal = (values + 24576.0) - 24576.0  # 1.5 * 2 ** 14: what is left are multiples of 2 ** -9
    return tl.where(tl.abs(values) < 0.015625, subnormal, normal)


@triton.jit
def quantize_rows_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    values = tl.load(x + row * x_row + k, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0) / _MAX, _MIN_SCALE)
    quantized = tl.clamp(tl.div_rn(values, tl.zeros_like(values) + scale), -_MAX, _MAX)
    if _CUTS:
        quantized = _to_nearest(quantized)
    tl.store(out + row * WIDTH + k, quantized.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its scale.

    Args:
        x: [rows, columns], columns consecutive

    Returns:
        The rows in e4m3, and their scales [rows, 1] in float32.
    """
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=FP8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    quantize_rows_kernel[(rows,)](
        x, x.stride(0), out, scales, WIDTH=width, BLOCK=block, num_warps=num_warps(block)
    )
    return out, scales


def num_warps(block: int) -> int:
    """That share a row."""
    return min(max(block // NUMBERS_PER_WARP, 1), MAX_WARPS)
