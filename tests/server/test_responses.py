"""`/v1/responses` through OpenAI's own client, with a stand-in engine that says what a model would."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseReasoningItem,
)

from tests.running_server import RunningServer, running_server
from tests.server.chat_client import saying
from tests.server.fake_serve import COMMAND
from tests.server.tiny_text import CHAT_TEMPLATE

TEMPLATE: Final = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
ARGUMENTS: Final = '{"city": "Zürich"}'
CALL: Final = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
WEATHER: Final[dict[str, Any]] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


@pytest.fixture(scope="module")
def server(text_model: Path) -> Iterator[RunningServer]:
    """A model that calls tools in the format of Hermes and may think first."""
    with running_server(
        *(str(text_model), "--served-model-name", "tiny", "--reasoning-parser=qwen3"),
        f"--chat-template={TEMPLATE}",
        command=COMMAND,
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def raw(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as plain:
        yield plain


def respond(client: openai.OpenAI, answer: str, **body: Any) -> Response:
    """The whole response of a model that says `answer`."""
    said = saying(answer)[0]["content"]
    response = client.responses.create(model="tiny", input=said, temperature=0, **body)
    assert isinstance(response, Response)
    return response


def events_of(raw: httpx.Client, answer: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each with the name that stands before it."""
    said = saying(answer)[0]["content"]
    got = raw.post("/v1/responses", json={"model": "tiny", "input": said, "stream": True, **body})
    assert got.status_code == 200, got.text
    events = []
    for block in got.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_text_is_one_completed_message(client: openai.OpenAI) -> None:
    response = respond(client, "It is warm.", metadata={"trace": "7"}, max_output_tokens=100)

    assert response.id.startswith("resp_")
    assert (response.object, response.status, response.model) == ("response", "completed", "tiny")
    assert response.output_text == "It is warm."
    assert (response.error, response.incomplete_details, response.previous_response_id) == (None, None, None)
    assert (response.metadata, response.max_output_tokens) == ({"trace": "7"}, 100)
    assert response.usage is not None
    assert response.usage.output_tokens == len("It is warm.") + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_calls_are_items_of_their_own(client: openai.OpenAI) -> None:
    response = respond(client, f"Let me look.{CALL}", tools=[WEATHER])

    message, call = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert isinstance(call, ResponseFunctionToolCall)
    assert response.output_text == "Let me look."
    assert (call.name, call.arguments, call.status) == ("get_weather", ARGUMENTS, "completed")
    assert call.id != call.call_id


def test_reasoning_is_an_item_before_the_text(client: openai.OpenAI) -> None:
    response = respond(client, "<think>\nhm\n</think>\n\nYes.")

    thought, message = response.output
    assert isinstance(thought, ResponseReasoningItem)
    assert thought.content is not None
    assert [part.text for part in thought.content] == ["hm"]
    assert isinstance(message, ResponseOutputMessage)
    assert response.output_text == "Yes."
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_cut_answer_is_incomplete(client: openai.OpenAI) -> None:
    response = respond(client, "It is warm.", max_output_tokens=5)

    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "It is"


def test_conversation_is_given_back_as_items(client: openai.OpenAI, raw: httpx.Client) -> None:
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "x"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "c1", "output": "12 degrees"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "12.", "annotations": []}]},
        {"role": "user", "content": "thanks"},
    ]

    got = raw.post("/v1/responses", json={"model": "tiny", "input": items, "instructions": "hello"})

    text = got.json()["output"][0]["content"][0]["text"]
    assert text.startswith("system: hellosystem: be briefuser: weather?")
    assert text.endswith("tool: 12 degreesassistant: 12.user: thanks")
    same = client.responses.create(model="tiny", input=items, instructions="hello")  # type: ignore[arg-type]
    assert same.output_text == text


def test_stream_builds_the_response_that_the_whole_answer_is(raw: httpx.Client) -> None:
    events = events_of(raw, f"<think>hm</think>Let me look.{CALL}", tools=[WEATHER])

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    for kind, index, text in (
        ("response.reasoning_text.delta", 0, "hm"),
        ("response.output_text.delta", 1, "Let me look."),
        ("response.function_call_arguments.delta", 2, ARGUMENTS),
    ):
        deltas = [event for event in events if event["type"] == kind]
        assert {event["output_index"] for event in deltas} == {index}
        assert {event["item_id"] for event in deltas} == {final["output"][index]["id"]}
        assert "".join(event["delta"] for event in deltas) == text


def test_the_sdk_follows_a_stream(client: openai.OpenAI) -> None:
    said = saying(f"Let me look.{CALL}")[0]["content"]

    with client.responses.stream(model="tiny", input=said, tools=[WEATHER]) as stream:  # type: ignore[list-item]
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()

    assert text == final.output_text == "Let me look."
    assert [item.type for item in final.output] == ["message", "function_call"]


def test_text_carries_logprobs_on_request(raw: httpx.Client) -> None:
    events = events_of(raw, "Yes", top_logprobs=2, include=["message.output_text.logprobs"])

    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    tokens = [entry["token"] for event in deltas for entry in event["logprobs"]]
    assert "".join(tokens).startswith("Yes")
    assert all(len(entry["top_logprobs"]) == 2 for event in deltas for entry in event["logprobs"])
    part = events[-1]["response"]["output"][0]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == tokens


def test_failure_before_the_first_token_is_a_status(raw: httpx.Client) -> None:
    got = raw.post("/v1/responses", json={"model": "tiny", "input": "!refuse", "stream": True})

    assert got.status_code == 400
    assert got.json()["error"]["code"] == "invalid_value"


def test_a_stream_that_breaks_says_so_twice(server: RunningServer, raw: httpx.Client) -> None:
    body = {"model": "tiny", "input": "!slow", "stream": True}
    with raw.stream("POST", "/v1/responses", json=body) as got:
        lines = got.iter_lines()
        next(line for line in lines if "output_text.delta" in line)
        os.kill(server.engine_pid(), signal.SIGKILL)
        data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    assert data[-2]["type"] == "response.failed"
    assert data[-2]["response"]["status"] == "failed"
    assert data[-2]["response"]["error"]["code"] == data[-1]["error"]["code"] == "engine_unavailable"


def test_a_stream_never_says_why_the_server_failed(raw: httpx.Client) -> None:
    got = raw.post("/v1/responses", json={"input": "!weird!weird!weird", "stream": True})

    *_, failed, last = (json.loads(line[6:]) for line in got.text.split("\n") if line.startswith("data: "))
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"]["code"] == last["error"]["code"] == "internal_error"
    assert failed["response"]["error"]["message"] == "The server had an internal error."


def test_operator_decides_about_events_and_tokens(text_model: Path) -> None:
    flags = ("--stream-interval=4", "--return-tokens-as-token-ids")
    with running_server(str(text_model), *flags, command=COMMAND) as server, server.client() as raw:
        body = {"input": saying("12345678"), "top_logprobs": 1, "stream": True}
        text = raw.post("/v1/responses", json=body).text

    data = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    deltas = [event for event in data if event["type"] == "response.output_text.delta"]
    assert [event["delta"] for event in deltas] == ["1", "2345", "678"]
    assert deltas[0]["logprobs"][0]["token"] == "token_id:49"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"truncation": "middle"}, "truncation"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    raw: httpx.Client, body: dict[str, Any], param: str
) -> None:
    got = raw.post("/v1/responses", json={"model": "tiny", "input": "hi", **body})

    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
