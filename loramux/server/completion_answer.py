"""The answer of `/v1/completions`: deltas in, JSON out, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec

from loramux.engine.types import TokenLogprobs
from loramux.server import sse
from loramux.server.adapters import fingerprint
from loramux.server.choice import Delta
from loramux.server.generation import Call
from loramux.server.logprobs import best, completion_logprobs, num_chars, prompt_logprobs
from loramux.server.observe.call_record import current_call
from loramux.server.request_metrics import request_metrics
from loramux.server.schemas.common import UNSET, PromptLogprobs, RequestMetrics, UnsetType, Usage
from loramux.server.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from loramux.server.tokenizer import Tokenizer
from loramux.server.usage import UsageCounter


class CompletionAnswer:
    """Formats one call.

    Args:
        body: what the client sent.
        call: what was planned for it.
        model: the name to show.
        answer_id: "cmpl-...".
        tokenizer: for echoed ids and log-probabilities.
        with_metrics: show the times of the request.
    """

    def __init__(
        self,
        body: CompletionRequest,
        call: Call,
        *,
        model: str,
        answer_id: str,
        tokenizer: Tokenizer,
        with_metrics: bool = False,
    ) -> None:
        self._body = body
        self._call = call
        self._tokenizer = tokenizer
        self._prompt_only = body.echo and body.max_tokens == 0
        self._with_metrics = with_metrics
        self._offsets: dict[int, int] = {}  # choice -> characters that its tokens so far begin
        self._usage = UsageCounter(call)
        self._joined = [Delta(index) for index in range(len(call.requests))]  # of a whole answer
        self._frame = Completion(
            id=answer_id,
            created=int(time.time()),
            model=model,
            choices=[],
            system_fingerprint=fingerprint(call.adapter),
        )

    def add(self, delta: Delta) -> None:
        """Take in one more delta of an answer that is sent whole."""
        shown = self._cut(delta)
        self._usage.add(shown)
        self._joined[delta.index].join(shown)

    def whole(self) -> bytes:
        """The JSON text of all choices, once they have ended."""
        choices = [self._choice(delta) for delta in self._joined]
        usage, metrics = self._usage.total(), self._metrics()
        answer = msgspec.structs.replace(self._frame, choices=choices, usage=usage, metrics=metrics)
        return msgspec.json.encode(answer)

    async def events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The event stream; closes `deltas`."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        async with aclosing(deltas) as source:
            async for item in source:
                delta = self._cut(item)
                self._usage.add(delta)
                if self._is_silent(delta):
                    continue
                usage = self._usage.total() if continuous else (None if with_usage else UNSET)
                yield self._event([self._choice(delta)], usage)
        if with_usage:
            yield self._event([], self._usage.total(), self._metrics())
        yield sse.DONE

    def _metrics(self) -> RequestMetrics | UnsetType | None:
        return request_metrics(current_call()) if self._with_metrics else UNSET

    def _event(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType | None,
        metrics: RequestMetrics | UnsetType | None = UNSET,
    ) -> bytes:
        frame = msgspec.structs.replace(self._frame, choices=choices, usage=usage, metrics=metrics)
        return sse.event(msgspec.json.encode(frame))

    def _cut(self, delta: Delta) -> Delta:
        """With echo and max_tokens 0, only the prompt is wanted; the engine had to make one token."""
        if not self._prompt_only:
            return delta
        return replace(delta, text="", token_ids=[], logprobs=[], finish_reason="length", stop_reason=None)

    def _is_silent(self, delta: Delta) -> bool:
        """Whether a delta shows nothing: its text is held back and nobody asked for its tokens."""
        asked = self._body.logprobs is not None or self._body.return_token_ids
        asked = asked or (self._body.prompt_logprobs is not None and delta.prompt_logprobs is not None)
        is_first_echo = self._body.echo and delta.index not in self._offsets
        return not (delta.text or delta.finish_reason or asked or is_first_echo)

    def _choice(self, delta: Delta) -> CompletionChoice:
        """The next piece of a choice; the first one begins with the echo."""
        is_first = delta.index not in self._offsets
        prompt = self._call.prompt_of(delta.index)
        text, token_ids, positions = delta.text, delta.token_ids, list[TokenLogprobs | None](delta.logprobs)
        if is_first and self._body.echo:
            text = self._echo(delta.index) + text
            token_ids = [*prompt.token_ids, *token_ids]
            asked = self._body.logprobs or 0
            positions = [*(best(position, asked) for position in delta.prompt_logprobs or ()), *positions]
        return CompletionChoice(
            index=delta.index,
            text=text,
            logprobs=self._logprobs(delta.index, positions, token_ids),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
            prompt_token_ids=prompt.token_ids if is_first and self._body.return_token_ids else UNSET,
            prompt_logprobs=self._prompt_logprobs(delta),
        )

    def _prompt_logprobs(self, delta: Delta) -> PromptLogprobs | UnsetType:
        asked = self._body.prompt_logprobs
        if asked is None or delta.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs([best(position, asked) for position in delta.prompt_logprobs], self._tokenizer)

    def _logprobs(
        self, index: int, positions: list[TokenLogprobs | None], token_ids: list[int]
    ) -> CompletionLogprobs | None:
        start = self._offsets.setdefault(index, 0)
        if self._body.logprobs is None:
            return None
        self._offsets[index] = start + sum(num_chars(token_id, self._tokenizer) for token_id in token_ids)
        return completion_logprobs(
            positions,
            token_ids,
            self._tokenizer,
            start=start,
            tokens_as_ids=bool(self._body.return_tokens_as_token_ids),
        )

    def _echo(self, index: int) -> str:
        prompt = self._call.prompt_of(index)
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=self._body.skip_special_tokens)
