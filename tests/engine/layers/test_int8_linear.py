"""int8 linear layers: the same weights whichever code multiplies with them, and where they are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.config import EngineConfig
from loramux.engine.errors import InvalidConfig
from loramux.engine.layers import int8_linear
from loramux.engine.layers.int8_linear import INT8_MAX, Int8Linear, quantize_weight
from loramux.engine.layers.linear import (
    Linear,
    can_hold_lanes,
    check_quantization,
    make_head,
    make_linear,
)

# Of a product whose weight may have been rounded, too.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-20}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_each_row_uses_the_whole_range(dtype: torch.dtype) -> None:
    weight = random(2100, 24, dtype=dtype)
    weight[1] *= 1000
    weight[2] = 0

    integers, scale = quantize_weight(weight)

    assert scale.dtype == dtype
    largest = integers.abs().amax(dim=1)
    assert largest[2] == 0
    assert largest[[i for i in range(2100) if i != 2]].min() >= INT8_MAX - 1
    error = (integers.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error / scale.double()[:, None]).max() <= 0.76  # a scale in bfloat16 may clip the largest


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("in_features", [64, 66])  # the second is for none of the kernels
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("own_kernel", [False, True])
def test_the_product_is_that_of_the_dequantised_weight(
    dtype: torch.dtype, in_features: int, has_bias: bool, own_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own_kernel:  # as on a processor without the instructions
        monkeypatch.setattr(int8_linear, "supports", lambda weight: False)
    weight = random(40, in_features, dtype=dtype)
    bias = random(40, dtype=dtype) if has_bias else None
    linear = Int8Linear(weight, bias)
    integers, scale = quantize_weight(weight)
    dequantised = integers.double() * scale.double()[:, None]
    for rows in (1, 5, 33):
        x = random(rows, in_features, dtype=dtype)

        y = linear(x)

        assert y.dtype == dtype
        expected = functional.linear(x.double(), dequantised, None if bias is None else bias.double())
        size = expected.abs() + in_features**0.5
        assert ((y.double() - expected).abs() / size).max() < ROUNDING[dtype]


def test_it_is_near_the_model_s_own_product() -> None:
    weight, x = random(64, 512), random(4, 512)
    exact = x.float() @ weight.float().t()
    y = Int8Linear(weight)(x).float()
    assert float((y - exact).norm() / exact.norm()) < 0.015


def test_rows_that_do_not_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "supports", lambda weight: False)
    linear, x = Int8Linear(random(48, 64)), random(64, 20).T
    for rows in (3, 20):
        torch.testing.assert_close(linear(x[:rows]), linear(x[:rows].contiguous()))


def test_the_flag_chooses_the_form_of_layers_and_head() -> None:
    weight = random(16, 16)
    assert isinstance(make_linear(weight, None, "int8"), Int8Linear)
    assert isinstance(make_head(weight, "int8"), Int8Linear)
    assert isinstance(make_head(weight, "fp8"), Linear)
    assert isinstance(make_head(weight, None), Linear)
    assert not can_hold_lanes("int8")


def test_another_form_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="--quantization must be one of fp8, int8, got 'int4'"):
        EngineConfig(model="m", quantization="int4")


def test_another_device_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="--quantization int8 is for --device cpu, got --device cuda"):
        check_quantization("int8", torch.bfloat16, torch.device("cuda"))
    check_quantization("int8", torch.float32, torch.device("cpu"))
