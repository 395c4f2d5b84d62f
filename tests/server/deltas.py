"""Deltas of a choice, made by hand."""

from __future__ import annotations

from loramux.server.choice import Delta


def delta(text: str, *, finish_reason: str | None = None, num_tokens: int = 1) -> Delta:
    """What one step added."""
    return Delta(0, text=text, token_ids=[0] * num_tokens, finish_reason=finish_reason)
