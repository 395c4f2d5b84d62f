"""One linear site and the kernel that reads it, as they stand in a layer, timed alone.

A chain is the site of several layers in a row, each with weights of its own, so that no weight comes from
the cache; on a GPU it is captured and replayed, so that launches cost what they cost in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from gpu_shapes import Shape
from torch import Tensor

from loramux.engine.adapters.lane_memory import LaneLayout, site_lanes
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.config import LANE_GROUP
from loramux.engine.kernels.attention import KVCache
from loramux.engine.kernels.gpu import lora_input
from loramux.engine.kernels.gpu.activation import activate
from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.gpu.norm import rms_norm
from loramux.engine.kernels.gpu.parts import GpuSite
from loramux.engine.kernels.gpu.qkv import store_qkv
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.kernels.gpu.site_plan import PlanTable
from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.layers.linear import Linear
from loramux.engine.models.families import Site, SitePart
from loramux.engine.step_buffers import StepBuffers, StepLimits

KV_BLOCK = 16
CHAIN_BYTES = 1 << 30  # of weights: far more than a cache holds
REPLAYS = 10  # of one measurement
MEASUREMENTS = 5  # of which the median counts


def sites_of(shape: Shape) -> list[Site]:
    """The four sites of a layer."""
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        Site("qkv", shape.hidden, (SitePart("q", heads), SitePart("k", kv), SitePart("v", kv)), bias=False),
        Site("attn_out", heads, (SitePart("o", shape.hidden),), bias=False),
        Site("mlp_in", shape.hidden, (SitePart("g", shape.inner), SitePart("u", shape.inner)), bias=False),
        Site("mlp_out", shape.inner, (SitePart("d", shape.hidden),), bias=False),
    ]


@dataclass(frozen=True)
class Load:
    """Who the tokens of a step belong to: adapters of one rank in turn, or nobody."""

    tokens: int
    adapters: int
    rank: int

    @property
    def spans(self) -> list[LaneSpan | None]:
        """Of sequences: one a token in a small step, else one an adapter."""
        if not self.adapters:
            return [None]
        held = -(-self.rank // LANE_GROUP) * LANE_GROUP
        own = [LaneSpan(i * held, held, self.rank) for i in range(self.adapters)]
        return [own[i * self.adapters // self.num_seqs] for i in range(self.num_seqs)]

    @property
    def num_seqs(self) -> int:
        """Each decodes one token, unless there are more tokens than that."""
        return self.tokens if self.tokens <= 128 else max(self.adapters, 1)

    def lora(self, pool: int, device: torch.device) -> GpuLoraInput | None:
        """As the kernels read it."""
        limits = StepLimits(
            max_tokens=self.tokens,
            max_seqs=self.num_seqs,
            max_blocks=1,
            block_size=KV_BLOCK,
            num_lanes=pool,
            vocab_size=1,
        )
        buffers = StepBuffers(lora_input.fields(limits), device)
        offsets = np.linspace(0, self.tokens, self.num_seqs + 1).astype(np.int64)
        if self.adapters:
            lora_input.fill(buffers.host, self.spans, offsets, self.tokens)
            buffers.upload()
        return lora_input.view(
            buffers.device,
            self.tokens,
            self.num_seqs,
            num_lanes=lora_input.lanes_in_use(self.spans, pool) if self.adapters else 0,
            decode_only=self.tokens == self.num_seqs,
        )


class Chain:
    """A site of some layers with random weights and lanes."""

    def __init__(self, shape: Shape, site: Site, pool: int, device: torch.device) -> None:
        self.site = site
        self._shape = shape
        self._device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        row_bytes = site.in_features * self.dtype.itemsize
        self.length = max(2, CHAIN_BYTES // (site.out_features * row_bytes)) if device.type == "cuda" else 1
        self.lanes: list[SiteLanes] = []
        for index in range(self.length):
            lanes = site_lanes(site, index, pool, LaneLayout.BEHIND_WEIGHT, dtype=self.dtype, device=device)
            assert lanes.weight is not None
            for tensor in (lanes.weight, *lanes.b):
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
            self.lanes.append(lanes)

    def weight(self, index: int) -> Tensor:
        """[rows, in_features] of one layer: the base weight and all lanes."""
        weight = self.lanes[index].weight
        assert weight is not None
        return weight

    def input(self, tokens: int) -> Tensor:
        """[tokens, in_features]."""
        return torch.randn((tokens, self.site.in_features), dtype=self.dtype, device=self._device)

    def reader(self, tokens: int) -> Callable[[SiteOutput], object]:
        """The kernel that reads the site's output."""
        if self.site.name == "mlp_in":
            return lambda y: activate(y, "silu", is_gated=True)
        if self.site.name != "qkv":
            weight = torch.ones(self.site.out_features, dtype=self.dtype, device=self._device)
            x = torch.zeros((tokens, self.site.out_features), dtype=self.dtype, device=self._device)
            return lambda y: rms_norm(x, y, weight, 1e-5)
        s = self._shape
        shape = (tokens // KV_BLOCK + 1, s.kv_heads, KV_BLOCK, s.head_dim)
        cache = KVCache(*(torch.zeros(shape, dtype=self.dtype, device=self._device) for _ in "kv"))
        slots = torch.arange(tokens, dtype=torch.int32, device=self._device)
        angles = torch.rand((2, tokens, 1, s.head_dim), dtype=self.dtype, device=self._device)
        return lambda y: store_qkv(y, (angles[0], angles[1]), None, cache, slots, num_heads=s.heads)

    def seconds(self, load: Load, plans: PlanTable) -> float:
        """Of the site and its reader in one layer."""
        width = self.site.out_features
        sites = [
            GpuSite(self.site.name, Linear(self.weight(i)[:width]), self.lanes[i], None, plans)
            for i in range(self.length)
        ]
        x, read = self.input(load.tokens), self.reader(load.tokens)
        lora = load.lora(self.lanes[0].a.shape[0], self._device)

        def run() -> None:
            for site in sites:
                read(site(x, lora))

        return seconds_of(run, self._device) / self.length


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one run: replayed from a graph on a GPU; once by the clock on a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles kernels, and libraries choose theirs
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    found = []
    for _ in range(MEASUREMENTS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / REPLAYS)
    return median(found)
