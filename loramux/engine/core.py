"""The engine: a scheduler that decides and a runner that computes, step by step.

With asynchronous scheduling the next step is planned and queued while the device computes the last one,
so that the device never waits for the host; without it, each step is awaited at once.

`Engine` knows nothing of processes or sockets. The server drives it through `process.py`; the
offline `LLM` and the tests call it directly.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

from loramux.engine.adapters.lanes import LaneTable
from loramux.engine.adapters.loader import AdapterLoader
from loramux.engine.adapters.residency import AdapterResidency, OnGone, OnLoaded
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.block_manager import BlockManager
from loramux.engine.config import EngineConfig
from loramux.engine.errors import (
    AdapterIncompatible,
    AdapterNotFound,
    ContextTooLong,
    InvalidConfig,
    InvalidRequest,
    LoramuxError,
)
from loramux.engine.grammar import PARAM
from loramux.engine.grammar_compiler import GrammarCompiler
from loramux.engine.model_runner import ModelRunner
from loramux.engine.parallel.leader import LeadingRunner
from loramux.engine.scheduler import Scheduler
from loramux.engine.step import RunningStep, ScheduledBatch
from loramux.engine.tally import Tally, resident_bytes
from loramux.engine.types import (
    STEP_TOKENS_BOUNDS,
    AdapterSpec,
    EngineInfo,
    EngineStats,
    Request,
    SequenceOutput,
)

STALLED_WAIT_S = 0.01  # longest sleep of a step in which nothing can run; bounds the delay of an abort


class Engine:
    """One model replica: requests in, tokens out."""

    def __init__(
        self,
        config: EngineConfig,
        on_layer: Callable[[int, int], None] | None = None,
        on_rank_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Load the model.

        Args:
            on_layer: called with (layers loaded, layers in all), for a progress bar.
            on_rank_lost: called with a sentence, in a thread, when a process of a tensor-parallel engine
                has ended; a step then raises EngineDead.

        Raises:
            UnsupportedModel, InvalidConfig: the model cannot be served as configured.
        """
        started = time.monotonic()
        self._started_at = time.time()
        self._step_tokens = Tally(STEP_TOKENS_BOUNDS)
        self.config = config
        self.runner = (
            ModelRunner(config, on_layer)
            if config.tensor_parallel_size == 1
            else LeadingRunner(config, on_layer, on_rank_lost)
        )
        self.adapters = AdapterStore(
            LaneTable(config.lane_pool),
            max_host_bytes=self.runner.max_host_lora_bytes or config.host_lora_bytes,
            max_host_adapters=config.max_cpu_loras,
        )
        rope = self.runner.model_config.rope
        blocks = BlockManager(
            self.runner.num_kv_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            blocks=blocks,
            adapters=self.adapters,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            by_priority=config.scheduling_policy == "priority",
            reads_output=self.runner.reads_output,
            shared_prefix_limit=rope.original_max_position if rope and rope.kind == "dynamic" else None,
        )
        self.residency = AdapterResidency(
            self.adapters,
            read=self.runner.read_adapter,
            fill=self.runner.fill_lanes,
            forget_host=self.runner.forget_adapter,
            keep_tables=self.runner.keep_tables,
            forget_kv=self.scheduler.blocks.forget,
            fail_waiting=self._fail_waiting,
        )
        self.grammars = GrammarCompiler(
            Path(config.tokenizer or config.model).expanduser(), timeout_s=config.grammar_compile_timeout_s
        )
        self._running: deque[tuple[ScheduledBatch, RunningStep]] = deque()  # oldest first
        self._max_running = 1 if self.runner.runs_ahead else 0  # steps left running when `step` returns
        self._close = weakref.finalize(self, _close, self.residency.loader, self.grammars, self.runner)
        self._failures: list[tuple[str, LoramuxError]] = []
        self.info = self._describe(time.monotonic() - started)

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it can never be served (the server checks this too, with the user's words).
            AdapterNotFound: its digest is not loaded.
        """
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt must hold at least 1 token", param="prompt")
        if num_prompt >= self.info.max_model_len:
            raise ContextTooLong(
                f"This model's maximum context length is {self.info.max_model_len} tokens. However, your "
                f"prompt contains {num_prompt} input tokens, which leaves no room for an output token.",
                param="prompt",
            )
        if num_prompt + request.sampling.max_tokens > self.info.max_model_len:
            raise ContextTooLong(
                f"This model's maximum context length is {self.info.max_model_len} tokens. However, you "
                f"requested {request.sampling.max_tokens} output tokens after {num_prompt} input tokens.",
                param="max_tokens",
            )
        largest = max(request.prompt_token_ids)
        if largest >= self.info.vocab_size or min(request.prompt_token_ids) < 0:
            raise InvalidRequest(
                f"Token id {largest} is out of vocabulary ({self.info.vocab_size} tokens)", param="prompt"
            )
        if request.adapter is not None and not self.adapters.is_loaded(request.adapter):
            raise AdapterNotFound(f"adapter {request.adapter[:12]} is not loaded", param="model")
        grammar = request.sampling.grammar
        matcher = None if grammar is None else self.grammars.open(request.request_id, grammar)
        self.scheduler.add(request, time.monotonic(), matcher)

    def abort(self, request_ids: list[str]) -> None:
        """Stop sequences; unknown ids (already finished) are fine."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """True while any sequence is waiting or running."""
        return self.scheduler.has_work()

    def step(self) -> list[SequenceOutput]:
        """Start one batch and await one: at most one forward pass, at most one new token a sequence.

        When every sequence waits for an adapter or a grammar, sleeps a moment for those instead.
        """
        self.residency.advance()  # adapters that arrived, adapters to fetch
        for request_id, error in self.grammars.advance():  # grammars that are compiled
            self._fail(request_id, error)
        batch = self.scheduler.schedule(time.monotonic())  # who runs, with which blocks and lanes
        if batch is not None:
            step = self.runner.launch(batch, self.grammars.tokenizer)  # the only call that computes
            self._running.append((batch, step))
            self.residency.hand_out()
            self._step_tokens.add(sum(item.count for item in batch.sequences))
            if len(self._running) <= self._max_running:
                return []  # the device is busy: time to plan the next step
        if not self._running:
            self._wait()
            return []
        batch, step = self._running.popleft()
        result = step.result()
        self._failures += [(id_, InvalidRequest(why, param=PARAM)) for id_, why in result.failed.items()]
        return self.scheduler.update(batch, result, time.monotonic())  # append, finish, release

    def _wait(self) -> None:
        """Nothing runs and nothing can: let adapters and grammars come."""
        if self.scheduler.has_work():
            self.residency.advance()  # the scheduler may just have asked for an adapter
            self.grammars.wait(STALLED_WAIT_S, self.residency.wake_fd)

    def page_ahead(self) -> bool:
        """Use an idle moment to prepare KV blocks for what will come; True if there is more to do."""
        return self.runner.page_ahead(self.scheduler.blocks.num_touched)

    def take_failures(self) -> list[tuple[str, LoramuxError]]:
        """Sequences that ended because their adapter or their grammar failed, since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def begin_load(self, spec: AdapterSpec, on_loaded: OnLoaded, *, pinned: bool = False) -> None:
        """Read an adapter in the background; `on_loaded` is called in a later step.

        Raises:
            InvalidConfig: the engine was started without LoRA.
            AdapterIncompatible: its rank exceeds the limit, or does not fit into the lane pool.
        """
        self._check_loadable(spec)
        self.residency.load(spec, on_loaded, pinned=pinned)
        self.residency.advance()

    def restore_adapter(self, spec: AdapterSpec) -> None:
        """Let requests use an adapter that an engine of the same configuration had loaded before.

        It is read when the first of them needs it.
        """
        self.residency.restore(spec)

    def begin_unload(self, digest: str, on_gone: OnGone) -> None:
        """Refuse new requests at once; `on_gone` is called when its last sequence has ended.

        Raises:
            AdapterNotFound: it is not loaded.
        """
        if not self.adapters.is_loaded(digest):
            raise AdapterNotFound(f"adapter {digest[:12]} is not loaded")
        self.residency.unload(digest, on_gone)
        self.residency.advance()

    def load_adapter(self, spec: AdapterSpec) -> None:
        """Read an adapter and wait until requests may use it.

        Raises:
            AdapterIncompatible, AdapterNotFound: its files are not what the inspection saw, or it
                is more than the configuration allows.
        """
        results: list[LoramuxError | None] = []
        self.begin_load(spec, results.append)
        while not results:
            self.residency.wait(STALLED_WAIT_S)
            self.residency.advance()
        if results[0] is not None:
            raise results[0]

    def unload_adapter(self, digest: str) -> None:
        """`begin_unload` for callers who do not wait for its end."""
        self.begin_unload(digest, lambda _: None)

    def close(self) -> None:
        """End the background threads, and the other ranks."""
        self._close()

    def stats(self) -> EngineStats:
        """A snapshot of the load."""
        s = self.scheduler
        deferred = sum(
            1 for seq in s.waiting if seq.adapter is not None and not self.adapters.is_on_device(seq.adapter)
        )
        return EngineStats(
            cpu_s=time.process_time(),
            resident_bytes=resident_bytes(),
            started_at=self._started_at,
            num_running=len(s.running),
            num_waiting=len(s.waiting),
            num_deferred=deferred,
            num_preemptions=s.num_preemptions,
            kv_blocks_used=s.blocks.num_used,
            kv_blocks_total=s.blocks.num_blocks,
            prefix_cache_queries=s.prefix_queries,
            prefix_cache_hits=s.prefix_hits,
            lanes_used=self.adapters.lanes.num_used,
            lanes_total=self.adapters.lanes.num_lanes,
            running_adapters=sorted({seq.adapter for seq in s.running if seq.adapter}),
            waiting_adapters=sorted({seq.adapter for seq in s.waiting if seq.adapter}),
            device_adapters=self.adapters.on_device,
            host_adapters=self.adapters.on_host,
            host_bytes=self.adapters.host_bytes,
            host_evictions=self.adapters.num_host_evictions,
            device_evictions=self.adapters.lanes.num_evictions,
            step_tokens=self._step_tokens.distribution(),
            host_load_s=self.residency.host_load_s.distribution(),
            device_load_s=self.residency.device_load_s.distribution(),
            table_bytes=self.runner.table_bytes,
        )

    def _check_loadable(self, spec: AdapterSpec) -> None:
        if not self.config.enable_lora:
            raise InvalidConfig(
                "LoRA is not enabled. Use --enable-lora to enable LoRA.", param="--enable-lora"
            )
        if spec.rank > self.config.max_lora_rank:
            raise AdapterIncompatible(
                f"LoRA rank {spec.rank} is greater than max_lora_rank {self.config.max_lora_rank}; "
                "raise --max-lora-rank"
            )
        if not self.adapters.lanes.fits(spec.rank):
            raise AdapterIncompatible(
                f"LoRA rank {spec.rank} needs more than the {self.config.lane_pool} lanes of the pool; "
                "raise --max-loras or --num-lanes"
            )

    def _fail(self, request_id: str, error: LoramuxError) -> None:
        self.scheduler.abort(request_id)
        self._failures.append((request_id, error))

    def _fail_waiting(self, digest: str, error: LoramuxError) -> None:
        self._failures += [(request_id, error) for request_id in self.scheduler.fail_waiting(digest)]

    def _describe(self, load_seconds: float) -> EngineInfo:
        model = self.runner.model_config
        return EngineInfo(
            architecture=model.architecture,
            dtype=str(self.runner.dtype).removeprefix("torch."),
            device=str(self.runner.device),
            vocab_size=model.vocab_size,
            max_model_len=self.runner.max_model_len,
            num_kv_blocks=self.runner.num_kv_blocks,
            block_size=self.config.block_size,
            enable_lora=self.config.enable_lora,
            max_lora_rank=self.config.max_lora_rank,
            num_lanes=self.config.lane_pool,
            lora_sites=model.lora_sites() if self.config.enable_lora else {},
            load_seconds=load_seconds,
        )


def _close(loader: AdapterLoader, grammars: GrammarCompiler, runner: ModelRunner) -> None:
    loader.close()
    grammars.close()
    runner.close()
