"""The sites at the shapes of Llama-3.1-8B in bfloat16, on the device itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.kernels.gpu.activation import activate
from loramux.engine.kernels.gpu.lora import expanded
from loramux.engine.kernels.gpu.norm import rms_norm
from loramux.engine.kernels.gpu.parts import GpuSite
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.kernels.gpu.site_plan import Shrink, SitePlan, always, read_plans
from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.layers.linear import Linear
from tests.engine.kernels.gpu.lora_sites import ADAPTERS, Step, make_site, make_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HIDDEN, INNER = 4096, 14336
SITES = {
    "qkv": (HIDDEN, [4096, 1024, 1024]),
    "mlp_in": (HIDDEN, [INNER, INNER]),
    "mlp_out": (INNER, [HIDDEN]),
}
STEPS: dict[str, tuple[list[LaneSpan | None], list[int], int]] = {
    "1 token": ([ADAPTERS[1]], [1], 0),
    "8 tokens": ([None, *ADAPTERS, *ADAPTERS[2:], None], [1] * 8, 0),
    "64 tokens": ([None, *ADAPTERS], [1, 20, 9, 17, 13], 4),
    "prompts": ([ADAPTERS[3], None, ADAPTERS[2]], [700, 100, 300], 0),
    "long prompts": ([ADAPTERS[3], None, ADAPTERS[2]], [3000, 100, 1500], 0),
}
PLANS = {
    "augmented": SitePlan(shrink=Shrink.AUGMENTED, is_fused=True, by_tile=False),
    "augmented, by tile": SitePlan(shrink=Shrink.AUGMENTED, is_fused=True, by_tile=True),
    "a product of its own": SitePlan(shrink=Shrink.PRODUCT, is_fused=False, by_tile=True),
    "in planes": SitePlan(shrink=Shrink.TILES, is_fused=True, by_tile=False, planes=8),
    "in planes, by tile": SitePlan(shrink=Shrink.TILES, is_fused=True, by_tile=True, planes=4),
    "separate": SitePlan(shrink=Shrink.TILES, is_fused=False, by_tile=True),
}


def by_segment(base: Tensor, x: Tensor, site: SiteLanes, step: Step) -> Tensor:
    """What the site should yield, in float64."""
    out = base.double()
    for s in step.segments:
        lanes = slice(s.first_lane, s.first_lane + s.rank)
        for part, b in enumerate(site.b):
            h = x[s.begin : s.end].double() @ site.a[lanes, part].double().T
            out[s.begin : s.end, site.offsets[part] : site.offsets[part + 1]] += h @ b[lanes].double()
    return out


def site_output(name: str, step: Step, plan: SitePlan | None) -> tuple[SiteOutput, Tensor]:
    """What a site yields, and what it should."""
    in_features, widths = SITES[name]
    site = make_site(in_features, widths, dtype=torch.bfloat16)
    assert site.weight is not None
    weight = site.weight[: sum(widths)]
    x = torch.randn(step.num_tokens, in_features, device="cuda").bfloat16()
    plans = read_plans() if plan is None else always(plan)
    output = GpuSite(name, Linear(weight), site, None, plans)(x, step.lora)
    base = torch.nn.functional.linear(x.float(), weight.float())
    return output, by_segment(base, x, site, step)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within the roundings of bfloat16, of which h's are the largest."""
    assert torch.isfinite(found).all()
    error = (found.double() - expected).abs()
    assert error.max() <= 0.03 * expected.abs().max()
    assert error.pow(2).mean().sqrt() <= 0.006 * expected.pow(2).mean().sqrt()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("plan", [None, *PLANS])
def test_expand(site: str, step: str, plan: str | None) -> None:
    planned = make_step(*STEPS[step])
    output, expected = site_output(site, planned, PLANS[plan] if plan else None)

    assert_near(expanded(output).base, expected)


@pytest.mark.parametrize("step", STEPS)
def test_activation(step: str) -> None:
    output, expected = site_output("mlp_in", make_step(*STEPS[step]), None)
    gate, up = expected.chunk(2, dim=-1)

    assert_near(activate(output, "silu", is_gated=True), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("step", STEPS)
def test_norm(step: str) -> None:
    planned = make_step(*STEPS[step])
    output, expected = site_output("mlp_out", planned, None)
    x = torch.randn(planned.num_tokens, HIDDEN, device="cuda").bfloat16()
    weight = torch.rand(HIDDEN, device="cuda").bfloat16()
    total = x.double() + expected
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()

    found = rms_norm(x, output, weight, 1e-5)

    assert_near(x, total)
    assert_near(found, normed)


READERS: dict[str, Callable[[SiteOutput], Any]] = {
    "qkv": lambda y: expanded(y).base,
    "mlp_in": lambda y: activate(y, "silu", is_gated=True),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", READERS)
def test_the_same_step_gives_the_same_bits(name: str, plan: str) -> None:
    in_features, widths = SITES[name]
    step = make_step(*STEPS["64 tokens"])
    site = make_site(in_features, widths, dtype=torch.bfloat16)
    assert site.weight is not None
    x = torch.randn(step.num_tokens, in_features, device="cuda").bfloat16()
    own = GpuSite(name, Linear(site.weight[: sum(widths)]), site, None, always(PLANS[plan]))
    first = READERS[name](own(x, step.lora))

    for _ in range(5):
        assert torch.equal(READERS[name](own(x, step.lora)), first)
