from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.engine.kernels.attention import (
    AttentionShape,
    KVCache,
    TorchAttention,
    TorchAttentionInput,
)
from loramux.engine.kernels.gpu.activation import activate
from loramux.engine.kernels.gpu.lora import expanded, shrink
from loramux.engine.kernels.gpu.norm import rms_norm
from loramux.engine.kernels.gpu.qkv import store_qkv
from loramux.engine.kernels.gpu.site_output import Pending, SiteOutput
from loramux.engine.kernels.gpu.tiles import tile
from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.layers.activation import Activation
from loramux.engine.layers.norm import RMSNorm
from tests.engine.kernels.gpu.lora_sites import (
    ADAPTERS,
    DECODE,
    DEVICE,
    MIXED,
    Step,
    make_site,
    make_step,
    reference,
)

CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
ROUNDED: dict[
    torch.dtype, dict[str, Any]
] = {  # to the dtype, at several places; the interpreter rounds bfloat16 down
    torch.float32: CLOSE,
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 6e-2},
}


def augmented(x: Tensor, site: SiteLanes, step: Step, *, by_tile: bool) -> SiteOutput:
    assert site.weight is not None
    out = x @ site.weight[: site.product_rows(step.lora.num_lanes)].T
    width = site.offsets[-1]
    return SiteOutput(out, width, Pending(out[None, :, width:], site, step.lora, by_tile))


def separate(x: Tensor, site: SiteLanes, step: Step, *, by_tile: bool, planes: int) -> SiteOutput:
    assert site.weight is not None
    width = site.offsets[-1]
    shrunk = shrink(x, site, step.lora, planes)
    return SiteOutput(x @ site.weight[:width].T, width, Pending(shrunk, site, step.lora, by_tile))


@pytest.mark.parametrize("form", ["augmented", "separate", "separate in planes"])
@pytest.mark.parametrize(
    ("by_tile", "widths", "dtype"),
    [
        (False, [48, 16, 24], torch.float32),
        (True, [48, 16, 24], torch.float32),
        (False, [40], torch.float16),
        (True, [40], torch.bfloat16),
        (True, [40, 40], torch.float16),
    ],
)
def test_shrink_and_expand(form: str, by_tile: bool, widths: list[int], dtype: torch.dtype) -> None:
    site, step = make_site(72, widths, dtype=dtype), make_step(*(MIXED if by_tile else DECODE))
    x = torch.randn(step.num_tokens, 72, device=DEVICE).to(dtype)
    if form == "augmented":
        output = augmented(x, site, step, by_tile=by_tile)
    else:
        output = separate(x, site, step, by_tile=by_tile, planes=3 if "planes" in form else 1)
    expected = reference(output.base, x, site, step)

    whole = expanded(output)

    assert whole.pending is None
    torch.testing.assert_close(whole.base.double(), expected, **ROUNDED[dtype])


@pytest.mark.parametrize("counts", [[150, 40, 90], [700, 40, 400]])
def test_prompts_in_wide_tiles(counts: list[int]) -> None:
    site, step = make_site(16, [16]), make_step([ADAPTERS[1], None, ADAPTERS[2]], counts, padding=3)
    x = torch.randn(step.num_tokens, 16, device=DEVICE)
    output = separate(x, site, step, by_tile=True, planes=1)
    expected = reference(output.base, x, site, step)

    assert step.lora.tile_rows > tile("shrink", (16, 16), step.lora.num_lanes, step.num_tokens).rows
    torch.testing.assert_close(expanded(output).base.double(), expected, **CLOSE)


def test_rows_without_an_adapter_keep_every_bit() -> None:
    site, step = make_site(32, [32]), make_step(*MIXED)
    x = torch.randn(step.num_tokens, 32, device=DEVICE)
    output = augmented(x, site, step, by_tile=True)
    before = output.base.clone()

    after = expanded(output).base

    untouched = torch.ones(step.num_tokens, dtype=torch.bool)
    for segment in step.segments:
        untouched[segment.begin : segment.end] = False
    assert torch.equal(after[untouched], before[untouched])
    assert not torch.equal(after[~untouched], before[~untouched])


@pytest.mark.parametrize("by_tile", [False, True])
def test_what_other_lanes_hold_does_not_matter(by_tile: bool) -> None:
    site, step = make_site(32, [32]), make_step(*DECODE)
    x = torch.randn(step.num_tokens, 32, device=DEVICE)
    first = expanded(augmented(x, site, step, by_tile=by_tile)).base
    other = expanded(separate(x, site, step, by_tile=by_tile, planes=2)).base
    assert site.weight is not None
    written = torch.zeros(site.a.shape[0], dtype=torch.bool)
    for segment in step.segments:
        written[segment.first_lane : segment.first_lane + segment.rank] = True
    site.a[~written] = float("nan")
    site.b[0][~written] = float("nan")

    assert torch.equal(expanded(augmented(x, site, step, by_tile=by_tile)).base, first)
    assert torch.equal(expanded(separate(x, site, step, by_tile=by_tile, planes=2)).base, other)


@pytest.mark.parametrize("by_tile", [False, True])
@pytest.mark.parametrize(("kind", "is_gated"), [("silu", True), ("gelu_tanh", True), ("relu", False)])
def test_activation_with_expand(by_tile: bool, kind: str, is_gated: bool) -> None:
    planned = make_step(*(MIXED if by_tile else DECODE))
    site = make_site(32, [40, 40] if is_gated else [40])
    x = torch.randn(planned.num_tokens, 32, device=DEVICE)
    output = augmented(x, site, planned, by_tile=by_tile)
    expected = Activation(kind, is_gated=is_gated)(reference(output.base, x, site, planned).float())

    torch.testing.assert_close(activate(output, kind, is_gated=is_gated), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activation_of_base_tokens(kind: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(5, 96, device=DEVICE)).to(dtype)

    found = activate(SiteOutput(x, 96), kind, is_gated=True)

    torch.testing.assert_close(found, Activation(kind, is_gated=True)(x), **ROUNDED[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_tile", [False, True])
def test_norm_with_addition_and_expand(by_tile: bool, dtype: torch.dtype) -> None:
    site, step = make_site(32, [72], dtype=dtype), make_step(*DECODE)
    weight = torch.rand(72, device=DEVICE).to(dtype)
    x = torch.randn(step.num_tokens, 72, device=DEVICE).to(dtype)
    source = torch.randn(step.num_tokens, 32, device=DEVICE).to(dtype)
    delta = augmented(source, site, step, by_tile=by_tile)
    residual = x.clone()
    complete = reference(delta.base, source, site, step).to(dtype)
    expected = RMSNorm(weight, 1e-5).after_add(residual, complete)

    found = rms_norm(x, delta, weight, 1e-5)

    torch.testing.assert_close(x, residual, **ROUNDED[dtype])
    torch.testing.assert_close(found, expected, **ROUNDED[dtype])


def test_norm_of_base_tokens() -> None:
    weight, x = torch.rand(72, device=DEVICE), torch.randn(3, 72, device=DEVICE)
    delta = torch.randn(3, 80, device=DEVICE)
    norm, residual = RMSNorm(weight, 1e-5), x.clone()

    torch.testing.assert_close(rms_norm(x, None, weight, 1e-5), norm(x))
    torch.testing.assert_close(
        rms_norm(x, SiteOutput(delta, 72), weight, 1e-5), norm.after_add(residual, delta[:, :72])
    )
    torch.testing.assert_close(x, residual)


HEADS, KV_HEADS = 4, 2


def stored(
    output: SiteOutput, plain: Tensor, head_dim: int, dtype: torch.dtype, *, rope: bool, norm: bool
) -> list[tuple[Tensor, Tensor]]:
    """q and both caches, (found, expected); every third token is padding and writes nothing."""
    shape = AttentionShape(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        block_size=4,
        windows=(None,),
        dtype=dtype,
        device=DEVICE,
    )
    torch_form = TorchAttention(shape)
    num_tokens = plain.shape[0]
    angles = torch.rand(num_tokens, 1, head_dim // 2, device=DEVICE).repeat(1, 1, 2) if rope else None
    trig = (angles.cos().to(dtype), angles.sin().to(dtype)) if angles is not None else None
    weights = [RMSNorm(torch.rand(head_dim, device=DEVICE).to(dtype), 1e-6) for _ in "qk"]
    norms = (weights[0], weights[1]) if norm else None
    order = torch.randperm(4 * num_tokens, device=DEVICE)[:num_tokens]
    padding = torch.arange(num_tokens, device=DEVICE) % 3 == 2
    slots = torch.where(padding, -1, order)

    expected, found = torch_form.empty_cache(num_tokens), torch_form.empty_cache(num_tokens)
    kept = plain[~padding]
    heads = torch.arange(KV_HEADS, device=DEVICE)
    real = order[~padding]
    rows = ((real // 4)[:, None] * KV_HEADS + heads) * 4 + (real % 4)[:, None]
    own = None if trig is None else (trig[0][~padding], trig[1][~padding])
    q = torch_form.store(kept, own, norms, expected, TorchAttentionInput(rows.reshape(-1), [], []))
    got = store_qkv(output, trig, norms, found, slots.int(), num_heads=HEADS)
    return [(got[~padding], q), (found.k, expected.k), (found.v, expected.v)]


@pytest.mark.parametrize(
    ("head_dim", "rope", "norm"), [(12, False, False), (16, True, False), (20, True, True)]
)
@pytest.mark.parametrize("form", ["base", "by token", "by tile"])
def test_qkv_store(form: str, head_dim: int, rope: bool, norm: bool) -> None:
    widths = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    step = make_step(*(MIXED if form == "by tile" else DECODE))
    x = torch.randn(step.num_tokens, 32, device=DEVICE)
    site = make_site(32, widths)
    output = augmented(x, site, step, by_tile=form == "by tile")
    plain = reference(output.base, x, site, step).float()
    if form == "base":
        output, plain = SiteOutput(output.out, sum(widths)), output.base.contiguous()

    for got, expected in stored(output, plain, head_dim, torch.float32, rope=rope, norm=norm):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_qkv_store_rounds_like_its_reference(dtype: torch.dtype) -> None:
    plain = torch.randn(5, (HEADS + 2 * KV_HEADS) * 16, device=DEVICE).to(dtype)

    output = SiteOutput(plain.clone(), plain.shape[1])
    for got, expected in stored(output, plain, 16, dtype, rope=True, norm=True):
        torch.testing.assert_close(got, expected, **ROUNDED[dtype])


def test_qkv_store_into_an_fp8_cache() -> None:
    width = (HEADS + 2 * KV_HEADS) * 16
    plain = torch.randint(-15, 16, (3, width), device=DEVICE) / 8  # numbers that the format holds
    plain[0, -1] = 1e4  # and one that it does not
    shape = (2, KV_HEADS, 4, 16)
    cache = KVCache(*(torch.zeros(shape, dtype=torch.float8_e4m3fn, device=DEVICE) for _ in "kv"))
    slots = torch.tensor([5, 0, -1], dtype=torch.int32, device=DEVICE)

    store_qkv(SiteOutput(plain, width), None, None, cache, slots, num_heads=HEADS)

    v = plain.view(3, -1, 16)[:, HEADS + KV_HEADS :].clamp(max=448.0)
    assert torch.equal(cache.v.float()[1, :, 1], v[0])
    assert torch.equal(cache.v.float()[0, :, 0], v[1])
    assert torch.count_nonzero(cache.v.float()[0, :, 1:]) == 0
