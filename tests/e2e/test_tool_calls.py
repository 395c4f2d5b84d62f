"""Forced tool calls of the real model: it was never trained for tools, and still makes valid calls."""

from __future__ import annotations

import json
from typing import Any, Final

import httpx
import jsonschema
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

CITY: Final[dict[str, object]] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
ADD: Final[dict[str, object]] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/Digit"}, "b": {"$ref": "#/$defs/Digit"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"Digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
SCHEMAS: Final = {"get_weather": CITY, "add": ADD}
TOOLS: Final[list[ChatCompletionFunctionToolParam]] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
QUESTION: Final[list[ChatCompletionMessageParam]] = [
    {"role": "user", "content": "What is the weather in Paris?"}
]


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("seed", [1, 2])
def test_required_calls_fit_their_schemas(client: OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        seed=seed,
        max_completion_tokens=200,
    )

    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    assert len(choice.message.tool_calls) == 1
    for call in choice.message.tool_calls:
        assert call.type == "function"
        check(call.function.name, call.function.arguments)


def test_named_call_streams_arguments_that_fit(client: OpenAI) -> None:
    stream: Any = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "add"}},
        seed=3,
        stream=True,
        max_completion_tokens=200,
    )

    chunks = list(stream)

    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "add"
    assert deltas[0].id
    check("add", "".join(delta.function.arguments for delta in deltas))
    assert len(deltas) > 3
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_call_and_its_result_continue_the_conversation(client: OpenAI) -> None:
    call: Any = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":2}'}}
    history: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]

    answer = client.chat.completions.create(
        model="smollm2",
        messages=history,
        tools=TOOLS,
        tool_choice="none",
        max_completion_tokens=5,
        temperature=0,
    )

    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_schema_that_cannot_be_used_is_the_tools_fault(http: httpx.Client, choice: Any) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(("}}, "required": ["a"]}
    body = {
        "messages": QUESTION,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": bad}}],
        "tool_choice": choice,
    }

    response = http.post("/v1/chat/completions", json=body)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "tools"
