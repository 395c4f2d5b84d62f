"""One generation: its tokens, its blocks, its place in the batch, its status.

A `Sequence` is the only owner of a request's progress. Its status changes only through `become`,
its tokens only through `append`. Nothing here decides anything: that is the scheduler's work.

    token_ids   | prompt ............................ | output ...... | pending |
                0            num_computed        num_prompt                  num_tokens
                 <-- KV is in the blocks -->

While a step runs, what it will have done is taken for granted, so that the next one can be planned:
`num_computed` counts its tokens, and the token that it samples is pending.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.grammar import GrammarMatcher
from loramux.engine.types import Request, SequenceTiming, TokenLogprobs


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


TRANSITIONS: Final[dict[SequenceStatus, frozenset[SequenceStatus]]] = {
    SequenceStatus.WAITING: frozenset({SequenceStatus.RUNNING, SequenceStatus.FINISHED}),
    # WAITING again when preempted
    SequenceStatus.RUNNING: frozenset({SequenceStatus.WAITING, SequenceStatus.FINISHED}),
    SequenceStatus.FINISHED: frozenset(),
}


class Sequence:
    """The mutable state of one request."""

    __slots__ = (
        "_status",
        "adapter",
        "arrival_s",
        "block_hashes",
        "block_ids",
        "lanes",
        "matcher",
        "num_cached",
        "num_computed",
        "num_hashed_blocks",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "prompt_logprobs",
        "request",
        "sampling",
        "seed",
        "started_s",
        "steps_running",
        "timing",
        "token_ids",
    )

    def __init__(self, request: Request, arrival_s: float, matcher: GrammarMatcher | None = None) -> None:
        self.request = request
        self.sampling = request.sampling
        self.adapter = request.adapter
        self.arrival_s = arrival_s
        self.matcher = matcher  # where it stands in its grammar; goes on with `append`, kept by a preemption
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0  # tokens whose KV is in the blocks when the running steps are done
        self.num_pending = 0  # output tokens that running steps sample; their ids are not known yet
        self.steps_running = 0  # steps on the device that use its blocks and lanes
        self.num_cached = 0  # prompt tokens found in the prefix cache at the first admission
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []  # chain over the full blocks, filled as they fill
        self.num_hashed_blocks = 0  # of block_ids: how many are offered to the prefix cache
        self.lanes: LaneSpan | None = None  # device lanes while RUNNING with an adapter
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.seed = request.sampling.seed  # of its draws; the runner gives one to those without
        self.started_s: float | None = None  # when its first step began
        self.timing: SequenceTiming | None = None  # from its first token on
        self.num_preemptions = 0
        self._status = SequenceStatus.WAITING

    @property
    def request_id(self) -> str:
        """The id that the server gave it."""
        return self.request.request_id

    @property
    def status(self) -> SequenceStatus:
        """Where it is in its life."""
        return self._status

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        """Tokens generated so far whose ids are known."""
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True while the prompt's log-probabilities still have to be collected."""
        return self.sampling.prompt_logprobs is not None and self.num_output == 0

    def become(self, status: SequenceStatus) -> None:
        """Change the status; only along TRANSITIONS."""
        assert status in TRANSITIONS[self._status], f"{self._status} -> {status}"
        self._status = status

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.token_ids.append(token_id)
        if self.matcher is not None and token_id not in self.sampling.end_token_ids:
            self.matcher.accept(token_id)


def reads_output(seq: Sequence) -> bool:
    """True if a sampler that counts and matches tokens on the host must know the last one first."""
    s = seq.sampling
    penalised = s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0
    return seq.matcher is not None or penalised or bool(s.bad_words_token_ids)
