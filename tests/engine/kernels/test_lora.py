from __future__ import annotations

import pytest
import torch

from loramux.engine.kernels.lora import Segment, SiteLanes, apply_lora, plan_lora, reference_lora

IN, WIDTHS, LANES = 12, [8, 4, 4], 48


def site(dtype: torch.dtype = torch.float32) -> SiteLanes:
    torch.manual_seed(0)
    return SiteLanes(
        a=torch.randn(LANES, len(WIDTHS), IN, dtype=dtype),
        b=[torch.randn(LANES, width, dtype=dtype) for width in WIDTHS],
        offsets=[sum(WIDTHS[:i]) for i in range(len(WIDTHS) + 1)],
    )


# popularity of adapters among 12 decode tokens and the prompt tokens after them
CASES = {
    "distinct": ([Segment(i, i + 1, 8 * (i % 6), 3 + i % 5) for i in range(12)], 12),
    "identical": ([Segment(0, 12, 8, 8)], 12),
    "one adapter among base rows": ([Segment(5, 6, 16, 5)], 12),
    "mixed ranks and base rows": ([Segment(1, 4, 0, 4), Segment(4, 5, 8, 16), Segment(9, 12, 24, 17)], 12),
    "prompts only": ([Segment(0, 30, 0, 8), Segment(40, 70, 8, 33)], 0),
    "decode and prompts": ([Segment(0, 4, 0, 8), Segment(4, 12, 8, 8), Segment(12, 70, 0, 8)], 12),
}


@pytest.mark.parametrize("case", CASES)
def test_both_regimes_equal_the_reference(case: str) -> None:
    segments, num_decode = CASES[case]
    pool = site()
    x = torch.randn(70, IN)
    base = torch.randn(70, sum(WIDTHS))
    expected, out = base.clone(), base.clone()
    reference_lora(expected, x, pool, segments)

    plan = plan_lora(segments, num_decode, dtype=torch.float32, device=torch.device("cpu"))
    assert plan is not None
    apply_lora(out, x, pool, plan)

    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    untouched = torch.ones(70, dtype=torch.bool)
    for s in segments:
        untouched[s.begin : s.end] = False
    assert torch.equal(out[untouched], base[untouched])


def test_base_only_step_has_no_plan() -> None:
    assert plan_lora([], 8, dtype=torch.float32, device=torch.device("cpu")) is None


def test_another_adapters_lanes_do_not_reach_a_row() -> None:
    pool = site()
    x = torch.randn(12, IN)
    out, other = torch.zeros(12, 16), torch.zeros(12, 16)
    segments = [Segment(0, 1, 0, 8), Segment(1, 12, 8, 8)]
    plan = plan_lora(segments, 12, dtype=torch.float32, device=torch.device("cpu"))
    assert plan is not None
    assert plan.masked is not None
    apply_lora(out, x, pool, plan)

    pool.a[8:16] *= 1000
    apply_lora(other, x, pool, plan)

    assert torch.equal(out[0], other[0])
    assert not torch.equal(out[1:], other[1:])
