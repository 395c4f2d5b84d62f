"""Find the best way to launch each kernel of the linear sites, and write it into the table.

    python benchmarks/tune_tiles.py --shape llama [--kernel qkv …] [--table FILE]

Every candidate is timed in a graph, behind its product and with weights that no cache holds. A kernel's
rules for other shapes, and those for any shape, stay. The table is written after each finding, so that
a run may be cut short and begun again with the kernels that are left.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from gpu_shapes import SHAPES, Shape

from loramux.engine.kernels.gpu.site_plan import Shrink, SitePlan, always, read_plans
from loramux.engine.kernels.gpu.tiles import TABLE, Rule, Tile, forced, read_rules

POOL: Final = 1024  # lanes
SIZES: Final = (1, 4, 16, 32, 64, 128, 512, 2048, 8192)  # tokens; a rule holds up to its own
LOADS: Final = ((0, 0), (1, 16), (8, 16), (8, 64))  # adapters, rank; a rule holds for its bucket of lanes
KERNELS: Final[dict[str, tuple[str, ...]]] = {  # and the sites where each runs
    "qkv": ("qkv",),
    "activation": ("mlp_in",),
    "norm": ("attn_out",),
    "shrink": ("qkv", "attn_out", "mlp_in", "mlp_out"),
    "expand": ("qkv", "attn_out", "mlp_in", "mlp_out"),
}


def candidates(kernel: str, *, has_lora: bool) -> Iterator[Tile]:
    """Ways to launch a kernel that may be the best."""
    lanes = (16, 32) if has_lora else (16,)
    rows = (1,) if has_lora else (1, 2, 4, 8)
    if kernel == "qkv":
        for n, r, w in itertools.product(rows, lanes, (1, 2, 4)):
            yield Tile(rows=n, lanes=r, num_warps=w)
    elif kernel == "activation":
        for n, c, r, w in itertools.product(rows, (64, 128, 256, 512), lanes, (1, 2, 4, 8)):
            if 32 <= c * n // w <= 1024:
                yield Tile(rows=n, columns=c, lanes=r, num_warps=w)
    elif kernel == "norm":
        for r, w in itertools.product((2, 4, 8) if has_lora else (8,), (4, 8, 16, 32)):
            yield Tile(lanes=r, num_warps=w, num_stages=1)
    elif kernel == "shrink":
        for n, c, j, k, s in itertools.product((16, 32, 64), (1, 3), (32, 64), (64, 128, 256), (2, 3, 4)):
            yield Tile(rows=n, columns=c, lanes=j, features=k, num_warps=4, num_stages=s)
    else:
        for c, r, w in itertools.product((64, 128, 256), lanes, (1, 2, 4, 8)):
            yield Tile(columns=c, lanes=r, num_warps=w)


def key_of(kernel: str, shape: Shape, site: Any) -> tuple[int, int]:
    """The shape by which a kernel asks for its tile."""
    if kernel == "qkv":
        return shape.head_dim, site.out_features
    if kernel == "activation":
        return shape.inner, site.out_features
    return (site.out_features if kernel == "norm" else site.in_features), site.out_features


def plan_for(kernel: str, site: str, tokens: int, num_lanes: int) -> SitePlan | None:
    """The plan in which a site runs this kernel; None where it does not."""
    plan = read_plans().plan(site, tokens, num_lanes, tokens <= 128)
    runs = {"shrink": plan.shrink is Shrink.TILES, "expand": not plan.is_fused}
    runs["norm"] = num_lanes == 0 or (plan.is_fused and not plan.by_tile)
    return plan if runs.get(kernel, True) and (num_lanes or kernel not in ("shrink", "expand")) else None


def write(path: Path, rules: dict[str, list[Rule]]) -> None:
    """The table as its reader takes it, a rule a line."""
    default = asdict(Tile())
    parts = []
    for kernel, own in rules.items():
        lines = []
        for rule in own:
            bounds = {"shape": rule.shape, "max_lanes": rule.max_lanes, "max_tokens": rule.max_tokens}
            entry: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
            entry["tile"] = {k: v for k, v in asdict(rule.tile).items() if v != default[k]}
            lines.append(f"    {json.dumps(entry)}")
        parts.append(f'  "{kernel}": [\n' + ",\n".join(lines) + "\n  ]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    """Tune some kernels for one shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--budget-s", type=float, default=540.0, help="nothing is begun after it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_tiles.py: torch finds no CUDA device here; the table stays as it is")
    chains = importlib.import_module("gpu_chain")
    shape, device = SHAPES[arguments.shape], torch.device("cuda")
    rules = read_rules(arguments.table)
    deadline = time.perf_counter() + arguments.budget_s
    for kernel, site in itertools.product(arguments.kernel, chains.sites_of(shape)):
        if site.name not in KERNELS[kernel]:
            continue
        key = key_of(kernel, shape, site)
        rules[kernel] = [rule for rule in rules[kernel] if rule.shape != key]
        chain = chains.Chain(shape, site, POOL, device)
        found: list[Rule] = []
        for tokens, (adapters, rank) in itertools.product(SIZES, LOADS):
            if time.perf_counter() > deadline or adapters > tokens:
                continue
            load = chains.Load(tokens, adapters, rank)
            lora = load.lora(POOL, device)
            num_lanes = lora.num_lanes if lora else 0
            plan = plan_for(kernel, site.name, tokens, num_lanes)
            if plan is None or any((r.max_tokens, r.max_lanes) == (tokens, num_lanes) for r in found):
                continue
            best = _best(chain, load, kernel, plan)
            print(kernel, key, f"tokens={tokens} lanes={num_lanes}", best, flush=True)
            found.append(Rule(shape=key, max_lanes=num_lanes, max_tokens=tokens, tile=best))
            own = sorted(found, key=lambda rule: (rule.max_tokens, rule.max_lanes))
            write(arguments.table, rules | {kernel: own + rules[kernel]})
        rules[kernel] = sorted(found, key=lambda rule: (rule.max_tokens, rule.max_lanes)) + rules[kernel]
        del chain
        torch.cuda.empty_cache()


@torch.inference_mode()
def _best(chain: Any, load: Any, kernel: str, plan: SitePlan) -> Tile:
    times: dict[Tile, float] = {}
    for candidate in candidates(kernel, has_lora=load.adapters > 0):
        with forced(kernel, candidate):
            try:
                times[candidate] = chain.seconds(load, always(plan))
            except Exception as error:  # noqa: BLE001 the compiler refuses what does not fit
                print(f"  {candidate}: {error!r}"[:200])
    return min(times, key=times.__getitem__)


if __name__ == "__main__":
    main()
