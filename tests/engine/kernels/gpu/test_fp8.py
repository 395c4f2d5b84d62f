"""Rows in fp8, as torch's form of the same arithmetic has them."""

from __future__ import annotations

import pytest
import torch

from loramux.engine.adapters.lane_memory import LaneLayout
from loramux.engine.kernels.gpu.fp8 import quantize_rows
from loramux.engine.kernels.gpu.parts import GpuParts
from loramux.engine.kernels.gpu.site_plan import Shrink, SitePlan, always
from loramux.engine.kernels.lora import SiteLanes, reference_lora
from loramux.engine.layers import fp8_linear
from loramux.engine.layers.fp8_linear import FP8, FP8_MAX, Fp8Linear
from tests.engine.kernels.gpu.lora_sites import ADAPTERS, make_site, make_step

PLANS = (
    SitePlan(shrink=Shrink.AUGMENTED, is_fused=True, by_tile=False),  # which needs lanes behind the weight
    SitePlan(shrink=Shrink.TILES, is_fused=False, by_tile=True, planes=2),
)
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(DEVICE)


@pytest.mark.parametrize("width", [64, 96, 3000])
def test_rows_and_scales_are_those_of_torch(width: int) -> None:
    x = random(5, width)
    x[1] *= 1000
    x[3] = 0

    quantized, scales = quantize_rows(x)

    expected, expected_scales = fp8_linear.quantize_rows(x)
    assert torch.equal(scales, expected_scales)
    assert quantized.dtype == FP8
    assert torch.equal(quantized.float(), expected.float())
    assert float(quantized.float().abs().max()) == FP8_MAX


def test_rows_of_a_wider_tensor() -> None:
    x = random(3, 256)

    quantized, scales = quantize_rows(x[:, :64])

    assert torch.equal(quantized.float(), quantize_rows(x[:, :64].contiguous())[0].float())
    assert torch.equal(scales, fp8_linear.quantize_rows(x[:, :64])[1])


@pytest.mark.parametrize("plan", list(PLANS), ids=str)
def test_a_site_with_fp8_weights_adds_its_adapters_by_kernels_of_their_own(plan: SitePlan) -> None:
    lanes = make_site(64, [48, 16, 16], dtype=torch.bfloat16, layout=LaneLayout.JOINED)
    step = make_step([None, ADAPTERS[1], ADAPTERS[2]], [3, 2, 4])
    x, linear = random(step.num_tokens, 64), Fp8Linear(random(80, 64), None, quantize_rows)
    parts = GpuParts(always(plan))

    y = parts.whole(parts.site("qkv", linear, lanes, None)(x, step.lora))

    expected = linear(x).float()
    exact = SiteLanes(a=lanes.a.float(), b=[b.float() for b in lanes.b], offsets=lanes.offsets)
    reference_lora(expected, x.float(), exact, step.segments)
    assert torch.allclose(y.float(), expected, rtol=2**-6, atol=0.05)
    assert torch.equal(y[:3], linear(x)[:3])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_the_product_is_that_of_the_dequantised_rows(num_tokens: int) -> None:
    weight, x, bias = random(1536, 1024), random(num_tokens, 1024), random(1536)

    y = Fp8Linear(weight, bias, quantize_rows)(x)

    (w8, w_scale), (x8, x_scale) = fp8_linear.quantize_rows(weight), fp8_linear.quantize_rows(x)
    expected = (x8.double() * x_scale) @ (w8.double() * w_scale).t() + bias
    assert torch.allclose(y.double(), expected, rtol=2**-6, atol=0.05)
