"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) · w over the last dimension, computed in float32.

    The result is rounded to the model's dtype before it is multiplied by w, as the checkpoints were
    trained; a fused operator that multiplies first differs in the last bit.
    """

    __slots__ = ("_eps", "_weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., features], any leading shape."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(self._eps))
        return (wide * scale).to(x.dtype) * self._weight


class LayerNorm:
    """y = (x - mean) / sqrt(var + eps) · w + b over the last dimension."""

    __slots__ = ("_bias", "_eps", "_features", "_weight")

    def __init__(self, features: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self._features = features
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., features], any leading shape."""
        return functional.layer_norm(x, (self._features,), self._weight, self._bias, self._eps)


Norm = RMSNorm | LayerNorm
