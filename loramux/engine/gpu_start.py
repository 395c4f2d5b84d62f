"""The parts of a step that only a GPU has, put together; imports Triton's kernels.

The runner imports it where a GPU is: Triton is no dependency of an installation without one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loramux.engine.adapters.transfer import LaneTransfer
from loramux.engine.adapters.weights import LanePool
from loramux.engine.config import EngineConfig
from loramux.engine.cuda_graph import (
    CudaRecorder,
    Recorder,
    RerunRecorder,
    StepGraphs,
    StepShape,
    graph_shapes,
)
from loramux.engine.errors import InvalidConfig
from loramux.engine.gpu_input import GpuInputs
from loramux.engine.gpu_step import GpuSteps
from loramux.engine.kernels.attention import KVCache
from loramux.engine.kernels.gpu.attention import GpuAttention
from loramux.engine.kernels.gpu.lora_input import lane_buckets
from loramux.engine.kernels.gpu.parts import GpuParts
from loramux.engine.kernels.gpu.sampling import TritonSampler
from loramux.engine.kernels.gpu.scatter import scatter
from loramux.engine.layers import device_sampler
from loramux.engine.layers.device_sampler import DeviceSampler
from loramux.engine.models.decoder import Decoder
from loramux.engine.parallel.peers import Peers
from loramux.engine.parallel.shard import Shard
from loramux.engine.step_buffers import StepLimits

logger = logging.getLogger(__name__)

__all__ = ["GpuAttention", "GpuParts", "lane_transfer", "prepare"]

LARGEST_OFFSET: Final = 2**31 - 1


def lane_transfer(pool: LanePool, shard: Shard, *, host_bytes: int, device: torch.device) -> LaneTransfer:
    """How adapters come into lanes."""
    return LaneTransfer(pool, shard, scatter, host_bytes=host_bytes, device=device)


@dataclass(frozen=True, slots=True)
class GpuStart:
    """Everything but the KV cache of the steps of one model."""

    steps: GpuSteps
    attention: GpuAttention
    graphs: StepGraphs
    num_layers: int
    device: torch.device

    def reserves(self) -> list[tuple[str, int]]:
        """What computing will take, measured: (what, bytes). Nothing on a CPU."""
        if self.device.type != "cuda":
            return []
        cache = self.attention.empty_cache(1)
        caches = [cache] * self.num_layers
        self.steps.largest(caches)  # compiles kernels, and libraries take what they need
        activations = _peak(self.device, lambda: self.steps.largest(caches))
        return [("activations", activations), ("CUDA graphs", self._graph_bytes(caches))]

    def begin(self, caches: list[KVCache]) -> GpuSteps:
        """Take the KV cache and record the graphs, telling the log how far it is."""
        total, started = len(self.graphs.shapes), time.monotonic()
        if total:
            logger.info("recording %d CUDA graphs", total)
        tenth = max(total // 10, 1)

        def tell(done: int, total: int) -> None:
            if done % tenth == 0 or done == total:
                logger.info("CUDA graphs: %d of %d, %.1f s", done, total, time.monotonic() - started)

        self.steps.record(caches, tell)
        return self.steps

    def _graph_bytes(self, caches: list[KVCache]) -> int:
        """Of all graphs, from the largest one, whose pool the others share, and one more."""
        shapes = self.graphs.shapes
        if not shapes:
            return 0
        before = _in_use(self.device)
        probe = CudaRecorder()
        kept = [self.steps.probe(probe, shapes[0], caches)]
        first = _in_use(self.device)
        kept.append(self.steps.probe(probe, shapes[-1], caches))
        each = max(_in_use(self.device) - first, 0)
        del kept, probe
        torch.cuda.empty_cache()
        return max(first - before, 0) + each * (len(shapes) - 1)


def prepare(
    config: EngineConfig,
    limits: StepLimits,
    attention: GpuAttention,
    model: Decoder,
    *,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers | None,
) -> GpuStart:
    """Put the parts together.

    Raises:
        InvalidConfig: the kernels cannot address a step of `--max-num-batched-tokens`.
    """
    _check_offsets(limits, model)
    draw = TritonSampler(limits.max_seqs, limits.vocab_size, device)
    inputs = GpuInputs(
        attention.planner,
        limits,
        device,
        others=device_sampler.fields(limits),
        needs_lengths=model.needs_lengths,
    )
    recorder: Recorder = CudaRecorder() if device.type == "cuda" else RerunRecorder()
    graphs = StepGraphs(_shapes(config, limits, model), recorder)
    sampler = DeviceSampler(limits, device, draw)
    steps = GpuSteps(
        model,
        inputs,
        sampler,
        graphs,
        limits,
        dtype=dtype,
        device=device,
        seed=config.seed,
        peers=peers,
    )
    return GpuStart(steps, attention, graphs, num_layers, device)


def _check_offsets(limits: StepLimits, model: Decoder) -> None:
    """Within a step's tensors the kernels count elements in 32 bits."""
    widest = max(
        max(site.in_features, site.out_features, limits.num_lanes * len(site.parts))
        for site in model.config.sites
    )
    most = LARGEST_OFFSET // widest
    if limits.max_tokens > most:
        flag = "--max-num-batched-tokens"
        raise InvalidConfig(
            f"{flag} must be at most {most} for this model on a GPU, got {limits.max_tokens}", param=flag
        )


def _shapes(config: EngineConfig, limits: StepLimits, model: Decoder) -> list[StepShape]:
    if config.enforce_eager or model.needs_lengths:
        return []
    return graph_shapes(
        config.cudagraph_capture_sizes,
        largest=config.max_cudagraph_capture_size,
        max_seqs=limits.max_seqs,
        max_tokens=limits.max_tokens,
        lanes=lane_buckets(limits.num_lanes),
    )


def _peak(device: torch.device, run: Callable[[], None]) -> int:
    """Bytes that `run` has allocated at most, over what was there before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _in_use(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free
