"""The tables that ship are whole: every step finds its plan and every launch its tile."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from loramux.engine.kernels.gpu.site_plan import Shrink, read_plans
from loramux.engine.kernels.gpu.tiles import Tile, forced, read_rules, tile

SITES = ("qkv", "attn_out", "mlp_in", "mlp_out")
TOKENS = (1, 3, 16, 33, 128, 129, 513, 8192)
LANES = (8, 64, 256, 512, 4096)


@pytest.mark.parametrize("site", SITES)
def test_every_step_has_a_plan(site: str) -> None:
    plans = read_plans()
    for tokens, lanes, decode_only in product(TOKENS, LANES, (False, True)):
        plan = plans.plan(site, tokens, lanes, decode_only)
        assert plan.shrink is Shrink.TILES or plan.planes == 1, "a product has its shrink in one plane"
        assert not (plan.shrink is not Shrink.TILES and tokens > 128), (
            "each token would be multiplied with every lane"
        )
        assert plan.by_tile or tokens <= 32, "each token would read its lanes by itself"


def test_the_first_plan_that_fits_decides(tmp_path: Path) -> None:
    anywhere = {"shrink": "tiles", "expand": "separate", "by_tile": True}
    first = {"sites": ["qkv"], "max_tokens": 8, "max_lanes": 64, "decode_only": True}
    path = tmp_path / "plans.json"
    path.write_text(
        json.dumps([first | {"shrink": "augmented", "expand": "fused", "by_tile": False}, anywhere])
    )
    plans = read_plans(path)

    assert plans.plan("qkv", 8, 64, True).shrink is Shrink.AUGMENTED
    for other in (("mlp_in", 8, 64, True), ("qkv", 9, 64, True), ("qkv", 8, 65, True), ("qkv", 8, 64, False)):
        assert plans.plan(*other).shrink is Shrink.TILES


def test_every_launch_has_a_tile() -> None:
    for kernel, tokens, lanes in product(read_rules(), TOKENS, (0, *LANES)):
        found = tile(kernel, (123, 456), lanes, tokens)
        for size in (found.rows, found.columns, found.num_warps, found.features):
            assert size & (size - 1) == 0 or kernel == "shrink", "Triton's blocks are powers of two"
        assert kernel == "norm" or found.lanes >= 16, "a tensor core takes 16 at once"


def test_the_tuner_overrules_the_table() -> None:
    only = Tile(rows=3)
    with forced("qkv", only):
        assert tile("qkv", (1, 1), 0, 1) == only
    assert tile("qkv", (1, 1), 0, 1) != only
