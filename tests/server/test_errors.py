"""The error table: complete, and the same shape everywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramux.engine.errors import ContextTooLong, InvalidRequest, LoramuxError
from loramux.server.errors import ERRORS, describe, explain_validation, lookup, respond


def all_errors(cls: type[LoramuxError] = LoramuxError) -> list[type[LoramuxError]]:
    return [cls, *(deeper for sub in cls.__subclasses__() for deeper in all_errors(sub))]


@pytest.mark.parametrize("cls", all_errors())
def test_every_error_has_a_status_and_a_code(cls: type[LoramuxError]) -> None:
    entry, body = describe(cls("what happened", param="field"))

    error = json.loads(body)["error"]
    assert 400 <= entry.status < 600
    if entry.status == 500:
        assert (error["code"], error["param"]) == ("internal_error", None)
        assert "what happened" not in error["message"]
        return
    # Clients that show only the text know a full context by the code in it.
    suffix = " (context_length_exceeded)" if issubclass(cls, ContextTooLong) else ""
    if entry.status == 503:  # and AIBrix knows by these words what to try again
        suffix = " (service unavailable)"
    assert error == {
        "message": f"what happened{suffix}",
        "type": entry.type,
        "param": "field",
        "code": entry.code,
    }


def test_a_subclass_is_looked_up_before_its_base() -> None:
    class Special(ContextTooLong):
        """Not in the table."""

    assert lookup(Special("x")) is ERRORS[ContextTooLong]
    assert lookup(InvalidRequest("x")) is ERRORS[InvalidRequest]


@pytest.mark.parametrize("cls", all_errors())
def test_what_may_be_retried_says_when_and_what_may_not_says_so(cls: type[LoramuxError]) -> None:
    """The official clients send 408, 409, 429 and 5xx again unless they are told not to."""
    response = respond(cls("what happened"))

    if response.status_code in (429, 503):
        assert 1 <= int(response.headers["retry-after"]) <= 120
        assert "x-should-retry" not in response.headers
    elif response.status_code in (409, 500):
        assert response.headers["x-should-retry"] == "false"
        assert "retry-after" not in response.headers
    assert response.status_code != 502


def test_text_of_an_unexpected_error_is_hidden() -> None:
    entry, body = describe(RuntimeError("password is 123"), "req-1")

    assert entry.status == 500
    assert b"123" not in body
    assert b"req-1" in body


def test_validation_problems_name_field_value_and_rule() -> None:
    problems: list[dict[str, Any]] = [
        {"type": "missing", "loc": ("body", "messages", 3, "role"), "msg": "Field required", "input": {}},
        {
            "type": "string_type",
            "loc": ("body", "stop", "str"),
            "msg": "Input should be a valid string",
            "input": 5,
        },
        {
            "type": "list_type",
            "loc": ("body", "stop", "list[str]"),
            "msg": "Input should be a valid list",
            "input": 5,
        },
    ]

    message, param = explain_validation(problems)

    assert param == "messages[3].role"
    assert message == (
        "'messages[3].role' is required. 'stop' must be a valid string or a valid list, got 5."
    )
