"""What `/openapi.json` promises, beyond what schemathesis tries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from loramux.server.openapi import operations
from loramux.server.openapi_answers import ANSWERS
from tests.running_server import running_server
from tests.server.fake_serve import COMMAND

KEY = "sk-openapi"


@pytest.fixture(scope="module")
def document(text_model: Path) -> Iterator[dict[str, Any]]:
    """The description of a server with every optional route, behind a key."""
    flags = (f"--api-key={KEY}", "--max-n=7", "--enable-lora", "--enable-tokenizer-info-endpoint")
    with (
        running_server(str(text_model), "--host=127.0.0.1", *flags, command=COMMAND) as server,
        server.client() as http,
    ):
        yield http.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()


def test_the_description_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_operation_says_what_it_answers(document: dict[str, Any]) -> None:
    described = {f"{method} {path}" for method, path, _ in operations(document)}

    assert described == ANSWERS.keys()


def test_every_error_has_the_one_shape(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and int(status) not in ANSWERS[f"{method} {path}"]:
                (content,) = answer["content"].values()
                assert content["schema"] == {"$ref": "#/components/schemas/Error"}, (path, status)


def test_guarded_operations_ask_for_the_key(document: dict[str, Any]) -> None:
    guarded = {path for _, path, operation in operations(document) if operation.get("security")}

    assert {"/v1/models", "/v1/completions", "/v1/lora_adapters/{name}"} <= guarded
    assert not guarded & {"/health", "/live", "/ready", "/version"}
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_limits_of_this_server_are_told(document: dict[str, Any]) -> None:
    number, nothing = document["components"]["schemas"]["ChatRequest"]["properties"]["n"]["anyOf"]

    assert (number["minimum"], number["maximum"]) == (1, 7)
    assert nothing == {"type": "null"}


def test_fields_that_are_only_refused_are_not_offered(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]

    assert "prompt" in fields
    assert not {"suffix", "use_beam_search", "best_of", "prompt_embeds"} & fields.keys()
