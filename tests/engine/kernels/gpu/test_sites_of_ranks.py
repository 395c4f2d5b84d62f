"""A site cut by its input features: each rank has one term of base output and shrink."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramux.engine.kernels.gpu.lora import expanded
from loramux.engine.kernels.gpu.parts import GpuSite
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.kernels.gpu.site_plan import Shrink, SitePlan, always
from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.layers.linear import Linear
from loramux.engine.parallel.peers import Peers
from tests.engine.kernels.gpu.lora_sites import DECODE, make_site, make_step, reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs two devices of the kind it runs on")

RANKS, IN, OUT = 2, 32, 24
FUSED = SitePlan(shrink=Shrink.AUGMENTED, is_fused=True, by_tile=False)
APART = SitePlan(shrink=Shrink.TILES, is_fused=False, by_tile=False)


def columns(x: Tensor, rank: int) -> Tensor:
    """A rank's input features."""
    return x[:, rank * IN // RANKS : (rank + 1) * IN // RANKS].contiguous()


def site_of(site: SiteLanes, rank: int, plan: SitePlan, peers: Peers | None) -> GpuSite:
    """A rank's columns of weight and A; B is whole on each."""
    assert site.weight is not None
    weight = columns(site.weight, rank)
    a = weight[OUT : OUT + site.a.shape[0]].view(-1, 1, IN // RANKS)
    own = SiteLanes(a, site.b, site.offsets, weight=weight)
    return GpuSite("attn_out", Linear(weight[:OUT]), own, peers, always(plan))


def test_ranks_sum_the_shrink_with_the_base_output(tmp_path: Path) -> None:
    site, step = make_site(IN, [OUT]), make_step(*DECODE)
    x = torch.randn(step.num_tokens, IN)
    assert site.weight is not None

    def run(rank: int) -> SiteOutput:
        peers = Peers(rank, RANKS, tmp_path / "store", torch.device("cpu"))
        try:
            return site_of(site, rank, FUSED, peers)(columns(x, rank), step.lora)
        finally:
            peers.close()

    with ThreadPoolExecutor(RANKS) as threads:  # nothing in them is launched before the sum
        outputs = list(threads.map(run, range(RANKS)))

    expected = reference(x @ site.weight[:OUT].T, x, site, step)
    for output in outputs:
        torch.testing.assert_close(expanded(output).base.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_shrink_apart_is_a_term_of_the_sum_once_expanded() -> None:
    site, step = make_site(IN, [OUT]), make_step(*DECODE)
    x = torch.randn(step.num_tokens, IN)
    assert site.weight is not None

    terms = [site_of(site, rank, APART, None)(columns(x, rank), step.lora) for rank in range(RANKS)]

    expected = reference(x @ site.weight[:OUT].T, x, site, step)
    total = torch.stack([term.base.double() for term in terms]).sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
