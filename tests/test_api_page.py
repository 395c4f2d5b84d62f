"""docs/api.md speaks of every field and flag that the routes read."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux.server.flag_table import FLAGS
from loramux.server.schemas.chat import ChatRequest
from loramux.server.schemas.completions import CompletionRequest
from loramux.server.schemas.responses import ResponsesRequest

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *ResponsesRequest.model_fields}),
)
def test_every_field_is_described(name: str) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("name", sorted(flag.name for flag in FLAGS["answers"]))
def test_every_flag_about_answers_is_described(name: str) -> None:
    assert f"`--{name}`" in PAGE
