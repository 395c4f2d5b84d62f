"""The compiled LoRA kernel against the reference, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux.engine.kernels.cpu import product
from loramux.engine.kernels.cpu.lora import LoraKernel, LoraRows
from loramux.engine.kernels.lora import Segment, SiteLanes, reference_lora

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

# widths of the parts, in_features; a line of the kernel is 32 elements, a vector 16
SHAPES = {
    "one part": ([64], 64),
    "parts of one vector": ([32, 16, 16], 48),
    "a thread's border inside a part": ([80, 48], 96),
    "a model's": ([576, 192, 192], 576),
}
SEGMENTS = {
    "one row": [Segment(2, 3, 8, 8)],
    "odd ranks": [Segment(0, 2, 0, 4), Segment(3, 4, 8, 33), Segment(5, 6, 48, 1), Segment(6, 9, 56, 13)],
    "rank above 64 in blocks of tokens": [Segment(1, 12, 0, 72), Segment(12, 13, 72, 8)],
    "many adapters": [Segment(i, i + 1 + i % 2, 8 * (i % 12), 8) for i in range(0, 24, 2)],
}


def site(dtype: torch.dtype, widths: list[int], in_features: int) -> SiteLanes:
    torch.manual_seed(0)
    return SiteLanes(
        a=torch.randn(96, len(widths), in_features).to(dtype),
        b=[torch.randn(96, width).to(dtype) for width in widths],
        offsets=[sum(widths[:i]) for i in range(len(widths) + 1)],
    )


def add(
    pool: SiteLanes, x: torch.Tensor, base: torch.Tensor, segments: list[Segment], num_threads: int
) -> torch.Tensor:
    out = base.clone()
    rows(pool, x.dtype, segments, num_threads).add(out, x, pool.address)
    return out


def rows(pool: SiteLanes, dtype: torch.dtype, segments: list[Segment], num_threads: int) -> LoraRows:
    kernel = LoraKernel(dtype, len(pool.b), max(b.shape[1] for b in pool.b), num_threads)
    return kernel.plan(np.array([(s.begin, s.end - s.begin, s.first_lane, s.rank) for s in segments]))


def expected(pool: SiteLanes, x: torch.Tensor, base: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    out = base.float().clone()
    wide = SiteLanes(pool.a.float(), [b.float() for b in pool.b], pool.offsets)
    reference_lora(out, x.float(), wide, segments)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(("widths", "in_features"), SHAPES.values(), ids=SHAPES)
def test_any_number_of_threads_adds_what_the_reference_adds(
    dtype: torch.dtype, segments: list[Segment], widths: list[int], in_features: int
) -> None:
    pool = site(dtype, widths, in_features)
    x, base = torch.randn(25, in_features).to(dtype), torch.randn(25, sum(widths)).to(dtype)

    outs = [add(pool, x, base, segments, num_threads) for num_threads in (1, 2, 3)]

    wanted = expected(pool, x, base, segments)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(outs[0].float(), wanted, rtol=tolerance, atol=tolerance * in_features**0.5)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    others = torch.ones(25, dtype=torch.bool)
    for s in segments:
        others[s.begin : s.end] = False
    assert torch.equal(outs[0][others], base[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    pool = site(dtype, [96, 32], 96)
    x, base = torch.randn(25, 96).to(dtype), torch.randn(25, 128).to(dtype)
    crowd = [Segment(0, 7, 0, 21), Segment(7, 8, 24, 40), Segment(9, 20, 64, 8)]

    together = add(pool, x, base, crowd, 2)

    for token, first, rank in ((0, 0, 21), (5, 0, 21), (7, 24, 40), (19, 64, 8)):
        alone = add(pool, x, base, [Segment(token, token + 1, first, rank)], 1)
        assert torch.equal(alone[token], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_without_weights_are_not_read(dtype: torch.dtype) -> None:
    pool = site(dtype, [64, 32], 64)
    pool.ranks[0, 8], pool.ranks[1, 8] = 0, 5  # the adapter in lanes [8, 24) wraps the second part only
    pool.a[8:24, 0] = torch.nan
    pool.b[0][8:24] = torch.nan
    pool.a[13:24, 1] = torch.nan
    pool.b[1][13:24] = torch.nan
    x, base = torch.randn(6, 64).to(dtype), torch.randn(6, 96).to(dtype)
    segments = [Segment(0, 1, 0, 8), Segment(1, 6, 8, 12)]

    out = add(pool, x, base, segments, 2)

    assert torch.equal(out[1:, :64], base[1:, :64])
    wanted = base.float().clone()
    wide = SiteLanes(pool.a.float(), [b.float() for b in pool.b], pool.offsets)
    reference_lora(wanted, x.float(), wide, [Segment(0, 1, 0, 8), Segment(1, 6, 8, 5)])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[:1].float(), wanted[:1], rtol=tolerance, atol=tolerance * 8)
    torch.testing.assert_close(out[1:, 64:].float(), wanted[1:, 64:], rtol=tolerance, atol=tolerance * 8)


@pytest.mark.skipif(not product.is_available(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("form", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("num_rows", [1, 9, 16, 17, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("widths", "in_features"), SHAPES.values(), ids=SHAPES)
def test_a_product_in_the_same_call_yields_the_same_bits(
    widths: list[int], in_features: int, num_rows: int, form: torch.dtype, *, has_bias: bool
) -> None:
    pool = site(torch.bfloat16, widths, in_features)
    weight = (torch.randn(sum(widths), in_features) * (1 if form == torch.bfloat16 else 30)).to(form)
    if not product.supports(weight):
        pytest.skip("needs AVX512-VBMI")
    bias = torch.randn(sum(widths)).bfloat16() if has_bias else None
    linear = product.PackedLinear(weight, bias, torch.rand(sum(widths)) if form == torch.int8 else None)
    x = torch.randn(num_rows, in_features).bfloat16()
    crowd = [Segment(0, 1, 0, 11), Segment(1, 6, 16, 40), Segment(7, 16, 56, 8), Segment(17, 40, 64, 32)]
    segments = [s for s in crowd if s.end <= num_rows]

    wanted = add(pool, x, linear(x), segments, 2)

    for num_threads in (1, 2, 3):
        plan = rows(pool, torch.bfloat16, segments, num_threads)
        for _ in range(3):  # threads meet again and again
            assert torch.equal(plan.multiply(linear, x, pool.address), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes_may_lie_apart(dtype: torch.dtype) -> None:
    near = site(dtype, [64, 32], 64)
    far = SiteLanes(
        a=torch.full((96, 3, 64), torch.nan, dtype=dtype)[:, :2],
        b=[torch.full((96, 100), torch.nan, dtype=dtype)[:, : b.shape[1]] for b in near.b],
        offsets=near.offsets,
    )
    far.a.copy_(near.a)
    for to, source in zip(far.b, near.b, strict=True):
        to.copy_(source)
    x, base = torch.randn(13, 64).to(dtype), torch.randn(13, 96).to(dtype)
    segments = SEGMENTS["rank above 64 in blocks of tokens"]

    assert torch.equal(add(far, x, base, segments, 2), add(near, x, base, segments, 2))
