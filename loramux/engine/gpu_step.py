"""Steps on a GPU: filled while the last one runs, replayed or launched, sampled there, awaited later.

    fill the buffers → upload → graph (or kernel by kernel) → logits → sample → ids to the host

The graph ends with the logits. Sampling is launched behind it: what the rows ask for decides which of
its kernels runs, and the masks of grammars are computed on the host while the model runs.

Nothing here waits for the device but `GpuRunningStep.result`. On a CPU the same code runs in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from llguidance import LLTokenizer
from torch import Tensor

from loramux.engine.cuda_graph import Recorder, StepGraphs, StepShape, eager_shape
from loramux.engine.gpu_input import GpuInputs, GpuStepPlan
from loramux.engine.grammar_step import IMPOSSIBLE, GrammarStep, StepMasks
from loramux.engine.kernels.attention import KVCache
from loramux.engine.kernels.tables import AdapterTables
from loramux.engine.layers import device_sampler
from loramux.engine.layers.device_sampler import DeviceRow, DeviceSampler
from loramux.engine.layers.sampler import SamplingRow, requested_logprobs
from loramux.engine.models.decoder import Decoder
from loramux.engine.parallel.peers import Peers
from loramux.engine.sequence import Sequence
from loramux.engine.step import SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from loramux.engine.step_buffers import StepLimits
from loramux.engine.torch_step import Seeds, prompt_logprobs, sampling_row
from loramux.engine.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class _Device:
    """Streams and events; on a CPU, where everything is in order, there are none."""

    device: torch.device
    side: Any = None  # a stream for what must not wait for the next step

    @classmethod
    def of(cls, device: torch.device) -> _Device:
        side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        return cls(device, side)

    def event(self) -> Any:
        """Marks the end of what was launched so far."""
        if self.side is None:
            return None
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return done

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, work is not queued behind what the main stream has to do."""
        return contextlib.nullcontext() if self.side is None else torch.cuda.stream(self.side)


@dataclass(frozen=True, slots=True)
class GpuRunningStep:
    """A step that was launched; everything here is its own."""

    device: _Device
    done: Any  # event
    sampled: list[ScheduledSequence]  # by row of `ids`
    ids: Tensor  # [rows] int32 on the host, there when the step is done
    rows: list[SamplingRow]
    raw: Tensor | None  # [rows, vocab_size] logits, if anybody wants log-probabilities
    prompt_logits: tuple[Tensor, GpuStepPlan] | None  # if anybody wants those of a prompt
    masks: StepMasks | None
    impossible: list[int]  # rows for which no token was left

    @torch.inference_mode()
    def result(self) -> StepResult:
        """See `RunningStep`."""
        if self.done is not None:
            self.done.synchronize()
        ids: list[int] = self.ids.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(ids)
        of_prompts: dict[str, list[TokenLogprobs]] = {}
        with self.device.beside():
            if self.raw is not None:
                logprobs = requested_logprobs(self.raw.float(), ids, self.rows)
            if self.prompt_logits is not None:
                logits, plan = self.prompt_logits
                of_prompts = prompt_logprobs(logits, plan.order, plan.logits_rows)
        sampled = {
            item.seq.request_id: SampledToken(token, own)
            for item, token, own in zip(self.sampled, ids, logprobs, strict=True)
        }
        if self.masks is None:
            return StepResult(sampled, of_prompts)
        failed = {self.sampled[row].seq.request_id: IMPOSSIBLE for row in self.impossible}
        return StepResult(sampled, of_prompts, self.masks.ended, failed | self.masks.failed)


class GpuSteps:
    """Launches the steps of one model."""

    def __init__(
        self,
        model: Decoder,
        inputs: GpuInputs,
        sampler: DeviceSampler,
        graphs: StepGraphs,
        limits: StepLimits,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        peers: Peers | None = None,
    ) -> None:
        """Args:
        graphs: still to be recorded, see `record`.
        peers: the other ranks, which read the tokens that the first one draws.
        seed: for sequences that bring none.
        """
        self._model = model
        self._inputs = inputs
        self._sampler = sampler
        self._graphs = graphs
        self._limits = limits
        self._device = _Device.of(device)
        self._caches: list[KVCache] = []
        self._logits = torch.zeros((limits.max_seqs, limits.vocab_size), dtype=dtype, device=device)
        self._last_ids = torch.zeros(limits.max_seqs, dtype=torch.int32, device=device)
        self._last_rows: dict[str, int] = {}  # by request id, of the step launched last
        self._peers = peers
        self._seeds = Seeds(seed)
        self._grammars = GrammarStep(limits.vocab_size)

    @torch.inference_mode()
    def record(self, caches: list[KVCache], on_graph: Callable[[int, int], None] = lambda *_: None) -> None:
        """Take the KV cache and record the graphs.

        Args:
            on_graph: called with (graphs recorded, graphs in all), for a progress bar.
        """
        self._caches = caches
        self._inputs.pad()
        self._sampler.warm_up(self._logits[:1])
        self._graphs.record(self._compute, on_graph)

    @torch.inference_mode()
    def probe(self, recorder: Recorder, shape: StepShape, caches: list[KVCache]) -> Callable[[], None]:
        """Record one step of padding, to see what it needs; returns what holds that."""
        self._caches = caches
        self._inputs.pad()
        return recorder.record(partial(self._compute, shape))

    @torch.inference_mode()
    def largest(self, caches: list[KVCache]) -> None:
        """Compute the largest step that there can be, of padding, to see what it needs.

        Without lanes and with all of them, so that the kernels of both are compiled.
        """
        self._caches = caches
        self._inputs.pad()
        most = self._limits
        for num_lanes in sorted({0, most.num_lanes}):
            self._compute(eager_shape(most.max_tokens, most.max_seqs, num_lanes, decode_only=False))

    def launch(
        self, batch: ScheduledBatch, tables: Mapping[str, AdapterTables], tokenizer: LLTokenizer | None
    ) -> GpuRunningStep:
        """Queue a step behind the one that runs.

        Args:
            tables: of the adapters on the device that have some, by digest.
            tokenizer: of the grammars.
        """
        plan = self._inputs.fill(batch, self._last_rows, self._graphs, tables)
        pending_masks = self._grammars.begin(plan.order, tokenizer)  # computed beside the model
        sampling = plan.sampling
        rows = [sampling_row(item, self._seeds.of(item.seq)) for item, _ in sampling]
        drawn = self._sampler.fill(
            self._inputs.buffers.host,
            [_device_row(item, row) for (item, _), row in zip(sampling, rows, strict=True)],
        )
        self._inputs.buffers.upload(plan.rows)
        logits = self._run(plan)
        masks = pending_masks.result() if pending_masks is not None else None
        impossible = self._sampler.send_masks(drawn, _forbidden(masks, rows))
        self._last_rows = {item.seq.request_id: row for row, (item, _) in enumerate(sampling)}
        picked = logits[: len(rows)]
        if not plan.is_recorded and [row for _, row in sampling] != list(range(len(rows))):
            picked = logits[[row for _, row in sampling]]
        if rows:
            ids = self._sampler.sample(
                picked, device_sampler.view(self._inputs.buffers.device, len(rows), drawn.mode)
            )
            self._last_ids[: len(rows)].copy_(ids)
            if self._peers is not None:
                self._peers.share(self._last_ids)
        wants = any(item.wants_prompt_logprobs for item in plan.order)
        return GpuRunningStep(
            device=self._device,
            sampled=[item for item, _ in sampling],
            ids=self._last_ids[: len(rows)].to("cpu", non_blocking=True, copy=True),
            rows=rows,
            raw=picked.clone() if any(row.sampling.logprobs is not None for row in rows) else None,
            prompt_logits=(logits, plan) if wants else None,
            masks=masks,
            impossible=impossible,
            done=self._device.event(),
        )

    def follow(self, batch: ScheduledBatch, tables: Mapping[str, AdapterTables]) -> None:
        """Compute this rank's part of a step that rank 0 launches; only rank 0 samples."""
        plan = self._inputs.fill(batch, self._last_rows, self._graphs, tables)
        self._inputs.buffers.upload(plan.rows)
        self._run(plan)
        self._last_rows = {item.seq.request_id: row for row, (item, _) in enumerate(plan.sampling)}
        if self._peers is not None and plan.sampling:
            self._peers.share(self._last_ids)

    def reads_output(self, seq: Sequence) -> bool:
        """See `Steps`: tokens are counted on the device, but matched on the host."""
        return device_sampler.needs_tokens(seq.sampling)

    def _run(self, plan: GpuStepPlan) -> Tensor:
        """The logits that a filled step wants."""
        if plan.is_recorded:
            self._graphs.replay(plan.shape)
            return self._logits
        inputs = self._inputs.view(plan.shape, self._last_ids, plan)
        hidden = self._model.forward(inputs, self._caches)
        return self._model.logits(hidden, inputs.tables) if len(hidden) else self._logits[:0]

    def _compute(self, shape: StepShape) -> None:
        """What is recorded: from the buffers to `_logits`."""
        inputs = self._inputs.view(shape, self._last_ids)
        hidden = self._model.forward(inputs, self._caches)
        self._logits[: shape.num_seqs].copy_(self._model.logits(hidden, inputs.tables))


def _device_row(item: ScheduledSequence, row: SamplingRow) -> DeviceRow:
    seq = item.seq
    return DeviceRow(seq.request_id, row.sampling, row.seed, seq.token_ids, seq.num_prompt, row.num_output)


def _forbidden(masks: StepMasks | None, rows: list[SamplingRow]) -> dict[int, Any]:
    """By row, what the grammars forbid."""
    if masks is None:
        return {}
    own = [index for index, row in enumerate(rows) if row.sampling.grammar is not None]
    return dict(zip(own, masks.filled.forbidden, strict=True))
