"""`/v1/chat/completions` over HTTP, with the stand-in engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

HELLO = [{"role": "user", "content": "hi"}]
ECHO = "user: hi"  # what the stand-in repeats of it


def chat(http: httpx.Client, **body: Any) -> dict[str, Any]:
    """A successful chat completion."""
    response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends with [DONE]."""
    response = http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, **body})
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_answer_has_every_field_that_clients_read(http: httpx.Client) -> None:
    answer = chat(http)

    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ECHO, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["completion_tokens"] == len(ECHO) + 1


def test_without_max_tokens_the_answer_may_fill_the_context(http: httpx.Client) -> None:
    answer = chat(http, ignore_eos=True)

    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


def test_max_completion_tokens_wins_over_max_tokens(http: httpx.Client) -> None:
    assert chat(http, max_tokens=9, max_completion_tokens=4)["choices"][0]["message"]["content"] == "user"


def test_text_parts_are_joined_and_developer_means_system(http: httpx.Client) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]

    content = chat(http, messages=messages)["choices"][0]["message"]["content"]

    assert content == "system: be briefuser: a\nb"


def test_final_message_can_be_continued(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Sure, "}]

    answer = chat(
        http,
        messages=messages,
        continue_final_message=True,
        add_generation_prompt=False,
        return_token_ids=True,
    )

    assert bytes(id_ for id_ in answer["prompt_token_ids"] if id_ < 256).decode().endswith("assistant: Sure,")
    assert answer["prompt_token_ids"][-1] < 256


def test_logprobs_carry_bytes_and_alternatives(http: httpx.Client) -> None:
    logprobs = chat(http, logprobs=True, top_logprobs=2, max_tokens=1)["choices"][0]["logprobs"]

    assert logprobs["content"] == [
        {
            "token": "u",
            "logprob": -0.5,
            "bytes": [117],
            "top_logprobs": [
                {"token": "u", "logprob": -0.5, "bytes": [117]},
                {"token": "v", "logprob": -1.5, "bytes": [118]},
            ],
        }
    ]


def test_logprobs_without_a_number_have_no_alternatives(http: httpx.Client) -> None:
    logprobs = chat(http, logprobs=True, max_tokens=2)["choices"][0]["logprobs"]

    assert [entry["top_logprobs"] for entry in logprobs["content"]] == [[], []]


def test_stream_begins_with_the_role_and_the_first_text(http: httpx.Client) -> None:
    chunks = stream(http)

    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "u"}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ECHO
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_stream_introduces_every_choice(http: httpx.Client) -> None:
    chunks = stream(http, n=3)

    roles = [chunk["choices"][0]["index"] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    ends = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(roles) == sorted(ends) == [0, 1, 2]


def test_stream_carries_logprobs_token_by_token(http: httpx.Client) -> None:
    chunks = stream(http, logprobs=True, max_tokens=3)

    tokens = [entry["token"] for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert tokens == list("use")


def test_tools_are_ignored_when_their_choice_is_none(http: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f"}}

    assert chat(http, tools=[tool], tool_choice="none")["choices"][0]["finish_reason"] == "stop"


def test_adapter_answers_a_chat(http: httpx.Client) -> None:
    assert chat(http, model="shout")["choices"][0]["message"]["content"] == ECHO.upper()


@pytest.mark.parametrize(
    ("body", "param", "fragments"),
    [
        ({"messages": []}, "messages", ["empty"]),
        ({"messages": "hi"}, "messages", ["list", "'hi'"]),
        ({"messages": None}, "messages", ["required"]),
        ({"messages": [{"content": "x"}]}, "messages[0].role", ["required"]),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ["string", "5"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            ["text", "image_url"],
        ),
        ({"top_logprobs": 2}, "top_logprobs", ["logprobs"]),
        (
            {"logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            ["20", "21", "top_logprobs", "--max-logprobs"],
        ),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", ["-1"]),
        ({"logprobs": 1}, "logprobs", ["boolean", "1"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
        ({"chat_template": "{{ 1 }}"}, "chat_template", ["--chat-template"]),
        ({"tools": [{"type": "function"}]}, "tools[0].function", ["required"]),
        ({"response_format": {"type": "xml"}}, "response_format", ["json_object", "xml"]),
        ({"max_tokens": 0}, "max_tokens", ["at least 1", "0"]),
        ({"max_completion_tokens": 0}, "max_completion_tokens", ["max_completion_tokens must", "0"]),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens", ["reduce max_completion_tokens"]),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role", ["must have at least 1"]),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", ["both"]),
    ],
)
def test_wrong_fields_are_refused_by_name(
    http: httpx.Client, body: dict[str, Any], param: str, fragments: list[str]
) -> None:
    response = http.post("/v1/chat/completions", json={"messages": HELLO, **body})

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    for fragment in fragments:
        assert fragment in error["message"]
