"""One device: weights, KV cache and lanes. `launch` is the only call of a step that computes."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from llguidance import LLTokenizer

from loramux.engine.adapters.lane_memory import LaneLayout
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.packed import HostWeights
from loramux.engine.adapters.transfer import LaneTransfer
from loramux.engine.adapters.unpacking import LaneUnpacker
from loramux.engine.adapters.weights import HostAdapter, LanePool, read_adapter
from loramux.engine.attention_backend import attention_shape, make_attention, steps_in_triton
from loramux.engine.busy import BusyFlag
from loramux.engine.config import EngineConfig
from loramux.engine.cores import num_compute_threads
from loramux.engine.errors import InvalidConfig
from loramux.engine.kernels.attention import Attention
from loramux.engine.kernels.cpu.product import renew_scratch
from loramux.engine.kernels.cpu.threads import bind, heed, use_threads
from loramux.engine.kernels.tables import AdapterTables
from loramux.engine.kv_sizing import KvDemand, MemoryBudget, gib, plan_kv_cache
from loramux.engine.layers.linear import can_hold_lanes, check_quantization
from loramux.engine.memory_profile import gpu_budget
from loramux.engine.model_input import InputBuilder
from loramux.engine.models.decoder import Decoder
from loramux.engine.models.families import load_model_config
from loramux.engine.models.weights import BaseWeights, open_weights
from loramux.engine.parallel.peers import Peers
from loramux.engine.parallel.shard import shard_model
from loramux.engine.sequence import Sequence
from loramux.engine.step import RunningStep, ScheduledBatch, Steps
from loramux.engine.step_buffers import StepLimits, step_limits
from loramux.engine.torch_step import TorchSteps
from loramux.engine.types import AdapterSpec
from loramux.engine.warm_up import warm_up_batches

logger = logging.getLogger(__name__)

LONG_WARM_UP_S = 2.0  # one that takes longer is told
PAGED_STEPS = 2  # steps' worth of KV blocks that have memory before they are needed
PAGED_AT_ONCE = 8  # blocks that get it between two looks for work

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
}


class ModelRunner:
    """Owns everything that lies on the device."""

    _num_paged: int  # KV blocks that have memory

    def __init__(
        self,
        config: EngineConfig,
        on_layer: Callable[[int, int], None] | None = None,
        peers: Peers | None = None,
    ) -> None:
        """Load the model, or this rank's part of it.

        Args:
            on_layer: called with (layers loaded, layers in all), for a progress bar.
            peers: the other ranks of a tensor-parallel engine.

        Raises:
            UnsupportedModel, InvalidConfig: the model cannot be served as configured.
        """
        self.model_config = load_model_config(Path(config.model))
        self._peers = peers
        rank, num_ranks = (peers.rank, peers.size) if peers else (0, 1)
        self._shard = shard_model(self.model_config, rank, num_ranks)
        self.device = find_device(config.device)
        if self.device.type == "cpu":
            use_threads(max((config.num_threads or num_compute_threads()) // num_ranks, 1))
            renew_scratch()
        self.dtype = _dtype(config.dtype, self.model_config.torch_dtype, self.device)
        check_quantization(config.quantization, self.dtype, self.device)
        self._uses_triton = steps_in_triton(config, self.device)
        runs_ahead = _or_default(config.async_scheduling, self.device.type == "cuda")
        # In plain torch other ranks are told tokens by the host, so none may be pending.
        self.runs_ahead = runs_ahead and (peers is None or self._uses_triton)
        self.max_model_len = _max_model_len(config, self.model_config.derived_max_len)
        lane_dtype = self.dtype if config.lora_dtype == "auto" else _DTYPES[config.lora_dtype]
        if lane_dtype != self.dtype:
            logger.warning("--lora-dtype has no effect: lanes are computed in the model's dtype")
        layout = _lane_layout(config, uses_triton=self._uses_triton)
        self.lanes = LanePool(
            self._shard.own, config.lane_pool, dtype=self.dtype, device=self.device, layout=layout
        )
        self._transfer = self._open_transfer(config.host_lora_bytes // num_ranks)
        self.tables: dict[str, AdapterTables] = {}  # of the adapters on the device that have some
        has_files = config.load_format != "dummy"
        self._base = BaseWeights(Path(config.model) if has_files else None, self.dtype)
        limits = step_limits(
            config, max_model_len=self.max_model_len, vocab_size=self.model_config.vocab_size
        )
        shape = attention_shape(config, self._shard.own, self.dtype, self.device)
        self._kv_dtype = shape.cache_dtype
        attention = make_attention(config, shape, limits, uses_triton=self._uses_triton)
        self.model = self._load_model(config, attention, on_layer)
        self._steps = self._start_steps(config, attention, limits)

    @property
    def max_host_lora_bytes(self) -> int | None:
        """Bytes of adapters to keep in host memory, on all ranks; None = as configured."""
        own = None if self._transfer is None else self._transfer.max_host_bytes
        return None if own is None else own * self._shard.size

    @torch.inference_mode()
    def read_adapter(self, spec: AdapterSpec) -> HostWeights:
        """Read an adapter's files into host memory; safe in another thread."""
        packed = None if self._transfer is None else self._transfer.read(spec)
        return packed or read_adapter(spec, self._shard, self.dtype, self._base)

    @torch.inference_mode()
    def fill_lanes(self, adapter: HostWeights, span: LaneSpan) -> None:
        """Copy an adapter into lanes that no running sequence uses; safe in another thread.

        Its tables appear in one step, when they are complete.

        Raises:
            AdapterIncompatible: it holds numbers that are not finite.
        """
        if self._transfer is not None:
            self._transfer.write(adapter, span)
        else:
            assert isinstance(adapter, HostAdapter)
            self.lanes.write(adapter, span)
        if isinstance(adapter, HostAdapter) and adapter.tables:
            self.tables[adapter.digest] = adapter.tables.to(self.device)

    def bind_threads(self, server: BusyFlag) -> None:
        """Give the calling thread, which launches all steps, and those that compute with it a core each.

        Only for a process that is the engine's alone, and before requests come.

        Args:
            server: up while the server wants one of the cores; the calling thread then computes alone.
        """
        if self.device.type == "cpu" and self._shard.size == 1 and bind():
            heed(server)

    def keep_tables(self, residents: Set[str]) -> None:
        """Free the tables of adapters that lost their lanes."""
        for digest in list(self.tables):
            if digest not in residents:
                del self.tables[digest]

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables of adapters on the device."""
        return sum(tables.nbytes for tables in list(self.tables.values()))

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch, tokenizer: LLTokenizer | None = None) -> RunningStep:
        """Start a step: run the model once and sample. At most one step before it may still run.

        Args:
            tokenizer: of the grammars; needed if a sequence of the batch has one.
        """
        return self._steps.launch(batch, self.tables, tokenizer)

    def reads_output(self, seq: Sequence) -> bool:
        """True if a sequence's next token can be chosen only when the host knows the last one."""
        return self._steps.reads_output(seq)

    @torch.inference_mode()
    def follow(self, batch: ScheduledBatch) -> None:
        """Compute this rank's part of a step that rank 0 launches."""
        self._steps.follow(batch, self.tables)

    @torch.inference_mode()
    def page_ahead(self, num_touched: int) -> bool:
        """Make some of the KV blocks resident that will be handed out next.

        Memory that is written for the first time costs the step that writes it: 10 ms of a prompt's 300.

        Args:
            num_touched: this block and those above it have never been handed out.

        Returns:
            True if there is more to do.
        """
        begin = max(self._num_paged, num_touched)
        end = min(begin + PAGED_AT_ONCE, num_touched + self._pages_ahead, self.num_kv_blocks)
        if begin >= end:
            return False
        for cache in self._caches:
            cache.k[begin:end].zero_()
            cache.v[begin:end].zero_()
        self._num_paged = end
        return True

    def forget_adapter(self, digest: str) -> None:
        """An adapter's host weights are freed; here they are the caller's."""

    def close(self) -> None:
        """Give back what does not go with the runner itself; here nothing."""

    @torch.inference_mode()
    def _load_model(
        self, config: EngineConfig, attention: Attention, on_layer: Callable[[int, int], None] | None
    ) -> Decoder:
        loaded = 0

        def count_layer() -> None:
            nonlocal loaded
            loaded += 1
            if on_layer is not None:
                on_layer(loaded, self.model_config.num_layers)

        with open_weights(config, self._shard, dtype=self.dtype, device=self.device) as checkpoint:
            return Decoder(
                self._shard,
                checkpoint,
                self.lanes,
                attention,
                parts=_gpu().GpuParts() if self._uses_triton else None,
                peers=self._peers,
                max_len=self.max_model_len,
                dtype=self.dtype,
                device=self.device,
                quantization=config.quantization,
                on_layer=count_layer,
            )

    def _cpu_budget(self, num_bytes: int) -> MemoryBudget:
        size = self._shard.size
        shared = "" if size == 1 else f" / {size} ranks"
        return MemoryBudget(limit=num_bytes // size, origin=f"--kv-cache-bytes{shared}")

    def _open_transfer(self, host_bytes: int) -> LaneTransfer | LaneUnpacker | None:
        """How adapters come into lanes by a kernel; None where torch copies them."""
        if self.lanes.num_lanes == 0:
            return None
        if not self._uses_triton:
            return LaneUnpacker(self.lanes, self._shard) if self.lanes.kernel is not None else None
        transfer: LaneTransfer = _gpu().lane_transfer(
            self.lanes, self._shard, host_bytes=host_bytes, device=self.device
        )
        return transfer

    def _start_steps(self, config: EngineConfig, attention: Attention, limits: StepLimits) -> Steps:
        """Take the memory that is left as KV cache, and be ready for the first step."""
        vocab_size, num_layers = self.model_config.vocab_size, self.model_config.num_layers
        start = None
        if self._uses_triton:
            start = _gpu().prepare(
                config,
                limits,
                attention,
                self.model,
                num_layers=num_layers,
                dtype=self.dtype,
                device=self.device,
                peers=self._peers,
            )
        self.num_kv_blocks = self._size_kv_cache(config, start.reserves() if start else [])
        self._caches = [attention.empty_cache(self.num_kv_blocks) for _ in range(num_layers)]
        self._num_paged = 0
        tokens_ahead = PAGED_STEPS * config.max_num_batched_tokens if self.device.type == "cpu" else 0
        self._pages_ahead = tokens_ahead // config.block_size
        if start is not None:
            steps: Steps = start.begin(self._caches)
            return steps
        self.model.record(self._caches)
        builder = InputBuilder(
            attention=attention,
            needs_lengths=self.model.needs_lengths,
            lora_kernel=self.lanes.kernel,
            dtype=self.dtype,
            device=self.device,
        )
        torch_steps = TorchSteps(self.model, self._caches, builder, vocab_size=vocab_size, seed=config.seed)
        if self._peers is None:
            self._warm_up(torch_steps, config)
        return torch_steps

    @torch.inference_mode()
    def _warm_up(self, steps: TorchSteps, config: EngineConfig) -> None:
        started = time.monotonic()
        max_tokens = min(self.max_model_len, self.num_kv_blocks * config.block_size)
        has_lanes = self.lanes.num_lanes > 0
        steps.warm_up(warm_up_batches(max_tokens, config.block_size, with_lanes=has_lanes))
        seconds = time.monotonic() - started
        if seconds > LONG_WARM_UP_S:
            logger.info("first steps: %.1f s; on a new machine they compile kernels, kept on disk", seconds)

    def _size_kv_cache(self, config: EngineConfig, reserves: list[tuple[str, int]]) -> int:
        """Blocks that fit, refusing what cannot hold one full sequence."""
        c = self._shard.own
        per_layer = 2 * c.num_kv_heads * c.head_dim * config.block_size * self._kv_dtype.itemsize
        demand = KvDemand(
            block_bytes=c.num_layers * per_layer,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            may_shorten=config.max_model_len is None,
            num_blocks=config.num_kv_blocks,
        )
        budget = self._cpu_budget(config.kv_cache_bytes)
        if self.device.type == "cuda":
            staging = self._transfer.staging_bytes if isinstance(self._transfer, LaneTransfer) else 0
            parts = [("adapter lanes", self.lanes.nbytes), ("adapter staging", staging)]
            budget = gpu_budget(self.device, config.gpu_memory_utilization, parts=parts, reserves=reserves)
        if self._peers is not None:
            left = self._peers.smallest(budget.left)  # so that all ranks plan the same
            budget = replace(budget, limit=budget.limit - budget.left + left)
        plan = plan_kv_cache(budget, demand)
        if plan.max_model_len < self.max_model_len:
            logger.warning("context limited to %d tokens by the KV cache: %s", plan.max_model_len, budget)
        self.max_model_len = plan.max_model_len
        size = gib(plan.num_blocks * demand.block_bytes)
        logger.info(
            "KV cache: %d blocks of %d tokens, %s; %s", plan.num_blocks, config.block_size, size, budget
        )
        return plan.num_blocks


def _gpu() -> Any:
    """What only a GPU has; imported where one is, because it needs Triton."""
    return importlib.import_module("loramux.engine.gpu_start")


def _lane_layout(config: EngineConfig, *, uses_triton: bool) -> LaneLayout:
    """The one that the linear sites read fastest."""
    if not uses_triton:
        return LaneLayout.APART
    return LaneLayout.BEHIND_WEIGHT if can_hold_lanes(config.quantization) else LaneLayout.JOINED


def find_device(name: str) -> torch.device:
    """The device that `--device` means on this machine.

    Raises:
        InvalidConfig: there is none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig("--device cuda: this machine has no CUDA device", param="--device")
    if name not in ("cpu", "cuda"):
        raise InvalidConfig(f"--device must be auto, cpu or cuda, got {name!r}", param="--device")
    return torch.device(name)


def _dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return _DTYPES[wanted]
    if stored == "float16" and device.type == "cpu":
        return torch.bfloat16  # float16 arithmetic is slow on a CPU
    return _DTYPES[stored]


def _or_default(wanted: bool | None, default: bool) -> bool:
    return default if wanted is None else wanted


def _max_model_len(config: EngineConfig, derived: int) -> int:
    if config.max_model_len is None:
        return derived
    if config.max_model_len > derived:
        raise InvalidConfig(
            f"--max-model-len {config.max_model_len} is more than the model's own limit of {derived} tokens",
            param="--max-model-len",
        )
    return config.max_model_len
