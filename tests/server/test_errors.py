"""The error table: complete, and the same shape everywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramux.engine.errors import AdapterUnavailable, ContextTooLong, InvalidRequest, LoramuxError
from loramux.server.errors import ERRORS, describe, explain_validation, lookup


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
    assert error == {
        "message": "what happened",
        "type": entry.type,
        "param": "field",
        "code": entry.code,
    }


def test_a_subclass_is_looked_up_before_its_base() -> None:
    class Special(ContextTooLong):
        """Not in the table."""

    assert lookup(Special("x")) is ERRORS[ContextTooLong]
    assert lookup(InvalidRequest("x")) is ERRORS[InvalidRequest]


def test_what_may_be_retried_says_when() -> None:
    assert (lookup(AdapterUnavailable("x")).headers or {})["retry-after"]


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
