"""The shapes of `/tokenize` and `/detokenize` (vLLM's)."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import Field, model_validator

from loramux.engine.errors import InvalidRequest
from loramux.server.schemas.chat import ChatMessage, ChatTool
from loramux.server.schemas.common import RequestModel


class TokenizeRequest(RequestModel):
    """The body of `POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None  # True for a prompt, False for messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[ChatTool] = Field(default_factory=list)
    documents: list[dict[str, Any]] = Field(default_factory=list)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False

    def check_supported(self) -> None:
        """Refuse combinations that make no sense.

        Raises:
            InvalidRequest: names the field.
        """
        wants_prompt = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and wants_prompt:
            message = "continue_final_message and add_generation_prompt cannot both be true"
            raise InvalidRequest(message, param="continue_final_message")

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either 'prompt' or 'messages'")
        return self


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


class Detokenized(msgspec.Struct, frozen=True):
    """The text of token ids."""

    prompt: str
