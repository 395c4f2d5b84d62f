"""The shapes of `/v1/completions`."""

from __future__ import annotations

from typing import Any

import msgspec

from loramux.engine.errors import InvalidRequest
from loramux.server.schemas.common import (
    UNSET,
    GenerationRequest,
    PromptLogprobs,
    RequestMetrics,
    UnsetType,
    Usage,
)
from loramux.server.schemas.prompt_shape import PromptInput


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: PromptInput
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    prompt_embeds: Any = None

    def check_supported(self) -> None:
        """Refuse what this server cannot do."""
        super().check_supported()
        if self.suffix:
            raise InvalidRequest("suffix is not supported", param="suffix")
        if self.prompt_embeds is not None:
            raise InvalidRequest("prompt_embeds is not supported", param="prompt_embeds")


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Four lists with one entry a token; the first prompt token of an echo has none (null)."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One text; `index` = prompt index x n + number of the choice. In a chunk: its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, or one chunk of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    metrics: RequestMetrics | UnsetType | None = UNSET
