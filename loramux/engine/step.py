"""What passes between scheduler and runner: a batch, what came of it, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from llguidance import LLTokenizer

from loramux.engine.sequence import Sequence
from loramux.engine.types import SequenceOutput, SequenceTiming, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence and the tokens of it that this step computes."""

    seq: Sequence
    start: int  # first token to compute
    count: int
    samples: bool = True  # the step produces a new token for it

    @property
    def end(self) -> int:
        """One past the last token to compute."""
        return self.start + self.count

    @property
    def num_output(self) -> int:
        """Index of the token to come among the output tokens."""
        return self.end - self.seq.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens to compute (0 or 1) whose ids only the device knows, from the step before."""
        return max(0, self.end - len(self.seq.token_ids))

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True if the step computes prompt tokens whose log-probabilities are wanted."""
        return self.seq.wants_prompt_logprobs and self.start < self.seq.num_prompt


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's choice."""

    sequences: list[ScheduledSequence]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner returns for a sequence that sampled."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner returns for a batch, by request id."""

    sampled: dict[str, SampledToken]
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    ended: Set[str] = frozenset()  # sampled nothing: their grammar is complete
    failed: Mapping[str, str] = field(default_factory=dict)  # sampled nothing: no token was possible; why


class RunningStep(Protocol):
    """A step that the device computes."""

    def result(self) -> StepResult:
        """Wait until it is done; called once, in the order of the steps."""
        ...


class Steps(Protocol):
    """What computes the steps of a model."""

    def launch(
        self, batch: ScheduledBatch, tables: Mapping[str, Any], tokenizer: LLTokenizer | None
    ) -> RunningStep:
        """Start a step; at most one before it may still run.

        Args:
            tables: of the adapters on the device that have some (`AdapterTables`), by digest.
            tokenizer: of the grammars; needed if a sequence of the batch has one.
        """
        ...

    def follow(self, batch: ScheduledBatch, tables: Mapping[str, Any]) -> None:
        """Compute this rank's part of a step that rank 0 launches; only rank 0 samples."""
        ...

    def reads_output(self, seq: Sequence) -> bool:
        """True if its next token can be chosen only when the host knows the last one."""
        ...


def output_of(seq: Sequence, sampled: SampledToken | None, now: float | None) -> SequenceOutput:
    """What is sent for a sequence whose step is done and whose token, if any, is appended."""
    reason, stop_reason = ("stop", None) if sampled is None else finish_reason(seq)
    first = seq.num_output == (0 if sampled is None else 1)
    if first and now is not None and seq.started_s is not None:
        seq.timing = SequenceTiming(seq.started_s - seq.arrival_s, now - seq.started_s)
    timing = seq.timing if first else None
    if reason is not None and seq.timing is not None:
        timing = SequenceTiming(seq.timing.queue_s, seq.timing.prefill_s, seq.num_preemptions)
    return SequenceOutput(
        request_id=seq.request_id,
        token_ids=[] if sampled is None else [sampled.token_id],
        finish_reason=reason,
        stop_reason=stop_reason,
        num_cached_tokens=seq.num_cached,
        logprobs=[sampled.logprobs] if sampled is not None and sampled.logprobs is not None else None,
        prompt_logprobs=(
            [None, *seq.prompt_logprobs] if first and seq.sampling.prompt_logprobs is not None else None
        ),
        timing=timing,
        last_is_text=(
            reason == "stop" and sampled is not None and sampled.token_id not in seq.sampling.end_token_ids
        ),
    )


def finish_reason(seq: Sequence) -> tuple[str | None, int | None]:
    """Whether the last token ends the sequence: (reason, stop token id), (None, None) if not."""
    sampling = seq.sampling
    token = seq.token_ids[-1]
    if seq.num_output >= sampling.min_tokens:
        if token in sampling.eos_token_ids:
            return "stop", None
        if token in sampling.stop_token_ids:
            return "stop", token
    if seq.matcher is not None and seq.matcher.is_finished:
        return "stop", None
    if seq.num_output >= sampling.max_tokens:
        return "length", None
    return None, None
