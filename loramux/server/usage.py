"""Counting the tokens of one call while it runs."""

from __future__ import annotations

from loramux.server.choice import Delta
from loramux.server.generation import Call
from loramux.server.schemas.common import (
    UNSET,
    CompletionTokensDetails,
    PromptTokensDetails,
    UnsetType,
    Usage,
)


class UsageCounter:
    """Tokens so far: every prompt once, every choice's tokens, and what the prefix cache gave."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._num_completion_tokens = 0
        self._cached: dict[int, int] = {}  # prompt -> tokens

    def add(self, delta: Delta) -> None:
        """Count one delta."""
        self._num_completion_tokens += len(delta.token_ids)
        if delta.index % self._call.params.n == 0 and delta.num_cached_tokens:
            self._cached[delta.index] = delta.num_cached_tokens

    def total(self, num_reasoning_tokens: int | None = None) -> Usage:
        """The counts so far; those of the reasoning are known to whoever reads the message."""
        details: CompletionTokensDetails | UnsetType = UNSET
        if num_reasoning_tokens is not None:
            details = CompletionTokensDetails(num_reasoning_tokens)
        num_prompt_tokens = self._call.num_prompt_tokens
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
            completion_tokens_details=details,
        )
