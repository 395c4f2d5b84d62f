"""Chats over plain HTTP with a stand-in engine that says what it is told to."""

from __future__ import annotations

import json
from typing import Any

import httpx


def saying(text: str) -> list[dict[str, str]]:
    """Messages that the stand-in answers with this text."""
    return [{"role": "user", "content": f"!say:{text}!end"}]


def chat(http: httpx.Client, text: str, **body: Any) -> dict[str, Any]:
    """The only choice of a successful answer."""
    answer = answered(http, text, **body)
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def answered(http: httpx.Client, text: str, **body: Any) -> dict[str, Any]:
    """A whole successful answer."""
    response = http.post("/v1/chat/completions", json={"messages": saying(text), **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chunks(http: httpx.Client, text: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends well."""
    response = http.post("/v1/chat/completions", json={"messages": saying(text), "stream": True, **body})
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def refused(http: httpx.Client, **body: Any) -> dict[str, Any]:
    """The error of a call that is answered with 400."""
    response = http.post("/v1/chat/completions", json={"messages": saying("x"), **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def rebuilt(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a strict client puts together from a stream of one choice.

    It adds texts up, takes a call's id, type and name as given once, and fails on anything else.
    """
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for piece in pieces:
        for choice in piece["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning", "")
            for call in delta.get("tool_calls", []):
                _add_call(message["tool_calls"], call)
            message["finish_reason"] = choice["finish_reason"]
    return message


def _add_call(calls: list[dict[str, Any]], call: dict[str, Any]) -> None:
    assert isinstance(call["function"]["arguments"], str)
    if call["index"] == len(calls):
        assert set(call) == {"index", "id", "type", "function"}
        assert call["type"] == "function"
        assert call["function"]["arguments"] == ""
        calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
    else:
        assert set(call) == {"index", "function"}
        assert call["index"] == len(calls) - 1
        assert set(call["function"]) == {"arguments"}
        calls[-1]["arguments"] += call["function"]["arguments"]
