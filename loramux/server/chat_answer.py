"""The answer of `/v1/chat/completions`: deltas in, JSON out, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from loramux.server import sse
from loramux.server.adapters import fingerprint
from loramux.server.choice import Delta
from loramux.server.generation import Call
from loramux.server.logprobs import chat_logprobs, prompt_logprobs
from loramux.server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
)
from loramux.server.schemas.common import UNSET, UnsetType, Usage
from loramux.server.tokenizer import Tokenizer
from loramux.server.usage import UsageCounter


class ChatAnswer:
    """Formats one call.

    Args:
        body: what the client sent.
        call: what was planned for it.
        model: the name to show.
        answer_id: "chatcmpl-...".
        tokenizer: for log-probabilities.
        role: of the answer, "assistant" unless the operator says otherwise.
    """

    def __init__(
        self,
        body: ChatRequest,
        call: Call,
        *,
        model: str,
        answer_id: str,
        tokenizer: Tokenizer,
        role: str,
    ) -> None:
        self._body = body
        self._call = call
        self._tokenizer = tokenizer
        self._role = role
        self._usage = UsageCounter(call)
        self._introduced: set[int] = set()  # choices whose role was sent
        self._id = answer_id
        self._model = model
        self._created = int(time.time())
        self._frame = ChatChunk(
            id=answer_id,
            created=self._created,
            model=model,
            choices=[],
            system_fingerprint=fingerprint(call.adapter),
        )

    def whole(self, deltas: Sequence[Delta]) -> bytes:
        """The JSON text of all choices."""
        choices: list[ChatChoice] = []
        for delta in deltas:
            self._usage.add(delta)
            assert delta.finish_reason is not None
            choices.append(
                ChatChoice(
                    index=delta.index,
                    message=AssistantMessage(role=self._role, content=delta.text),
                    logprobs=self._logprobs(delta),
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                    token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
                )
            )
        prompt_positions = deltas[0].prompt_logprobs
        answer = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._usage.total(),
            system_fingerprint=fingerprint(self._call.adapter),
            prompt_logprobs=(
                prompt_logprobs(prompt_positions, self._tokenizer) if prompt_positions is not None else UNSET
            ),
            prompt_token_ids=self._prompt_token_ids(),
        )
        return msgspec.json.encode(answer)

    async def events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The event stream; closes `deltas`."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        async with aclosing(deltas) as source:
            async for delta in source:
                self._usage.add(delta)
                if self._is_silent(delta):
                    continue
                usage = self._usage.total() if continuous else (None if with_usage else UNSET)
                yield self._chunk(delta, usage)
        if with_usage:
            yield self._event([], self._usage.total())
        yield sse.DONE

    def _is_silent(self, delta: Delta) -> bool:
        """Whether a delta shows nothing: its text is held back and nobody asked for its tokens."""
        return not (delta.text or delta.finish_reason or self._body.logprobs or self._body.return_token_ids)

    def _chunk(self, delta: Delta, usage: Usage | UnsetType | None) -> bytes:
        is_first = delta.index not in self._introduced
        self._introduced.add(delta.index)
        choice = ChunkChoice(
            index=delta.index,
            delta=ChatDelta(
                role=self._role if is_first else UNSET,
                content=delta.text if is_first or delta.text else UNSET,
            ),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason if delta.finish_reason else UNSET,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )
        return self._event([choice], usage, self._prompt_token_ids() if is_first else UNSET)

    def _event(
        self,
        choices: list[ChunkChoice],
        usage: Usage | UnsetType | None,
        prompt_token_ids: list[int] | UnsetType = UNSET,
    ) -> bytes:
        frame = msgspec.structs.replace(
            self._frame, choices=choices, usage=usage, prompt_token_ids=prompt_token_ids
        )
        return sse.event(msgspec.json.encode(frame))

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        as_ids = self._body.return_tokens_as_token_ids
        return chat_logprobs(delta.logprobs, self._tokenizer, tokens_as_ids=as_ids)

    def _prompt_token_ids(self) -> list[int] | UnsetType:
        return self._call.prompts[0].token_ids if self._body.return_token_ids else UNSET
