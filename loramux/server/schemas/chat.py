"""The shapes of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from pydantic import Field

from loramux.engine.errors import InvalidRequest
from loramux.server.schemas.common import (
    UNSET,
    GenerationRequest,
    PromptLogprobs,
    RequestMetrics,
    RequestModel,
    UnsetType,
    Usage,
)

REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ChatMessage(RequestModel):
    """One message of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, as answers call it


class FunctionTool(RequestModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of an object
    strict: bool | None = None


class ChatTool(RequestModel):
    """A tool; functions are the only kind."""

    type: str = "function"
    function: FunctionTool


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # wins over max_tokens
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    echo: bool = False
    documents: list[dict[str, Any]] = Field(default_factory=list)
    return_prompt_text: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: list[ChatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None  # "auto" if there are tools
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    reasoning_effort: str | None = None

    def check_supported(self) -> None:
        """Refuse what this server cannot do."""
        super().check_supported()
        if self.reasoning_effort not in (None, *REASONING_EFFORTS):
            names = ", ".join(REASONING_EFFORTS)
            message = f"reasoning_effort must be one of {names}, got {self.reasoning_effort[:50]!r}"
            raise InvalidRequest(message, param="reasoning_effort")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            message = f"top_logprobs must be at least 0, got {self.top_logprobs}"
            raise InvalidRequest(message, param="top_logprobs")
        wants_prompt = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and wants_prompt:
            message = "continue_final_message and add_generation_prompt cannot both be true"
            raise InvalidRequest(message, param="continue_final_message")

    def echoed_text(self, role: str) -> str:
        """What `echo` puts in front: the text of a last message that `role` has written."""
        last = self.messages[-1]
        if last.role != role:
            return ""
        parts = last.content if isinstance(last.content, list) else [{"text": last.content or ""}]
        text = "\n".join(str(part.get("text", "")) for part in parts)
        return text.strip() if self.continue_final_message else text  # as the prompt ends then

    def template_options(self, allowed: frozenset[str] | None) -> dict[str, Any]:
        """Values for the chat template: `chat_template_kwargs`, and what `reasoning_effort` means.

        Args:
            allowed: names that the operator allows; None = all.
        """
        meant: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            meant = {"reasoning_effort": self.reasoning_effort}
        if self.reasoning_effort == "none":
            meant["enable_thinking"] = False
        kept = {name: value for name, value in meant.items() if allowed is None or name in allowed}
        return {**kept, **self.chat_template_kwargs}


class TopLogprob(msgspec.Struct, frozen=True):
    """One alternative at one position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """The sampled token at one position, and the alternatives that were asked for."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """Which function, and with what."""

    name: str
    arguments: str  # a JSON text


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a tool."""

    id: str
    type: str = "function"
    function: FunctionCall


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The message that the model wrote."""

    role: str
    content: str | None  # None beside calls or reasoning without text
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType | None = UNSET


class FunctionCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a call; the name comes once, with empty arguments."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The same with the call's place; id and type come once."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionCallDelta


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a message; the role comes once, with the first token."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a chunk that belongs to one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType | None = UNSET
