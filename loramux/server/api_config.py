"""How the generating routes answer: what the operator decides for every request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from loramux.engine.errors import InvalidConfig
from loramux.server.chat_template import RESERVED

CONTENT_FORMATS: Final = ("auto", "string", "openai")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Defaults and permissions of the OpenAI routes."""

    force_include_usage: bool = False  # streams carry usage whether or not it was asked for
    request_metrics: bool = False  # answers carry `metrics`
    tokens_as_token_ids: bool = False  # log-probabilities name tokens as `token_id:N`
    stream_interval: int = 1  # tokens a chunk, after the first
    tokenizer_info: bool = False  # GET /tokenizer_info answers
    trust_request_template: bool = False  # a request may bring its own chat template
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for requests that say nothing
    allowed_template_kwargs: frozenset[str] | None = None  # None = whatever the template reads
    content_format: Literal["auto", "string", "openai"] = "auto"  # how templates see message content
    parse_special_tokens: bool = False  # control tokens written in messages are control tokens


def api_config(values: Mapping[str, Any]) -> ApiConfig:
    """The part of the configuration that these routes read.

    Args:
        values: of the flags that were given, by attribute name.

    Raises:
        InvalidConfig: names the flag at fault.
    """
    renamed = {
        "enable_force_include_usage": "force_include_usage",
        "enable_per_request_metrics": "request_metrics",
        "return_tokens_as_token_ids": "tokens_as_token_ids",
        "stream_interval": "stream_interval",
        "enable_tokenizer_info_endpoint": "tokenizer_info",
        "trust_request_chat_template": "trust_request_template",
        "chat_template_content_format": "content_format",
        "parse_special_tokens_in_messages": "parse_special_tokens",
    }
    given = {ours: values[flag] for flag, ours in renamed.items() if flag in values}
    if given.get("stream_interval", 1) < 1:
        message = f"--stream-interval must be at least 1, got {given['stream_interval']}"
        raise InvalidConfig(message, param="--stream-interval")
    if given.get("content_format", "auto") not in CONTENT_FORMATS:
        names, got = ", ".join(CONTENT_FORMATS), given["content_format"]
        message = f"--chat-template-content-format must be one of {names}, got {got!r}"
        raise InvalidConfig(message, param="--chat-template-content-format")
    if "allowed_chat_template_kwargs" in values:
        given["allowed_template_kwargs"] = frozenset(values["allowed_chat_template_kwargs"])
    if "default_chat_template_kwargs" in values:
        given["template_kwargs"] = _json_object(
            values["default_chat_template_kwargs"], "--default-chat-template-kwargs"
        )
        for name in given["template_kwargs"]:
            if name in RESERVED:
                message = f"--default-chat-template-kwargs may not set {name!r}"
                raise InvalidConfig(message, param="--default-chat-template-kwargs")
    return ApiConfig(**given)


def _json_object(text: str, flag: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        message = f"{flag} must be a JSON object, got {text[:200]!r}: {error}"
        raise InvalidConfig(message, param=flag) from error
