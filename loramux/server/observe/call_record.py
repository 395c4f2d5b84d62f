"""What is noted of one HTTP request while it is served; metrics, log line and trace read it at the end.

The record of the request that is being served is found with `current_call`: it travels with the context of
its task, so that nothing between the edge and the generator has to pass it on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Final

from loramux.engine.types import Request, SequenceTiming
from loramux.server.observe.buckets import FIRST_TOKEN_S, TOKEN_S
from loramux.server.observe.series import Histogram
from loramux.server.observe.trace_context import TraceContext


class TokenMetrics:
    """What is counted as tokens come, not at a request's end."""

    __slots__ = ("first_token_s", "num_cached", "num_generated", "num_prompt", "token_s")

    def __init__(self) -> None:
        self.first_token_s = Histogram(FIRST_TOKEN_S)
        self.token_s = Histogram(TOKEN_S)
        self.num_prompt = 0
        self.num_cached = 0  # of the prompts' tokens
        self.num_generated = 0


@dataclass(slots=True)
class SequenceRecord:
    """One choice. Times are those of `time.monotonic`; 0 before the first token."""

    num_prompt: int
    num_cached: int = 0
    num_output: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    queue_s: float | None = None  # waited in the engine
    prefill_s: float | None = None  # from its first step to its first token
    num_preemptions: int = 0
    finish_reason: str | None = None  # None: it was given up, or failed
    text: list[str] | None = None  # what it said, in pieces, if that is to be logged

    def add_text(self, piece: str) -> None:
        """It said more."""
        if self.text is not None:
            self.text.append(piece)


@dataclass(slots=True, eq=False)
class CallRecord:
    """One HTTP request. What is None or empty was not reached, or is not of its kind."""

    tokens: TokenMetrics = field(default_factory=TokenMetrics)
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    method: str = ""
    path: str = ""  # as sent: for logs, escaped, and never for a label
    route: str | None = None  # the template
    status: int | None = None  # None: the client left before the answer began
    request_id: str = ""
    key_id: str | None = None
    trace: TraceContext | None = None
    error: str | None = None  # code of the error that the client was told, or would have been
    model: str | None = None  # as asked for
    adapter: str | None = None  # its name
    adapter_version: int = 0
    adapter_digest: str = ""
    waits_for: str | None = None  # name of the adapter that it waits for now
    adapter_wait_s: float | None = None  # until the adapter could be used; None for the base model
    had_to_load: bool = False  # the adapter was not there yet
    n: int = 0
    max_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    sequences: list[SequenceRecord] = field(default_factory=list)
    keeps_prompts: bool = False  # the operator wants them in the log
    keeps_outputs: bool = False
    prompts: list[str] = field(default_factory=list)

    @contextmanager
    def waiting_for(self, adapter: str) -> Iterator[None]:
        """Its adapter is not there yet."""
        self.waits_for, self.had_to_load = adapter, True
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.waits_for = None
            self.adapter_wait_s = time.monotonic() - began_s

    def leased(self, name: str, version: int, digest: str) -> None:
        """Its adapter is there."""
        self.adapter, self.adapter_version, self.adapter_digest = name, version, digest
        if self.adapter_wait_s is None:
            self.adapter_wait_s = 0.0

    def start(self, requests: Sequence[Request], *, n: int) -> list[SequenceRecord]:
        """The engine is asked for sequences; returns what `took` and `was_timed` want, in their order."""
        sampling = requests[0].sampling
        self.n, self.max_tokens = n, sampling.max_tokens
        self.temperature, self.top_p = sampling.temperature, sampling.top_p
        sequences = [SequenceRecord(len(request.prompt_token_ids)) for request in requests]
        for sequence in sequences if self.keeps_outputs else ():
            sequence.text = []
        self.sequences += sequences
        return sequences

    def took(
        self, sequence: SequenceRecord, num_tokens: int, finish_reason: str | None, num_cached: int
    ) -> None:
        """A sequence made tokens. Called for every chunk: the only work that a token costs."""
        now = time.monotonic()
        tokens = self.tokens
        if sequence.first_s:
            tokens.token_s.observe(now - sequence.last_s)
        else:
            sequence.first_s = now
            sequence.num_cached = num_cached
            tokens.first_token_s.observe(now - self.started_s)
            tokens.num_prompt += sequence.num_prompt
            tokens.num_cached += num_cached
        sequence.last_s = now
        sequence.num_output += num_tokens
        tokens.num_generated += num_tokens
        if finish_reason is not None:
            sequence.finish_reason = finish_reason

    @staticmethod
    def was_timed(sequence: SequenceRecord, timing: SequenceTiming) -> None:
        """The engine told how long a sequence took; with its first token, and again with its last."""
        sequence.queue_s, sequence.prefill_s = timing.queue_s, timing.prefill_s
        sequence.num_preemptions = timing.num_preemptions

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once however many choices it has."""
        return sum(sequence.num_prompt for sequence in self.sequences[:: max(self.n, 1)])

    @property
    def num_cached_tokens(self) -> int:
        """Of these, those that the prefix cache had."""
        return sum(sequence.num_cached for sequence in self.sequences[:: max(self.n, 1)])

    @property
    def num_output_tokens(self) -> int:
        """Of all choices."""
        return sum(sequence.num_output for sequence in self.sequences)

    @property
    def is_inference(self) -> bool:
        """True if it asked the model for something, even if that was refused."""
        return bool(self.sequences) or self.model is not None or self.route in GENERATION_ROUTES

    @property
    def has_begun(self) -> bool:
        """True once any sequence has made a token."""
        return any(sequence.first_s for sequence in self.sequences)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request's arrival to its first token."""
        firsts = [sequence.first_s for sequence in self.sequences if sequence.first_s]
        return min(firsts) - self.started_s if firsts else None

    @property
    def finish_reason(self) -> str | None:
        """How it ended: the choices' reason, or several with commas; `abort` or `error` for the rest."""
        if not self.sequences:
            return None
        reasons = {sequence.finish_reason or self.unfinished for sequence in self.sequences}
        return ",".join(sorted(reasons))

    @property
    def told_error(self) -> str | None:
        """The code of its error; also that of a client who left before there was an answer."""
        return self.error or (CLIENT_GONE if self.status is None else None)

    @property
    def unfinished(self) -> str:
        """Why sequences have no end of their own: `error`, or `abort` if the client left."""
        return "error" if self.error not in (None, CLIENT_GONE) else "abort"


GENERATION_ROUTES: Final = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/invocations"}
)
CLIENT_GONE: Final = "client_closed_request"
_current: Final[ContextVar[CallRecord | None]] = ContextVar("loramux_call", default=None)


def current_call() -> CallRecord:
    """The record of the request that is being served; outside of one, a record that nobody reads."""
    return _current.get() or CallRecord()


def note_error(code: str) -> None:
    """An error is what the client of the current request is told, or would have been."""
    record = _current.get()
    if record is not None:
        record.error = code


def enter_call(record: CallRecord) -> Token[CallRecord | None]:
    """Make `record` the current one, until `leave_call`."""
    return _current.set(record)


def leave_call(token: Token[CallRecord | None]) -> None:
    """Undo `enter_call`."""
    _current.reset(token)
