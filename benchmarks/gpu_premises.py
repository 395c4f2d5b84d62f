"""What the plans of the linear sites rest on, measured: see docs/adr on augmented products.

boundary  what one more kernel costs in a graph, with and without programmatic dependent launch
products  what N + rows of lanes cost over N rows, at every site and size of a step
plans     each plan of each site, with its reader, over the base; the best ones as a table
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch
import triton
import triton.language as tl
from gpu_chain import Chain, Load, seconds_of, sites_of
from gpu_shapes import Shape
from torch.nn import functional

from loramux.engine.kernels.gpu.site_plan import Shrink, SitePlan, always

Rows = Iterator[dict[str, Any]]
POOL: Final = 2048  # lanes
BOUNDARIES: Final = 256  # kernels in a row
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)  # tokens of decode steps
PROMPTS: Final = (256, 1024, 4096)
PLANS: Final = {
    "augmented, fused": SitePlan(shrink=Shrink.AUGMENTED, is_fused=True, by_tile=False),
    "augmented, fused by tile": SitePlan(shrink=Shrink.AUGMENTED, is_fused=True, by_tile=True),
    "augmented, expand": SitePlan(shrink=Shrink.AUGMENTED, is_fused=False, by_tile=False),
    "augmented, expand by tile": SitePlan(shrink=Shrink.AUGMENTED, is_fused=False, by_tile=True),
    "product, fused": SitePlan(shrink=Shrink.PRODUCT, is_fused=True, by_tile=False),
    "product, expand by tile": SitePlan(shrink=Shrink.PRODUCT, is_fused=False, by_tile=True),
    "shrink in 8, fused": SitePlan(shrink=Shrink.TILES, is_fused=True, by_tile=False, planes=8),
    "shrink in 4, fused by tile": SitePlan(shrink=Shrink.TILES, is_fused=True, by_tile=True, planes=4),
    "shrink, fused by tile": SitePlan(shrink=Shrink.TILES, is_fused=True, by_tile=True),
    "shrink in 4, expand by tile": SitePlan(shrink=Shrink.TILES, is_fused=False, by_tile=True, planes=4),
    "shrink, expand by tile": SitePlan(shrink=Shrink.TILES, is_fused=False, by_tile=True),
}


@triton.jit
def _touch(x: tl.tensor, PDL: tl.constexpr) -> None:
    """Next to nothing, after the kernel before."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(x + i, tl.load(x + i) + 1.0)


def boundary(_: Shape, device: torch.device) -> Rows:
    """Microseconds of one of many dependent kernels that do next to nothing."""
    for programs in (1, 132, 1056):
        x = torch.zeros(128 * programs, device=device)
        for pdl in (False, True):
            if pdl and device.type != "cuda":
                continue
            options = {"launch_pdl": True} if pdl else {}

            def run(x: torch.Tensor = x, pdl: bool = pdl, options: dict[str, Any] = options) -> None:
                for _ in range(BOUNDARIES if device.type == "cuda" else 1):
                    _touch[x.numel() // 128,](x, PDL=pdl, num_warps=4, **options)

            seconds = seconds_of(run, device) / BOUNDARIES
            yield {"programs": programs, "pdl": pdl, "us": round(1e6 * seconds, 3)}


def products(shape: Shape, device: torch.device) -> Rows:
    """The product alone, with the rows of so many lanes behind the weight."""
    for site in sites_of(shape):
        chain = Chain(shape, site, 256, device)
        for tokens in SIZES:
            x = chain.input(tokens)
            base = 0.0
            for num_lanes in (0, 64, 128, 256):
                rows = chain.lanes[0].product_rows(num_lanes) if num_lanes else site.out_features
                weights = [chain.weight(i)[:rows] for i in range(chain.length)]

                def run(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                    for weight in weights:
                        functional.linear(x, weight)

                seconds = seconds_of(run, device) / chain.length
                base = base or seconds
                row_bytes = site.in_features * chain.dtype.itemsize
                yield {
                    "site": site.name,
                    "tokens": tokens,
                    "lanes": num_lanes,
                    "us": round(1e6 * seconds, 2),
                    "over_base": round(seconds / base - 1, 4),
                    "over_bytes": round(seconds / base - rows / site.out_features, 4),
                    "tb_per_s": round(rows * row_bytes / seconds / 1e12, 2),
                }


def plans(shape: Shape, device: torch.device) -> Rows:
    """Each plan with its reader, over the same without LoRA."""
    for site in sites_of(shape):
        chain = Chain(shape, site, POOL, device)
        for tokens in SIZES + PROMPTS if device.type == "cuda" else (2,):
            base = chain.seconds(Load(tokens, 0, 0), always(PLANS["shrink, fused by tile"]))
            for adapters, rank in ((1, 16), (8, 16), (min(tokens, 128), 16), (1, 64), (8, 64)):
                if adapters > tokens:
                    continue
                load = Load(tokens, adapters, rank)
                for name, plan in PLANS.items():
                    if not _is_sensible(plan, tokens):
                        continue
                    seconds = chain.seconds(load, always(plan))
                    yield {
                        "site": site.name,
                        "tokens": tokens,
                        "adapters": adapters,
                        "rank": rank,
                        "lanes": load.lora(POOL, device).num_lanes,  # type: ignore[union-attr]
                        "plan": name,
                        "us": round(1e6 * seconds, 2),
                        "base_us": round(1e6 * base, 2),
                    }
        del chain
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _is_sensible(plan: SitePlan, tokens: int) -> bool:
    if tokens > 128:
        return plan.by_tile and plan.shrink is Shrink.TILES
    return tokens <= 64 or plan.by_tile


def write_plans(found: list[dict[str, Any]], path: Path) -> None:
    """The best plan of each site, step and bucket of lanes as a table for `site_plan.py`.

    Loads with the same bucket count alike: what a captured graph cannot tell apart, the table must not.
    """
    costs: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    for row in found:
        by_plan = costs.setdefault((row["site"], row["tokens"], row["lanes"]), {})
        by_plan.setdefault(row["plan"], []).append(row["us"] / row["base_us"])
    rules: list[dict[str, Any]] = []
    for (site, tokens, lanes), by_plan in sorted(costs.items(), key=lambda item: item[0][1:]):
        best = min(by_plan, key=lambda name: mean(by_plan[name]))
        bounds = {"sites": [site], "max_tokens": tokens, "max_lanes": lanes}
        rules.append(bounds | _entry(PLANS[best]))
    rules.append(_entry(PLANS["shrink, expand by tile"]))
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(rule)}" for rule in rules) + "\n]\n")


def _entry(plan: SitePlan) -> dict[str, Any]:
    return {
        "shrink": plan.shrink.value,
        "expand": "fused" if plan.is_fused else "separate",
        "by_tile": plan.by_tile,
        "planes": plan.planes,
    }
