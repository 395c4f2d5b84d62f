"""Products with the lanes of prompts in the same call, against the reference, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loramux.engine.kernels.cpu import product
from loramux.engine.kernels.cpu.lora import LoraKernel
from loramux.engine.kernels.cpu.lora_prompts import LEAST_TOKENS
from loramux.engine.kernels.lora import Segment, SiteLanes, apply_lora, plan_lora, reference_lora
from loramux.engine.layers.linear import Linear, LoraLinear

pytestmark = pytest.mark.skipif(not product.is_available(), reason="needs AVX512-BF16")

NUM_LANES = 640
FORMS = [torch.bfloat16, torch.int8]
# widths of the parts, in_features; a strip is 16 columns, and two are computed together
SHAPES = {
    "one part": ([64], 64),
    "one strip": ([16], 32),
    "parts of one strip": ([48, 16, 16], 48),
    "a thread's border inside a part": ([80, 48], 96),
    "several chunks of k": ([32, 64], 4112),
}
# of some tokens; those in between have the base alone
SEGMENTS = {
    "more tokens than a panel": (300, [Segment(0, 300, 0, 3)]),
    "odd ranks": (
        110,
        [Segment(3, 20, 0, 1), Segment(20, 60, 8, 3), Segment(64, 81, 16, 40), Segment(90, 110, 56, 16)],
    ),
    "many lanes": (60, [Segment(0, 30, 0, 64), Segment(31, 60, 64, 256)]),
}


def site(widths: list[int], in_features: int) -> SiteLanes:
    torch.manual_seed(0)
    return SiteLanes(
        a=torch.randn(NUM_LANES, len(widths), in_features).bfloat16(),
        b=[torch.randn(NUM_LANES, width).bfloat16() for width in widths],
        offsets=[sum(widths[:i]) for i in range(len(widths) + 1)],
    )


def pack(
    out_features: int, in_features: int, form: torch.dtype, *, has_bias: bool = False
) -> product.PackedLinear:
    weight = torch.randn(out_features, in_features) * (1 if form == torch.bfloat16 else 30)
    bias = torch.randn(out_features).bfloat16() if has_bias else None
    if not product.supports(weight.to(form)):
        pytest.skip("needs AVX512-VBMI")
    scale = None if form == torch.bfloat16 else torch.rand(out_features)
    return product.PackedLinear(weight.to(form), bias, scale)


def compute(
    pool: SiteLanes, linear: product.PackedLinear, x: Tensor, segments: list[Segment], num_threads: int = 2
) -> Tensor:
    kernel = LoraKernel(torch.bfloat16, len(pool.b), max(b.shape[1] for b in pool.b), num_threads)
    groups = np.array([(s.begin, s.end - s.begin, s.first_lane, s.rank) for s in segments])
    return kernel.plan_prompts(groups).multiply(linear, x, pool.address)


def wide(pool: SiteLanes) -> SiteLanes:
    return SiteLanes(pool.a.float(), [b.float() for b in pool.b], pool.offsets)


def assert_near(out: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.std()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_tokens", "segments"), SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(("widths", "in_features"), SHAPES.values(), ids=SHAPES)
def test_any_number_of_threads_adds_what_the_reference_adds(
    widths: list[int],
    in_features: int,
    num_tokens: int,
    segments: list[Segment],
    form: torch.dtype,
    *,
    has_bias: bool,
) -> None:
    pool = site(widths, in_features)
    linear = pack(sum(widths), in_features, form, has_bias=has_bias)
    x = torch.randn(num_tokens, in_features).bfloat16()
    base = linear(x)

    outs = [compute(pool, linear, x, segments, num_threads) for num_threads in (1, 2, 3)]

    wanted = base.float()
    reference_lora(wanted, x.float(), wide(pool), segments)
    assert_near(outs[0], wanted)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    others = torch.ones(num_tokens, dtype=torch.bool)
    for s in segments:
        others[s.begin : s.end] = False
    assert torch.equal(outs[0][others], base[others])


def test_parts_without_weights_are_not_read() -> None:
    pool = site([64, 32, 16], 64)
    pool.ranks[:, 8] = torch.tensor([0, 5, 16])  # of the adapter in lanes [8, 24)
    pool.a[8:24, 0] = torch.nan
    pool.b[0][8:24] = torch.nan
    pool.a[13:24, 1] = torch.nan
    pool.b[1][13:24] = torch.nan
    linear = pack(112, 64, torch.bfloat16)
    x = torch.randn(40, 64).bfloat16()
    base = linear(x)

    out = compute(pool, linear, x, [Segment(0, 20, 0, 8), Segment(20, 40, 8, 16)])

    assert torch.equal(out[20:, :64], base[20:, :64])
    for part, begin, end, rank in ((1, 64, 96, 5), (2, 96, 112, 16)):
        one = SiteLanes(pool.a[:, part : part + 1].float(), [pool.b[part].float()], [0, end - begin])
        wanted = base[:, begin:end].float()
        reference_lora(wanted, x.float(), one, [Segment(0, 20, 0, 8), Segment(20, 40, 8, rank)])
        assert_near(out[:, begin:end], wanted)


def test_a_row_does_not_depend_on_its_company() -> None:
    pool, linear = site([96, 32], 96), pack(128, 96, torch.bfloat16)
    x = torch.randn(400, 96).bfloat16()

    together = compute(pool, linear, x, [Segment(0, 150, 0, 21), Segment(160, 400, 24, 40)])

    for begin, end, first, rank in ((0, 17, 0, 21), (120, 150, 0, 21), (370, 400, 24, 40)):
        alone = compute(pool, linear, x[begin:end].clone(), [Segment(0, end - begin, first, rank)])
        assert torch.equal(alone, together[begin:end])


def test_a_layer_takes_them_beside_short_ones_and_without_its_own_product() -> None:
    pool = site([64, 32], 64)
    weight = torch.randn(96, 64).bfloat16()
    long = 9 + LEAST_TOKENS
    segments = [
        Segment(0, 1, 0, 8),
        Segment(5, 9, 8, 5),
        Segment(9, long, 16, 3),
        Segment(long, long + 9, 24, 8),
    ]
    x = torch.randn(long + 11, 64).bfloat16()
    kernel = LoraKernel(torch.bfloat16, 2, 64)
    plan = plan_lora(segments, 0, dtype=torch.bfloat16, device=torch.device("cpu"), kernel=kernel)
    assert plan is not None

    together = LoraLinear(Linear(weight), pool)(x, plan)
    apart = Linear(weight)(x)
    apply_lora(apart, x, pool, plan)

    wanted = Linear(weight)(x).float()
    reference_lora(wanted, x.float(), wide(pool), segments)
    assert_near(together, wanted)
    assert_near(apart, wanted)
