"""Linear layers in fp8: W8A8 in e4m3, one scale an output channel and one a token.

    y[t, n] = (x8[t] · w8[n]) * x_scale[t] * w_scale[n] + b[n]

where x8 and w8 are rows divided by their scale, which maps the row's largest magnitude to the largest
number of e4m3. Weights are quantised once, when they are loaded; activations in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

import torch
from torch import Tensor

from loramux.engine.errors import InvalidConfig

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = torch.finfo(FP8).max  # 448
MIN_SCALE: Final = 1e-12  # of a row of zeros
SIZE_MULTIPLE: Final = 16  # of a product's rows and columns
MIN_CAPABILITY: Final = (8, 9)  # of an NVIDIA GPU with e4m3 arithmetic
QuantizeRows = Callable[[Tensor], tuple[Tensor, Tensor]]  # see `quantize_rows`


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its scale.

    Args:
        x: [rows, columns]

    Returns:
        The rows in e4m3, and their scales [rows, 1] in float32.
    """
    scale = x.abs().amax(dim=1, keepdim=True).float().div_(FP8_MAX).clamp_(min=MIN_SCALE)
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


class Fp8Linear:
    """y = x · Wᵀ + b with an fp8 weight; bfloat16 in and out."""

    __slots__ = ("_bias", "_quantize", "_weight", "_weight_scale")

    can_hold_lanes: ClassVar[bool] = False  # an adapter's bfloat16 rows have no place behind an fp8 weight

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, quantize: QuantizeRows = quantize_rows
    ) -> None:
        """Args:
        weight: [out_features, in_features] bfloat16, both multiples of 16
        bias: [out_features] bfloat16
        quantize: how activations are quantised on this device

        Raises:
            InvalidConfig: the weight's size is not one that fp8 products take.
        """
        if any(size % SIZE_MULTIPLE for size in weight.shape):
            sizes = " x ".join(map(str, weight.shape))
            raise InvalidConfig(
                f"--quantization fp8 needs layers whose sizes are multiples of {SIZE_MULTIPLE}; "
                f"this model has one of {sizes}",
                param="--quantization",
            )
        self._quantize = quantize
        quantized, scale = quantize_rows(weight)
        self._weight = quantized.t()  # the product wants it column by column, as it lies
        self._weight_scale = scale.t()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, out_features]."""
        quantized, scale = self._quantize(x)
        y: Tensor = torch._scaled_mm(
            quantized,
            self._weight,
            scale_a=scale,
            scale_b=self._weight_scale,
            bias=self._bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y


def check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse fp8 where it would not run.

    Raises:
        InvalidConfig: the device has no e4m3 arithmetic, or the model is not in bfloat16.
    """
    flag = "--quantization"
    if device.type != "cuda":
        raise InvalidConfig(f"{flag} fp8 needs an NVIDIA GPU, got --device {device.type}", param=flag)
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise InvalidConfig(
            f"{flag} fp8 needs a GPU of compute capability 8.9 or more, this one has "
            f"{capability[0]}.{capability[1]}",
            param=flag,
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise InvalidConfig(f"{flag} fp8 needs --dtype bfloat16, got {name}", param=flag)
