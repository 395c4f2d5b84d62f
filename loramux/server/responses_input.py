"""`/v1/responses` as the chat that it means: items become messages, tools and options their chat forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loramux.engine.errors import InvalidRequest
from loramux.server.schemas.chat import ChatRequest
from loramux.server.schemas.responses import ResponsesRequest

_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text", "refusal"})
_REASONING_PARTS: Final = frozenset({"reasoning_text"})
_SAME_NAME: Final = (
    *("model", "temperature", "top_p", "parallel_tool_calls", "stream", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids"),
    *("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "logit_bias"),
    *("structured_outputs", "chat_template_kwargs", "cache_salt", "priority", "request_id"),
)


def to_chat(body: ResponsesRequest) -> ChatRequest:
    """The same call in the words of `/v1/chat/completions`.

    Raises:
        InvalidRequest: it needs something that was stored, or an item, part or tool that is not text
            or a function.
    """
    _refuse_what_needs_a_store(body)
    fields: dict[str, Any] = {
        name: getattr(body, name) for name in _SAME_NAME if name in body.model_fields_set
    }
    fields["messages"] = [*_instructions(body.instructions), *_messages(body.input)]
    fields["max_completion_tokens"] = body.max_output_tokens
    if body.tools:
        fields["tools"] = [_tool(number, tool) for number, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(body.tool_choice)
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.truncation == "auto":
        fields["truncate_prompt_tokens"] = -1
    if wants_logprobs(body):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    fields["response_format"] = _response_format(body.text.format)
    return ChatRequest.checked(fields)


def wants_logprobs(body: ResponsesRequest) -> bool:
    """True if the answer's text shall carry log-probabilities."""
    return bool(body.top_logprobs) or "message.output_text.logprobs" in body.include


def _refuse_what_needs_a_store(body: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            message = f"{name} is not supported: this server stores no responses; send the whole input"
            raise InvalidRequest(message, param=name)
    if body.background:
        message = "background is not supported: this server stores no responses"
        raise InvalidRequest(message, param="background")


def _instructions(text: str | None) -> list[dict[str, Any]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _messages(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a chat; calls and reasoning that follow each other belong to one assistant message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        where = f"input[{number}]"
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(messages, item, where)
        elif kind == "function_call":
            call = {name: _string(item, name, where) for name in ("name", "arguments")}
            entry = {"id": _string(item, "call_id", where), "type": "function", "function": call}
            _open_assistant(messages).setdefault("tool_calls", []).append(entry)
        elif kind == "function_call_output":
            text = _text(item.get("output"), f"{where}.output")
            call_id = _string(item, "call_id", where)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        elif kind == "reasoning":
            text = _text(item.get("content") or [], f"{where}.content", _REASONING_PARTS)
            if text:
                messages.append({"role": "assistant", "reasoning_content": text})
        else:
            message = (
                f"{where}.type must be message, function_call, function_call_output or reasoning, "
                f"got {str(kind)[:100]!r}"
            )
            raise InvalidRequest(message, param=f"{where}.type")
    return [entry for entry in messages if "content" in entry or "tool_calls" in entry]


def _add_message(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    role = _string(item, "role", where)
    text = _text(item.get("content"), f"{where}.content")
    if (
        role == "assistant"
        and messages
        and messages[-1]["role"] == "assistant"
        and "content" not in messages[-1]
    ):
        messages[-1]["content"] = text
    else:
        messages.append({"role": role, "content": text})


def _open_assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant message that the next call belongs to; a new one after anybody else's."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise InvalidRequest(f"{where}.{name} must be a string, got {got}", param=f"{where}.{name}")
    return value


def _text(content: object, where: str, kinds: frozenset[str] = _TEXT_PARTS) -> str:
    """The text of a string, or of a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of parts", param=where)
    pieces: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(text, str):
            message = (
                f"{where}[{number}] must be a text part; this model reads only text, got {str(kind)[:100]!r}"
            )
            raise InvalidRequest(message, param=f"{where}[{number}]")
        pieces.append(text)
    return "".join(pieces)


def _tool(number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        message = f"tools[{number}].type must be function, got {str(tool.get('type'))[:100]!r}"
        raise InvalidRequest(message, param=f"tools[{number}].type")
    kept = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in kept if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str):
        return choice
    if choice.get("type") != "function":
        message = (
            f"tool_choice must be auto, none, required or a function, got {str(choice.get('type'))[:100]!r}"
        )
        raise InvalidRequest(message, param="tool_choice")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given.get("type", "text")
    if kind != "json_schema":
        return {"type": kind}
    kept = ("name", "description", "schema", "strict")
    return {"type": kind, "json_schema": {name: given[name] for name in kept if given.get(name) is not None}}
