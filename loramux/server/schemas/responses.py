"""The shapes of `/v1/responses`: OpenAI's newer form of a chat, without anything stored here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic import Field

from loramux.server.schemas.chat import TokenLogprob
from loramux.server.schemas.common import RequestModel


class TextOptions(RequestModel):
    """`text`: the form of the answer."""

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    verbosity: str | None = None  # accepted, without effect


class ReasoningOptions(RequestModel):
    """`reasoning`: how much the model should think."""

    effort: str | None = None
    summary: str | None = None  # accepted, without effect: the reasoning itself is returned
    generate_summary: str | None = None


class ResponsesRequest(RequestModel):
    """The body of `POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None  # include_obfuscation: accepted, without effect
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: ReasoningOptions | None = None
    include: list[str] = Field(default_factory=list)
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[str, str] = Field(default_factory=dict)
    user: str | None = None
    service_tier: str | None = None
    store: bool = False  # accepted; the answer says that nothing was stored
    # Read only to be refused: they stand for something that this server does not keep or run.
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool = False
    # vLLM's extras
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[str, float] = Field(default_factory=dict)
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    cache_salt: str = ""
    priority: int = 0
    request_id: str | None = None


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """Text that the model wrote."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[dict[str, Any]] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """One message of the answer."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: str
    content: list[OutputText]


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True):
    """What the model thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """The reasoning before the answer."""

    id: str
    status: str
    summary: list[dict[str, Any]] = []
    content: list[ReasoningText]


class OutputFunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """One call of a tool; `call_id` is what its output must name."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = OutputMessage | OutputReasoning | OutputFunctionCall


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer's tokens were for."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one call."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, and what the events of a stream carry of it."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str  # in_progress, completed, incomplete or failed
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, str | None]
    service_tier: str = "default"
    store: bool = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]
    background: bool = False
    system_fingerprint: str


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What every event of a stream has; each type adds its own fields."""

    type: str
    sequence_number: int
