"""What each operation answers when it succeeds: one table, for the description of the API.

The routes encode their answers themselves (a pydantic model a token would be slow), so the framework
cannot know their shapes. `tests/server/test_openapi.py` finds an operation that is missing here, and
real answers are compared with the description by schemathesis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from loramux.server.schemas.adapters import (
    AdapterList,
    AdapterView,
    DeleteResult,
    DryRun,
    DynamoList,
    DynamoResult,
    PutResult,
)
from loramux.server.schemas.chat import ChatChunk, ChatCompletion
from loramux.server.schemas.completions import Completion
from loramux.server.schemas.models import ModelCard, ModelList
from loramux.server.schemas.render import RenderedRequest
from loramux.server.schemas.responses import ResponseEvent, ResponseObject
from loramux.server.schemas.tokenize import Detokenized, Tokenized

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
TEXT: Final = "text/plain"


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None  # the field, header or path parameter at fault
    code: str


class Error(msgspec.Struct, frozen=True):
    """The body of every answer that is no success, and the last event of a stream that failed."""

    error: ErrorDetail


class Version(msgspec.Struct, frozen=True):
    """The server's version."""

    version: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether requests are welcome, and why not."""

    ready: bool
    reasons: list[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one status.

    Attributes:
        description: what it means.
        shapes: content type -> what is in it; None = text. Empty = no body.
        events: what each `data:` line of a stream holds.
    """

    description: str
    shapes: Mapping[str, Any] = field(default_factory=dict)
    events: Any = None


def _json(shape: Any, description: str = "Done") -> Answer:
    return Answer(description, {JSON: shape})


def _generated(whole: Any, chunk: Any) -> Answer:
    description = "The answer; with `stream: true` as events, ended by `data: [DONE]`"
    return Answer(description, {JSON: whole, EVENTS: None}, events=chunk)


_TEXT: Final = Answer("Done", {TEXT: None})
_ALIVE: Final = {200: Answer("The engine answers"), 503: Answer("It does not")}
_ANY_OBJECT: Final = dict[str, Any]

ANSWERS: Final[Mapping[str, Mapping[int, Answer]]] = {
    "POST /v1/completions": {200: _generated(Completion, Completion)},
    "POST /v1/chat/completions": {200: _generated(ChatCompletion, ChatChunk)},
    "POST /v1/responses": {200: _generated(ResponseObject, ResponseEvent)},
    "GET /v1/models": {200: _json(ModelList)},
    "GET /v1/models/{model_id}": {200: _json(ModelCard)},
    "POST /v1/completions/render": {200: _json(list[RenderedRequest])},
    "POST /v1/chat/completions/render": {200: _json(RenderedRequest)},
    "POST /invocations": {200: _generated(ChatCompletion | Completion, ChatChunk | Completion)},
    "GET /tokenizer_info": {
        200: _json(_ANY_OBJECT, "tokenizer_config.json and the chat template"),
        404: _json(Error, "Not switched on (--enable-tokenizer-info-endpoint)"),
    },
    "POST /tokenize": {200: _json(Tokenized)},
    "POST /detokenize": {200: _json(Detokenized)},
    "GET /live": {200: Answer("The process answers")},
    "GET /health": _ALIVE,
    "GET /ping": _ALIVE,
    "POST /ping": _ALIVE,
    "GET /ready": {200: _json(Readiness, "Ready"), 503: _json(Readiness, "Not ready, and why")},
    "GET /version": {200: _json(Version)},
    "GET /load": {200: _json(_ANY_OBJECT, "Calls in flight, and the engine's counts")},
    "GET /metrics": {200: Answer("Prometheus' text format", {TEXT: None})},
    "GET /v1/lora_adapters": {200: _json(AdapterList)},
    "GET /v1/lora_adapters/events": {200: Answer("Every change from now on, without end", {EVENTS: None})},
    "GET /v1/lora_adapters/{name}": {200: _json(AdapterView)},
    "PUT /v1/lora_adapters/{name}": {
        200: _json(PutResult | DryRun, "Nothing changed, a new version, or what a load would meet"),
        201: _json(PutResult, "The name is new"),
    },
    "DELETE /v1/lora_adapters/{name}": {
        200: _json(DeleteResult, "Gone"),
        202: _json(DeleteResult, "The name is gone, requests still run on the adapter"),
    },
    "POST /v1/load_lora_adapter": {200: _TEXT},
    "POST /v1/unload_lora_adapter": {200: _TEXT},
    "GET /v1/loras": {200: _json(DynamoList)},
    "POST /v1/loras": {200: _json(DynamoResult)},
    "DELETE /v1/loras/{name}": {200: _json(DynamoResult)},
    "POST /adapters": {200: _TEXT},
    "DELETE /adapters/{name}": {200: _TEXT},
}
