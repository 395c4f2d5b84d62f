"""Steps in plain torch (on a CPU with its compiled kernels): the host waits until each is done."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llguidance import LLTokenizer
from torch import Tensor

from loramux.engine.grammar_step import IMPOSSIBLE, GrammarStep, StepMasks
from loramux.engine.kernels.attention import KVCache
from loramux.engine.kernels.tables import AdapterTables
from loramux.engine.layers.sampler import SamplingRow, sample, token_logprobs
from loramux.engine.model_input import InputBuilder, ModelInput
from loramux.engine.models.decoder import Decoder
from loramux.engine.sequence import Sequence, reads_output
from loramux.engine.step import SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from loramux.engine.types import TokenLogprobs


class Seeds:
    """The seeds of the sequences' draws."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def of(self, seq: Sequence) -> int:
        """The sequence's own, 64 bits; one that brought none gets one, which survives a preemption."""
        if seq.seed is None:
            seq.seed = self._random.getrandbits(64)
        return seq.seed & 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step that was computed when it was launched."""

    done: StepResult

    def result(self) -> StepResult:
        """See `RunningStep`."""
        return self.done


class TorchSteps:
    """Builds a step's tensors, runs the model once and samples."""

    def __init__(
        self, model: Decoder, caches: list[KVCache], builder: InputBuilder, *, vocab_size: int, seed: int
    ) -> None:
        """Args:
        vocab_size: of the logits.
        seed: for sequences that bring none.
        """
        self._model = model
        self._caches = caches
        self._builder = builder
        self._seeds = Seeds(seed)
        self._grammars = GrammarStep(vocab_size)
        self._last = StepResult({})

    def launch(
        self, batch: ScheduledBatch, tables: Mapping[str, AdapterTables], tokenizer: LLTokenizer | None
    ) -> DoneStep:
        """Compute a step.

        Args:
            tables: of the adapters on the device that have some, by digest.
            tokenizer: of the grammars.
        """
        inputs = self._builder.build(batch, tables, self._last.sampled)
        masks = self._grammars.begin(inputs.order, tokenizer)  # computed beside the model
        hidden = self._model.forward(inputs, self._caches)
        self._last = StepResult({})
        if len(hidden):  # not every sequence is in the middle of its prompt
            logits = self._model.logits(hidden, inputs.tables)
            found = prompt_logprobs(logits, inputs.order, inputs.logits_rows)
            self._last = self._sample(logits, inputs, masks.result() if masks else None, found)
        return DoneStep(self._last)

    def warm_up(self, batches: Iterable[ScheduledBatch]) -> None:
        """Compute steps of which nothing remains."""
        for batch in batches:
            self.launch(batch, {}, None)
        self._last = StepResult({})

    def follow(self, batch: ScheduledBatch, tables: Mapping[str, AdapterTables]) -> None:
        """Compute this rank's part of a step that rank 0 launches; only rank 0 samples."""
        inputs = self._builder.build(batch, tables)
        hidden = self._model.forward(inputs, self._caches)
        if len(hidden):
            self._model.logits(hidden, inputs.tables)

    def reads_output(self, seq: Sequence) -> bool:
        """See `Steps`: the sampler counts tokens on the host."""
        return reads_output(seq)

    def _sample(
        self,
        logits: Tensor,
        inputs: ModelInput,
        masks: StepMasks | None,
        prompt_logprobs: dict[str, list[TokenLogprobs]],
    ) -> StepResult:
        pairs = [
            (item, rows[1] - 1)
            for item, rows in zip(inputs.order, inputs.logits_rows, strict=True)
            if item.samples
        ]
        if not pairs:
            return StepResult({}, prompt_logprobs)
        index = [row for _, row in pairs]
        picked = logits if len(index) == logits.shape[0] else logits[index]
        rows = [sampling_row(item, self._seeds.of(item.seq)) for item, _ in pairs]
        mask = masks.token_mask([item.seq for item, _ in pairs], picked.device) if masks else None
        out = sample(picked, rows, mask)
        sampled = {
            item.seq.request_id: SampledToken(token, logprobs)
            for (item, _), token, logprobs in zip(pairs, out.token_ids, out.logprobs, strict=True)
        }
        if masks is None:
            return StepResult(sampled, prompt_logprobs)
        failed = {pairs[row][0].seq.request_id: IMPOSSIBLE for row in out.impossible} | masks.failed
        return StepResult(sampled, prompt_logprobs, masks.ended, failed)


def sampling_row(item: ScheduledSequence, seed: int) -> SamplingRow:
    """What the sampler needs to know of a sequence that samples."""
    seq = item.seq
    return SamplingRow(seq.sampling, seed, seq.token_ids, seq.num_prompt, item.num_pending)


def prompt_logprobs(
    logits: Tensor, order: list[ScheduledSequence], logits_rows: list[tuple[int, int]]
) -> dict[str, list[TokenLogprobs]]:
    """Of the sequences that want them and whose prompt the step computes, by request id.

    Args:
        logits: [num_logits, vocab_size]
        logits_rows: per sequence of `order`, its rows.
    """
    found = {}
    for item, (begin, end) in zip(order, logits_rows, strict=True):
        seq = item.seq
        if item.wants_prompt_logprobs:
            targets = seq.token_ids[item.start + 1 : item.end + 1]  # one fewer where the prompt ends
            num_top = seq.sampling.prompt_logprobs or 0
            found[seq.request_id] = token_logprobs(logits[begin : begin + len(targets)], targets, num_top)
            assert end - begin == item.count
    return found
