"""How much one request may ask for. Checked before any work; each limit has a flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramux.engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds for the fields of one request, all inclusive."""

    request_bytes: int = 32 << 20  # --max-request-bytes: a body
    json_depth: int = 128  # --max-json-depth: lists and objects inside each other
    json_values: int = 1 << 20  # --max-json-values: a string counts 4, a list or object 16
    messages: int = 2048  # --max-messages: of a chat
    tools: int = 128  # --max-tools: of a chat
    tools_bytes: int = 1 << 20  # --max-tools-bytes: of their JSON
    prompts: int = 1024  # --max-prompts: of a completion call
    prompt_tokens: int = 1 << 20  # --max-prompt-tokens: of all prompts of a call
    n: int = 128  # --max-n: choices a prompt
    sequences: int = 1024  # --max-sequences: of a call, prompts x n
    stop: int = 4  # --max-stop: stop strings
    stop_token_ids: int = 128  # --max-stop-token-ids
    logit_bias: int = 1024  # --max-logit-bias: entries; also bounds allowed_token_ids
    bad_words: int = 128  # --max-bad-words
    logprobs: int = 20  # --max-logprobs: alternatives a token
    logprob_token_ids: int = 128  # --max-logprob-token-ids
    prompt_logprob_values: int = 1 << 20  # --max-prompt-logprob-values: of all choices of a call
    chat_template_bytes: int = 64 << 10  # --max-chat-template-bytes: of a request's own template
    schema_bytes: int = 64 << 10  # --max-schema-bytes: a JSON schema, a grammar, all choices
    schema_depth: int = 64  # --max-schema-depth: lists and objects inside each other in a schema
    regex_bytes: int = 8 << 10  # --max-regex-bytes
    choices: int = 1024  # --max-choices: of structured_outputs
    grammars_in_flight: int = 64  # --max-grammars-in-flight: compiled for the first time, together
    string_chars: int = 1024  # --max-string-chars: of one stop string or bad word


def check_count(name: str, count: int, limit: int, flag: str, unit: str = "") -> None:
    """Refuse more than the operator allows.

    Raises:
        InvalidRequest: names field, value, limit and flag.
    """
    if count > limit:
        message = f"{name} allows at most {limit}{unit}, got {count} (the server's {flag})"
        raise InvalidRequest(message, param=name)


def check_field_sizes(body: Mapping[str, Any], limits: Limits) -> None:
    """Refuse long lists in a body as it was parsed, before each of their items is looked at.

    Checking half a million items only to say that 4 are allowed would hold everybody up.

    Raises:
        InvalidRequest: names field, value, limit and flag.
    """
    counted = (
        ("messages", limits.messages, "--max-messages"),
        ("input", limits.messages, "--max-messages"),
        ("tools", limits.tools, "--max-tools"),
        ("stop", limits.stop, "--max-stop"),
        ("stop_token_ids", limits.stop_token_ids, "--max-stop-token-ids"),
        ("logit_bias", limits.logit_bias, "--max-logit-bias"),
        ("allowed_token_ids", limits.logit_bias, "--max-logit-bias"),
        ("bad_words", limits.bad_words, "--max-bad-words"),
        ("logprob_token_ids", limits.logprob_token_ids, "--max-logprob-token-ids"),
    )
    for name, limit, flag in counted:
        value = body.get(name)
        if isinstance(value, list | dict):
            check_count(name, len(value), limit, flag, " entries")
    tokens = body.get("tokens")  # of /detokenize
    if isinstance(tokens, list):
        check_count("tokens", len(tokens), limits.prompt_tokens, "--max-prompt-tokens")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            check_count("prompt", len(prompt), limits.prompt_tokens, "--max-prompt-tokens", " tokens")
        else:
            check_count("prompt", len(prompt), limits.prompts, "--max-prompts", " prompts a call")
