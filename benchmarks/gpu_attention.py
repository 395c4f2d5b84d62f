"""What does the paged attention kernel cost, against its floor and against torch, and which tiles are best?

Random keys in the shape of a real model; nothing is downloaded. Every cell runs over as many layers'
caches as are beyond the device's own cache, in one CUDA graph, so that neither launches nor hits are
measured. Results are written after each cell: OUT/attention-SHAPE.json.

    python benchmarks/gpu_attention.py --shape llama --out DIR [--kv fp8] [--sweep]
    TRITON_INTERPRET=1 python benchmarks/gpu_attention.py --shape tiny --device cpu --out DIR  # does it work?

us          of the kernel, one layer: least of several runs
floor_us    keys and values read once at the copy rate, or the visible products at the matrix rate
torch_us    scaled_dot_product_attention on contiguous keys; one call if all sequences are alike
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from environment import describe
from gpu_machine import measure_machine
from gpu_shapes import SHAPES, Machine, Shape
from torch.nn.functional import scaled_dot_product_attention

from loramux.engine.kernels.attention import AttentionShape, BatchLayout, KVCache
from loramux.engine.step_buffers import StepLimits

Work = list[tuple[int, int]]  # of each sequence: tokens in the cache before, tokens computed
BLOCK_SIZE: Final = 16
BEYOND_CACHE: Final = 400 << 20  # bytes of keys and values; an H200 caches 50 MB
TRIES: Final = 7
CELLS: Final[dict[str, Work]] = {
    **{
        f"decode B={rows} ctx={context}": [(context - 1, 1)] * rows
        for rows, context in ((1, 1024), (32, 1024), (64, 1024), (128, 1024), (8, 4096), (1, 128), (1, 32768))
    },
    "decode one 30000 beside 31 x 200": [(29999, 1)] + [(199, 1)] * 31,
    **{f"prompt T={tokens}": [(0, tokens)] for tokens in (512, 2048, 8192)},
    "prompt T=4 x 512": [(0, 512)] * 4,
    "chunk of 50 behind 8192": [(8192, 50)],
    "chunk of 512 behind 16384": [(16384, 512)],
    "mixed 32 x 1024 and T=512": [(1023, 1)] * 32 + [(0, 512)],
}
TINY: Final[dict[str, Work]] = {"decode B=2 ctx=40": [(39, 1)] * 2, "chunk of 9 behind 20": [(20, 9)]}
SWEEP: Final = (
    {},
    *({"block_n": keys} for keys in (32, 128)),
    *({"num_warps": warps} for warps in (2, 4, 8)),
    *({"num_stages": stages} for stages in (2, 4)),
    *({"block_m": rows, "num_warps": 4} for rows in (64,)),
    *({"programs": programs} for programs in (88, 264, 528)),
    *({"min_keys": keys} for keys in (64, 256)),
    {"mask_all": True},
    {"mask_all": False},
)


class Bench:
    """One model's attention, with random caches."""

    def __init__(self, model: Shape, device: torch.device, machine: Machine, kv: str) -> None:
        self.device, self.machine = device, machine
        self.shape = AttentionShape(
            num_heads=model.heads,
            num_kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            block_size=BLOCK_SIZE,
            windows=(None,),
            dtype=torch.bfloat16,
            device=device,
            kv_dtype=torch.float8_e4m3fn if kv == "fp8" else None,
        )
        self._kernels = importlib.import_module("loramux.engine.kernels.gpu.attention")
        self._tiles = importlib.import_module("loramux.engine.kernels.gpu.attention_tiles")

    def cell(self, work: Work) -> dict[str, Any]:
        """Measure one step."""
        floor = self._floor_s(work)
        ours = self._ours_s(work)
        return {
            "us": ours * 1e6,
            "floor_us": floor * 1e6,
            "of_floor": floor / ours,
            "torch_us": self._torch_s(work) * 1e6,
        }

    def sweep(self, work: Work) -> Iterator[dict[str, Any]]:
        """Other tiles for the rows of a step, each with what changed."""
        kind = "decode" if work[0][1] == 1 else "prompt"
        for change in SWEEP:
            try:
                yield {**change, "us": self._ours_s(work, {kind: change}) * 1e6}
            except Exception as error:  # noqa: BLE001 tiles that do not fit are an answer, too
                yield {**change, "error": f"{type(error).__name__}: {str(error)[:80]}"}

    def _ours_s(self, work: Work, changes: dict[str, dict[str, Any]] | None = None) -> float:
        step = layout(work)
        tiles = self._tiles.tiles_of(self.shape)
        for kind, change in (changes or {}).items():
            tiles = replace(tiles, **{kind: replace(getattr(tiles, kind), **change)})
        limits = StepLimits(
            max_tokens=len(step.positions),
            max_seqs=len(work),
            max_blocks=max(len(ids) for ids in step.blocks),
            block_size=BLOCK_SIZE,
            num_lanes=0,
            vocab_size=0,
        )
        attention = self._kernels.GpuAttention(self.shape, limits, tiles=tiles)
        num_blocks = sum(len(ids) for ids in step.blocks)
        caches = [self._fill(attention.empty_cache(num_blocks)) for _ in range(self._layers(work))]
        q = torch.randn(
            len(step.positions), self.shape.num_heads, self.shape.head_dim, device=self.device
        ).to(self.shape.dtype)
        plan = attention.plan(step)
        return self._time([lambda own=own: attention.attend(q, own, plan, window=None) for own in caches])

    def _torch_s(self, work: Work) -> float:
        """Keys lie as torch likes them best: nothing is gathered."""
        s = self.shape
        groups = [(work[0], len(work))] if len(set(work)) == 1 else [(one, 1) for one in work]
        made = []
        for _ in range(self._layers(work)):
            calls = []
            for (before, count), rows in groups:
                q, k, v = (
                    torch.randn(rows, heads, tokens, s.head_dim, device=self.device).to(s.dtype)
                    for heads, tokens in (
                        (s.num_heads, count),
                        (s.num_kv_heads, before + count),
                        (s.num_kv_heads, before + count),
                    )
                )
                calls.append((q, k, v, self._mask(before, count), before == 0 and count > 1))
            made.append(calls)

        def run(calls: list[Any]) -> None:
            for q, k, v, mask, is_causal in calls:
                scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)

        return self._time([lambda own=own: run(own) for own in made])

    def _mask(self, before: int, count: int) -> torch.Tensor | None:
        if count == 1 or before == 0:
            return None
        keys = torch.arange(before + count, device=self.device)
        return keys[None] <= torch.arange(before, before + count, device=self.device)[:, None]

    def _floor_s(self, work: Work) -> float:
        s = self.shape
        keys = sum(before + count for before, count in work)
        visible = sum(count * before + count * (count + 1) // 2 for before, count in work)
        read = 2 * keys * s.num_kv_heads * s.head_dim * s.cache_dtype.itemsize
        flops = 4 * visible * s.num_heads * s.head_dim
        return max(read / self.machine.bytes_per_s, flops / self.machine.flops_per_s)

    def _layers(self, work: Work) -> int:
        s = self.shape
        one = 2 * sum(sum(pair) for pair in work) * s.num_kv_heads * s.head_dim * s.cache_dtype.itemsize
        return 1 if self.device.type == "cpu" else max(2, min(512, BEYOND_CACHE // one))

    def _fill(self, cache: KVCache) -> KVCache:
        for own in (cache.k, cache.v):
            for blocks in own.split(4096):
                blocks.copy_(torch.randn(blocks.shape, device=self.device))
        return cache

    def _time(self, calls: list[Callable[[], Any]]) -> float:
        """Seconds a call; each runs once before, which compiles."""
        for call in calls[:1] * 2:
            call()
        if self.device.type == "cpu":
            began = time.perf_counter()
            calls[0]()
            return time.perf_counter() - began
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        found = []
        for _ in range(TRIES):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000 / len(calls))
        return min(found)


def layout(work: Work) -> BatchLayout:
    """The step; blocks lie scattered, as in a cache that was used for a while."""
    starts, counts = (np.array(column, dtype=np.int64) for column in zip(*work, strict=True))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(len(work)), counts)
    positions = np.arange(offsets[-1]) - offsets[:-1][owner] + starts[owner]
    sizes = -(-(starts + counts) // BLOCK_SIZE)
    ids = np.random.default_rng(0).permutation(int(sizes.sum()))
    blocks = np.split(ids, np.cumsum(sizes)[:-1])
    return BatchLayout(starts + counts, counts, offsets, owner, positions, blocks, int((counts == 1).sum()))


def main() -> None:
    """Measure every cell; with --sweep other tiles for each, too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--kv", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--sweep", action="store_true", help="try other tiles as well")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no cell is begun after it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_attention.py: torch finds no CUDA device here; nothing was measured")
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit(
            "gpu_attention.py: --device cpu needs TRITON_INTERPRET=1 and proves nothing but itself"
        )
    deadline, device = time.perf_counter() + arguments.budget_s, torch.device(arguments.device)
    bench = Bench(SHAPES[arguments.shape], device, measure_machine(device), arguments.kv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = {}
    result = {"environment": describe(), "shape": arguments.shape, "kv": arguments.kv, "cells": cells}
    for name, work in (TINY if arguments.shape == "tiny" else CELLS).items():
        if time.perf_counter() > deadline:
            print("the budget is used up")
            break
        with torch.inference_mode():
            cells[name] = bench.cell(work)
            if arguments.sweep:
                cells[name]["sweep"] = list(bench.sweep(work))
        figures = " ".join(f"{key}={value:.3g}" for key, value in cells[name].items() if key != "sweep")
        print(f"{name}: {figures}", flush=True)
        for other in cells[name].get("sweep", ()):
            print("   ", *(f"{key}={value}" for key, value in other.items()), flush=True)
        (arguments.out / f"attention-{arguments.shape}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
