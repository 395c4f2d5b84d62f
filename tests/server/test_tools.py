"""Tools over HTTP, with a stand-in engine that says what a model would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest

from tests.running_server import RunningServer, running_server
from tests.server.chat_client import answered, chat, chunks, rebuilt, refused, saying
from tests.server.fake_serve import COMMAND
from tests.server.tiny_text import CHAT_TEMPLATE

TEMPLATE: Final = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for message in messages if message.tool_calls is defined %}CALLS{% endfor %}" + CHAT_TEMPLATE
)
CITY: Final = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Final = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
TIME: Final = {"type": "function", "function": {"name": "get_time"}}
ARGUMENTS: Final = '{"city": "Zürich"}'
ONE_CALL: Final = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TWO_CALLS: Final = f'{ONE_CALL}\n<tool_call>\n{{"name": "get_time", "arguments": {{}}}}\n</tool_call>'
NAMED: Final = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def tool_server(text_model: Path) -> Iterator[RunningServer]:
    """A model whose chat template teaches the format of Hermes."""
    with running_server(
        *(str(text_model), "--served-model-name", "tiny", "--max-model-len=4096", "--max-tools=3"),
        *("--max-tools-bytes=2000", f"--chat-template={TEMPLATE}"),
        command=COMMAND,
    ) as server:
        yield server


@pytest.fixture
def tool_http(tool_server: RunningServer) -> Iterator[httpx.Client]:
    """A plain client for it."""
    with tool_server.client() as client:
        yield client


def test_calls_of_an_answer_are_found(tool_http: httpx.Client) -> None:
    choice = chat(tool_http, TWO_CALLS, tools=[WEATHER, TIME])

    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert [call["type"] for call in calls] == ["function", "function"]
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": ARGUMENTS},
        {"name": "get_time", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2


def test_answer_without_a_call_has_no_calls(tool_http: httpx.Client) -> None:
    choice = chat(tool_http, "It is <b>warm</b>.", tools=[WEATHER])

    assert choice["message"] == {"role": "assistant", "content": "It is <b>warm</b>.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_stream_of_calls_is_what_strict_clients_expect(tool_http: httpx.Client) -> None:
    pieces = chunks(tool_http, f"Let me look. {TWO_CALLS}", tools=[WEATHER, TIME])

    message = rebuilt(pieces)
    assert message["content"] == "Let me look. "
    assert [(call["name"], call["arguments"]) for call in message["tool_calls"]] == [
        ("get_weather", ARGUMENTS),
        ("get_time", "{}"),
    ]
    assert message["finish_reason"] == "tool_calls"
    reasons = [piece["choices"][0]["finish_reason"] for piece in pieces]
    assert reasons[:-1] == [None] * (len(pieces) - 1)
    assert not any("<" in (piece["choices"][0]["delta"].get("content") or "") for piece in pieces)


def test_stream_that_begins_with_a_call_begins_with_the_role(tool_http: httpx.Client) -> None:
    delta = chunks(tool_http, ONE_CALL, tools=[WEATHER])[0]["choices"][0]["delta"]

    assert delta["role"] == "assistant"
    assert delta["content"] is None
    assert delta["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}


def test_arguments_are_streamed_before_the_call_is_complete(tool_http: httpx.Client) -> None:
    pieces = chunks(tool_http, ONE_CALL, tools=[WEATHER])

    arguments = [
        call["function"]["arguments"]
        for piece in pieces
        for call in piece["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert len(arguments) > len(ARGUMENTS) / 2


def test_logprobs_of_a_stream_are_those_of_every_token_once(tool_http: httpx.Client) -> None:
    pieces = chunks(tool_http, ONE_CALL, tools=[WEATHER], logprobs=True)
    whole = chat(tool_http, ONE_CALL, tools=[WEATHER], logprobs=True)

    streamed = [
        entry for piece in pieces for entry in (piece["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == whole["logprobs"]["content"]
    assert bytes(byte for entry in streamed[:-1] for byte in entry["bytes"]).decode() == ONE_CALL


def test_answer_that_is_cut_off_inside_a_call_says_so(tool_http: httpx.Client) -> None:
    choice = chat(tool_http, ONE_CALL, tools=[WEATHER], max_tokens=60)

    assert choice["finish_reason"] == "length"
    assert ARGUMENTS.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_one_call_is_kept_without_parallel_calls(tool_http: httpx.Client) -> None:
    body = {"tools": [WEATHER, TIME], "parallel_tool_calls": False}

    assert len(chat(tool_http, TWO_CALLS, **body)["message"]["tool_calls"]) == 1
    assert len(rebuilt(chunks(tool_http, TWO_CALLS, **body))["tool_calls"]) == 1


def test_every_choice_is_read_by_itself(tool_http: httpx.Client) -> None:
    choices = answered(tool_http, ONE_CALL, tools=[WEATHER], n=2)["choices"]

    assert [len(choice["message"]["tool_calls"]) for choice in choices] == [1, 1]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
    assert len(ids) == 2


def prompt_of(http: httpx.Client, **body: Any) -> str:
    answer = answered(http, "x", return_token_ids=True, **body)
    return bytes(id_ for id_ in answer["prompt_token_ids"] if id_ < 256).decode()


def test_template_sees_the_tools_as_they_were_sent(tool_http: httpx.Client) -> None:
    prompt = prompt_of(tool_http, tools=[WEATHER])

    shown = json.loads(prompt.removeprefix("<tool_call>").partition("user:")[0])
    assert shown == [WEATHER]


def test_tools_stay_in_the_prompt_when_none_may_be_called(tool_http: httpx.Client) -> None:
    body = {"tools": [WEATHER], "tool_choice": "none"}

    assert "get_weather" in prompt_of(tool_http, **body)
    assert chat(tool_http, ONE_CALL, **body)["message"]["content"] == ONE_CALL


def test_history_with_calls_and_results_is_accepted(tool_http: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    history = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]

    choice = chat(tool_http, "", tools=[WEATHER], messages=[*history, *saying("Sunny.")])

    assert choice["message"]["content"] == "Sunny."


def test_empty_list_of_calls_is_none_for_the_template(tool_http: httpx.Client) -> None:
    def history(calls: list[Any]) -> list[Any]:
        return [{"role": "assistant", "content": "x", "tool_calls": calls}, *saying("y")]

    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    assert prompt_of(tool_http, messages=history([call])).startswith("CALLS")
    assert not prompt_of(tool_http, messages=history([])).startswith("CALLS")


def test_required_choice_makes_calls_without_the_models_format(tool_http: httpx.Client) -> None:
    text = f'[{{"name": "get_weather", "parameters": {ARGUMENTS}}}]'
    body = {"tools": [WEATHER, TIME], "tool_choice": "required"}

    choice = chat(tool_http, text, **body)
    message = rebuilt(chunks(tool_http, text, **body))

    assert choice["finish_reason"] == message["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert [call["arguments"] for call in message["tool_calls"]] == [ARGUMENTS]


def test_named_choice_makes_the_answer_its_arguments(tool_http: httpx.Client) -> None:
    body = {"tools": [WEATHER, TIME], "tool_choice": NAMED}

    choice = chat(tool_http, ARGUMENTS, **body)
    message = rebuilt(chunks(tool_http, ARGUMENTS, **body))

    assert choice["finish_reason"] == message["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert [(call["name"], call["arguments"]) for call in message["tool_calls"]] == [
        ("get_weather", ARGUMENTS)
    ]


def test_answer_with_a_schema_leaves_room_for_calls(tool_http: httpx.Client) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    body = {
        "tools": [WEATHER],
        "response_format": schema,
        "messages": [{"role": "user", "content": "!grammar"}],
    }

    free = chat(tool_http, "", **body)["message"]["content"]
    forced = chat(tool_http, "", **body, tool_choice="none")["message"]["content"]

    assert free.startswith("start: answer | calls")
    assert "get_weather" in free
    assert forced.startswith("{")


@pytest.mark.parametrize(
    ("body", "param", "fragments"),
    [
        ({"tools": []}, "tools", ["empty"]),
        ({"tools": [WEATHER] * 4}, "tools", ["3", "4", "--max-tools"]),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", ["get_weather"]),
        ({"tools": [{"type": "web_search", "function": {"name": "x"}}]}, "tools[0].type", ["web_search"]),
        ({"tools": [{"type": "function"}]}, "tools[0].function", ["required"]),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", ["a b"]),
        ({"tools": [{"function": {"name": "x", "parameters": []}}]}, "tools[0].function.parameters", []),
        (
            {"tools": [{"function": {"name": "x", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            ["object", "array"],
        ),
        (
            {"tools": [{"function": {"name": "x", "description": "d" * 2000}}]},
            "tools",
            ["2000", "--max-tools-bytes"],
        ),
        ({"tool_choice": "auto"}, "tool_choice", ["needs tools"]),
        ({"tool_choice": "required"}, "tool_choice", ["needs tools"]),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", ["required", "any"]),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice", ["get_weather"]),
        ({"tools": [TIME], "tool_choice": {"type": "x"}}, "tool_choice", ["function"]),
        ({"reasoning_effort": "huge"}, "reasoning_effort", ["huge", "high"]),
    ],
)
def test_wrong_tools_are_refused_by_name(
    tool_http: httpx.Client, body: dict[str, Any], param: str, fragments: list[str]
) -> None:
    error = refused(tool_http, **body)

    assert error["param"] == param
    for fragment in fragments:
        assert fragment in error["message"]


def test_openai_stream_helper_reads_the_calls(tool_server: RunningServer) -> None:
    with (
        openai.OpenAI(base_url=f"{tool_server.url}/v1", api_key="none") as client,
        client.chat.completions.stream(
            model="tiny",
            messages=[{"role": "user", "content": f"!say:{TWO_CALLS}!end"}],
            tools=[
                {"type": "function", "function": {"name": "get_weather", "parameters": dict(CITY)}},
                {"type": "function", "function": {"name": "get_time"}},
            ],
        ) as stream,
    ):
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()

    assert kinds.count("tool_calls.function.arguments.done") == 2
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", ARGUMENTS),
        ("get_time", "{}"),
    ]


def test_auto_choice_needs_a_known_format(fake_server: RunningServer) -> None:
    with fake_server.client() as http:
        error = refused(http, tools=[WEATHER])

    assert error["param"] == "tool_choice"
    assert "--tool-call-parser" in error["message"]
