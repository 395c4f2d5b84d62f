"""Render, invocations, the tokenizer's facts, load: over HTTP, with the stand-in engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_server import running_server
from tests.server.fake_serve import COMMAND
from tests.server.test_completions import complete
from tests.server.tiny_text import CHAT_TEMPLATE, END, START

HELLO = [{"role": "user", "content": "hi"}]
NEW_PATHS = (
    *("/v1/completions/render", "/v1/chat/completions/render", "/invocations", "/tokenizer_info"),
    *("/load", "/ping", "/tokenize", "/detokenize", "/v1/models"),
)


@pytest.fixture(scope="module")
def rooted_http(text_model: Path) -> Iterator[httpx.Client]:
    """A server behind a proxy, whose operator shows the tokenizer."""
    flags = ("--enable-tokenizer-info-endpoint", "--root-path=/llm")
    with running_server(str(text_model), *flags, command=COMMAND) as server, server.client() as client:
        yield client


def test_rendered_prompts_are_those_that_a_completion_would_use(http: httpx.Client) -> None:
    body = {
        "model": "shout",
        "prompt": [[97, 98], [99]],
        "temperature": 0.25,
        "stop": "x",
        "logit_bias": {"5": 1},
    }

    response = http.post("/v1/completions/render", json=body, headers={"x-request-id": "r1"})

    rendered = response.json()
    assert [entry["token_ids"] for entry in rendered] == [[97, 98], [99]]
    assert [entry["request_id"] for entry in rendered] == ["cmpl-r1-0", "cmpl-r1-1"]
    assert {entry["model"] for entry in rendered} == {"shout"}
    sampling = rendered[0]["sampling_params"]
    assert (sampling["temperature"], sampling["max_tokens"], sampling["stop"]) == (0.25, 16, ["x"])
    assert sampling["logit_bias"] == {"5": 1.0}


def test_rendered_chat_is_one_prompt_and_never_a_stream(http: httpx.Client) -> None:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "priority": 3}

    response = http.post("/v1/chat/completions/render", json=body)

    rendered = response.json()
    assert response.headers["content-type"] == "application/json"
    assert rendered["token_ids"] == [START, *b"user: hi", END, START]
    assert rendered["request_id"].startswith("chatcmpl-")
    assert rendered["stream"] is True
    assert rendered["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}
    assert rendered["priority"] == 3
    assert rendered["sampling_params"]["max_tokens"] == 512 - len(rendered["token_ids"])


def test_rendering_reaches_no_engine(http: httpx.Client) -> None:
    """The stand-in refuses such a prompt, and never ends the other."""
    for prompt in ("!refuse", "!stuck"):
        assert http.post("/v1/completions/render", json={"prompt": prompt}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions/render", {"prompt": "a", "model": "nope"}, 404, "model"),
        ("/v1/completions/render", {"prompt": "a", "n": 1000}, 400, "n"),
        ("/v1/completions/render", {"prompt": "x" * 600}, 400, "input_tokens"),
        ("/v1/completions/render", {"prompt": "a", "stop_token_ids": [10**6]}, 400, "stop_token_ids"),
        ("/v1/chat/completions/render", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions/render", {"messages": HELLO, "model": "nope"}, 404, "model"),
        ("/invocations", {"messages": HELLO, "model": "nope"}, 404, "model"),
        ("/invocations", {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
        ("/invocations", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ("/invocations", {"inputs": "a"}, 400, None),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, 400, "chat_template"),
        (
            "/tokenize",
            {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True},
            400,
            "continue_final_message",
        ),
    ],
)
def test_wrong_requests_are_refused_like_everywhere(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = http.post(path, json=body)

    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_invocations_answer_chats_and_completions(http: httpx.Client) -> None:
    completion = http.post("/invocations", json={"prompt": "abc"}).json()
    chat = http.post("/invocations", json={"messages": HELLO}).json()
    stream = http.post("/invocations", json={"messages": HELLO, "stream": True})

    assert completion["choices"][0]["text"] == "abc"
    assert chat["choices"][0]["message"]["content"] == "user: hi"
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.text.endswith("data: [DONE]\n\n")


def test_header_of_an_invocation_names_the_adapter(http: httpx.Client) -> None:
    header = {"x-amzn-sagemaker-adapter-identifier": "org/loud one:v1"}

    answer = http.post("/invocations", json={"prompt": "abc", "model": "tiny"}, headers=header).json()

    assert answer["choices"][0]["text"] == "ABC"
    assert answer["model"] == "org/loud one:v1"


def test_tokenizer_is_shown_only_if_the_operator_says_so(
    http: httpx.Client, rooted_http: httpx.Client
) -> None:
    closed = http.get("/tokenizer_info")
    shown = rooted_http.get("/tokenizer_info").json()

    assert closed.status_code == 404
    assert closed.json()["error"]["code"] == "route_disabled"
    assert "--enable-tokenizer-info-endpoint" in closed.json()["error"]["message"]
    assert (shown["bos_token"], shown["eos_token"]) == ("<|bos|>", "<|eos|>")
    assert shown["chat_template"] == CHAT_TEMPLATE
    assert "/" not in str(shown.get("name_or_path", ""))


def test_tokenizing_a_chat_takes_what_a_chat_takes(http: httpx.Client) -> None:
    body = {
        **{"messages": HELLO, "add_generation_prompt": False, "return_token_strs": True},
        **{"tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"x": 1}},
    }

    answer = http.post("/tokenize", json=body).json()

    assert answer["tokens"] == [START, *b"user: hi", END]
    assert answer["token_strs"][0] == "<|start|>"


def test_load_begins_with_what_routers_read(http: httpx.Client) -> None:
    response = http.get("/load")

    assert next(iter(response.json().items())) == ("server_load", 0)


def test_new_routes_are_reachable_below_the_root_path_and_described(rooted_http: httpx.Client) -> None:
    described = rooted_http.get("/llm/openapi.json").json()["paths"]

    assert set(NEW_PATHS) <= set(described)
    for path in NEW_PATHS:
        for root in ("", "/llm"):
            method = "GET" if "get" in described[path] else "POST"
            assert rooted_http.request(method, root + path, json={}).status_code in (200, 400), path


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/ping", "/load", "/version", "/openapi.json"]
)
def test_head_is_answered_like_get_without_a_body(http: httpx.Client, path: str) -> None:
    get, head = http.get(path), http.head(path)

    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers.get("content-type") == get.headers.get("content-type")


def test_base_and_adapter_answers_carry_their_fingerprints(http: httpx.Client) -> None:
    base, adapter = complete(http, prompt="a"), complete(http, prompt="a", model="shout")

    assert base["system_fingerprint"] != adapter["system_fingerprint"]
    assert base.get("service_tier") is None
