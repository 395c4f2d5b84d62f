"""How much one request may ask for. Checked before any work; each limit has a flag."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds for the fields of one request, all inclusive."""

    request_bytes: int = 32 << 20  # --max-request-bytes: a body
    messages: int = 2048  # --max-messages: of a chat
    prompts: int = 1024  # --max-prompts: of a completion call
    n: int = 128  # --max-n: choices a prompt
    stop: int = 4  # --max-stop: stop strings
    stop_token_ids: int = 128  # --max-stop-token-ids
    logit_bias: int = 1024  # --max-logit-bias: entries; also bounds allowed_token_ids
    bad_words: int = 128  # --max-bad-words
    logprobs: int = 20  # --max-logprobs: alternatives a token
    chat_template_bytes: int = 64 << 10  # --max-chat-template-bytes: of a request's own template
    string_chars: int = 1024  # of one stop string or bad word
