"""The base model's products, whichever code computes them on this machine."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from loramux.engine.layers.linear import Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_features", [64, 66])  # in bfloat16 the second is not for our own kernel
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_torchs_linear(dtype: torch.dtype, in_features: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, in_features).to(dtype)
    bias = torch.randn(40).to(dtype) if has_bias else None
    linear = Linear(weight, bias)
    for rows in (1, 5, 33):
        x = torch.randn(rows, in_features).to(dtype)
        expected = functional.linear(x, weight, bias)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(linear(x), expected, rtol=tolerance, atol=tolerance)
