"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.kernels.cpu.dtypes import TAGS, split_evenly, takes
from loramux.engine.kernels.cpu.operations import norm_code
from loramux.engine.kernels.cpu.recording import Operation, arguments, bits
from loramux.engine.kernels.cpu.rows import rms_norm, rms_norm_parallel

_PARALLEL_ROWS = 128  # from here on a second thread is worth its waking


class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) · w over the last dimension, computed in float32.

    The result is rounded to the model's dtype before it is multiplied by w, as the checkpoints were
    trained; a fused operator that multiplies first differs in the last bit.
    """

    __slots__ = ("_weight", "eps", "is_compiled")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self.eps = eps
        self.is_compiled = takes(weight, weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """[features]"""
        return self._weight

    @property
    def address(self) -> int:
        """Of the weight's memory."""
        return self._weight.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., features], any leading shape."""
        if self.is_compiled and x.is_contiguous():
            return self._compiled(x, 0)
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(self.eps))
        return (wide * scale).to(x.dtype) * self._weight

    def after_add(self, x: Tensor, delta: Tensor) -> Tensor:
        """x += delta in place; returns the norm of the new x. Both [num_rows, features]."""
        if self.is_compiled and x.is_contiguous() and delta.is_contiguous():
            return self._compiled(x, delta.data_ptr())
        return self(x.add_(delta))

    def operation(self, x: Tensor, delta: Tensor | None, out: Tensor) -> Operation:
        """`after_add`, or without a delta the norm alone, of as many rows as a step has."""
        step = 0 if delta is None else delta.data_ptr()
        values = (x.data_ptr(), step, self.address, out.data_ptr(), x.shape[-1], bits(self.eps))
        return Operation("norm", norm_code(), arguments(*values))

    def _compiled(self, x: Tensor, delta: int) -> Tensor:
        out = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width
        arguments = (TAGS[x.dtype], x.data_ptr(), delta, self.address, out.data_ptr(), width, self.eps)
        if rows < _PARALLEL_ROWS:
            rms_norm(*arguments, 0, rows)
        else:
            rms_norm_parallel(*arguments, split_evenly(rows, torch.get_num_threads()))
        return out


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

    def after_add(self, x: Tensor, delta: Tensor) -> Tensor:
        """x += delta in place; returns the norm of the new x. Both [num_rows, features]."""
        return self(x.add_(delta))


Norm = RMSNorm | LayerNorm
