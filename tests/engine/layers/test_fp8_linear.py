"""fp8 linear layers: the same arithmetic on every device, and where it is refused."""

from __future__ import annotations

import pytest
import torch

from loramux.engine.errors import InvalidConfig
from loramux.engine.layers.fp8_linear import FP8_MAX, Fp8Linear, check_fp8, quantize_rows
from loramux.engine.layers.linear import Linear, make_linear


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_each_row_uses_the_whole_range() -> None:
    x = random(5, 64)
    x[1] *= 1000
    x[3] = 0

    quantized, scale = quantize_rows(x)

    largest = quantized.float().abs().amax(dim=1)
    assert largest.tolist() == [FP8_MAX, FP8_MAX, FP8_MAX, 0, FP8_MAX]
    back = quantized.float() * scale
    assert torch.allclose(back, x.float(), rtol=2**-4, atol=float(scale.max()) * 2**-9)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_that_of_the_dequantised_rows(has_bias: bool) -> None:
    weight, x = random(64, 32), random(3, 32, seed=1)
    bias = random(64, seed=2) if has_bias else None

    y = Fp8Linear(weight, bias)(x)

    (w8, w_scale), (x8, x_scale) = quantize_rows(weight), quantize_rows(x)
    expected = (x8.double() * x_scale) @ (w8.double() * w_scale).t()
    if bias is not None:
        expected += bias
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), expected, rtol=2**-7, atol=0.01)


def test_it_is_near_the_model_s_own_product() -> None:
    weight, x = random(64, 512), random(4, 512, seed=1)

    exact = x.float() @ weight.float().t()
    y = Fp8Linear(weight)(x).float()

    assert float((y - exact).norm() / exact.norm()) < 0.05


def test_the_flag_chooses_the_form() -> None:
    assert isinstance(make_linear(random(16, 16), None, None), Linear)
    assert isinstance(make_linear(random(16, 16), None, "fp8"), Fp8Linear)
    assert not Fp8Linear.can_hold_lanes
    assert Linear.can_hold_lanes


def test_sizes_that_the_product_does_not_take_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="multiples of 16; this model has one of 64 x 40"):
        Fp8Linear(random(64, 40))


def test_a_cpu_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="--quantization fp8 needs an NVIDIA GPU"):
        check_fp8(torch.bfloat16, torch.device("cpu"))
