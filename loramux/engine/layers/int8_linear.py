"""Linear layers with int8 weights, one scale an output channel; activations keep the model's dtype.

    y[t, n] = (x[t] · w8[n]) * scale[n] + b[n]

where w8 is a row divided by its scale, which maps the row's largest magnitude to 127. Weights are quantised
once, when they are loaded. CPUs with AVX512-BF16 read the bytes as they are; elsewhere torch's own kernel
takes few rows, and more of them, or another dtype, go through a weight that is put together in each call.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.errors import InvalidConfig
from loramux.engine.kernels.cpu.product import PackedLinear, supports

INT8_MAX: Final = 127
_FEW_ROWS: Final = 12  # up to which torch's kernel is the faster one
_BYTES_MULTIPLE: Final = 32  # of in_features: torch's kernel reads beyond the end of others
_ROWS_AT_ONCE: Final = 1024  # that are quantised; so the memory for it stays small


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its scale and round.

    Args:
        weight: [out_features, in_features]

    Returns:
        Integers in [-127, 127], int8; and the scales [out_features], which the weight's dtype can hold.
    """
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
    parts = (torch.split(tensor, _ROWS_AT_ONCE) for tensor in (weight, quantized, scale))
    for rows, integers, scales in zip(*parts, strict=True):
        scales.copy_(rows.abs().amax(dim=1).float() / INT8_MAX)
        scales.masked_fill_(scales == 0, 1.0)
        integers.copy_((rows / scales[:, None].float()).round_().clamp_(-INT8_MAX, INT8_MAX))
    return quantized, scale


class Int8Linear:
    """y = x · Wᵀ + b with an int8 weight, on a CPU."""

    __slots__ = ("_bias", "_has_kernel", "_scale", "_weight", "packed")

    can_hold_lanes: ClassVar[bool] = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Args:
        weight: [out_features, in_features] in the model's dtype; a quantised copy is kept
        bias: [out_features]
        """
        quantized, scale = quantize_weight(weight)
        self.packed: PackedLinear | None = None
        if weight.dtype == torch.bfloat16 and supports(quantized):
            self.packed = PackedLinear(quantized, bias, scale.float())
            return
        self._weight, self._scale, self._bias = quantized, scale, bias
        self._has_kernel = weight.shape[1] % _BYTES_MULTIPLE == 0 and _has_kernel(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, out_features]."""
        if self.packed is not None:
            return self.packed(x)
        if self._has_kernel and x.shape[0] <= _FEW_ROWS:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self._weight, self._scale)
            return y if self._bias is None else y.add_(self._bias)
        weight = torch.empty(self._weight.shape, dtype=x.dtype)
        torch.mul(self._weight, self._scale.float()[:, None], out=weight)
        return functional.linear(x, weight, self._bias)


def check_int8(device: torch.device) -> None:
    """Refuse int8 where it would not run.

    Raises:
        InvalidConfig: the device is not a CPU.
    """
    flag = "--quantization"
    if device.type != "cpu":
        raise InvalidConfig(
            f"{flag} int8 is for --device cpu, got --device {device.type}; fp8 is for NVIDIA GPUs", param=flag
        )


@cache
def _has_kernel(dtype: torch.dtype) -> bool:
    """True if this torch has a product with int8 weights, and it agrees with the plain one.

    The operator is private to torch, so it is tried, not assumed. In other dtypes it is slow.
    """
    if dtype != torch.bfloat16:
        return False
    weight = (torch.arange(48 * 64) % 255 - INT8_MAX).to(torch.int8).reshape(48, 64)
    x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).to(dtype)
    scale = torch.linspace(0.5, 1, 48).to(dtype)
    try:
        y = torch.ops.aten._weight_int8pack_mm(x, weight, scale)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = x.float() @ weight.float().t() * scale.float()
    return torch.allclose(y.float(), expected, rtol=1e-2, atol=float(expected.abs().max()) * 1e-2)
