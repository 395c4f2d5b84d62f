"""The engine's log-probabilities in the shapes that clients read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loramux.engine.types import TokenLogprobs
from loramux.server.schemas.chat import ChatLogprobs, TokenLogprob, TopLogprob
from loramux.server.schemas.common import PromptLogprob, PromptLogprobs
from loramux.server.schemas.completions import CompletionLogprobs
from loramux.server.tokenizer import Tokenizer

_LOWEST: Final = -9999.0  # JSON has no infinity
_CONTINUATION: Final = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


def chat_logprobs(
    positions: Sequence[TokenLogprobs], tokenizer: Tokenizer, *, tokens_as_ids: bool = False
) -> ChatLogprobs:
    """The chat shape: each sampled token with its bytes and the alternatives."""
    content: list[TokenLogprob] = []
    for position in positions:
        entries = [
            TopLogprob(
                token=f"token_id:{token_id}" if tokens_as_ids else tokenizer.token_text(token_id),
                logprob=_finite(logprob),
                bytes=list(tokenizer.token_bytes(token_id)),
            )
            for token_id, logprob in zip(position.token_ids, position.logprobs, strict=True)
        ]
        chosen = entries[0]
        content.append(
            TokenLogprob(
                token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=entries[1:]
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    positions: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    start: int = 0,
    tokens_as_ids: bool = False,
) -> CompletionLogprobs:
    """The completions shape: four lists.

    Args:
        positions: one a token; None where there is no value (an echo's first token).
        token_ids: the same tokens.
        tokenizer: the model's.
        start: characters before the first of them; a character counts with its first byte.
        tokens_as_ids: write tokens as `token_id:N`.
    """

    def name(token_id: int) -> str:
        return f"token_id:{token_id}" if tokens_as_ids else _unique_text(token_id, tokenizer)

    answer = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for position, token_id in zip(positions, token_ids, strict=True):
        answer.text_offset.append(start)
        answer.tokens.append(name(token_id))
        start += num_chars(token_id, tokenizer)
        if position is None:
            answer.token_logprobs.append(None)
            answer.top_logprobs.append(None)
            continue
        answer.token_logprobs.append(_finite(position.logprobs[0]))
        pairs = zip(position.token_ids, position.logprobs, strict=True)
        answer.top_logprobs.append({name(id_): _finite(logprob) for id_, logprob in pairs})
    return answer


def num_chars(token_id: int, tokenizer: Tokenizer) -> int:
    """Characters that begin in a token."""
    return len(tokenizer.token_bytes(token_id).translate(None, _CONTINUATION))


def best(position: TokenLogprobs | None, count: int) -> TokenLogprobs | None:
    """The chosen token and only `count` alternatives."""
    if position is None or len(position.token_ids) <= count + 1:
        return position
    return TokenLogprobs(position.token_ids[: count + 1], position.logprobs[: count + 1], position.rank)


def prompt_logprobs(positions: Sequence[TokenLogprobs | None], tokenizer: Tokenizer) -> PromptLogprobs:
    """vLLM's shape for `prompt_logprobs`: an object by token id for each position, null for the first."""
    return [None if position is None else _by_token_id(position, tokenizer) for position in positions]


def _by_token_id(position: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, PromptLogprob]:
    ranks = [position.rank, *range(1, len(position.token_ids))]
    found: dict[str, PromptLogprob] = {}
    for token_id, logprob, rank in zip(position.token_ids, position.logprobs, ranks, strict=True):
        entry = PromptLogprob(
            logprob=_finite(logprob), rank=rank, decoded_token=tokenizer.token_text(token_id)
        )
        found.setdefault(str(token_id), entry)
    return found


def _unique_text(token_id: int, tokenizer: Tokenizer) -> str:
    """The token's text; part of a character as its bytes, since two such must not be one key."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)  # also turns NaN into it: comparisons with NaN are false
