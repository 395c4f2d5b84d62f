"""`/openapi.json`: what the framework knows of the routes, made true.

Three things are added in one place, so that no route has to repeat them: the shapes of answers
(`openapi_answers.py`), the errors that an operation can give, and what a request really may hold
(`openapi_fields.py`). Links tell how an adapter's life goes from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from types import UnionType
from typing import Any, Final

import msgspec
from fastapi import FastAPI

from loramux.server.access.scopes import RouteRule, RouteTable
from loramux.server.openapi_answers import ANSWERS, EVENTS, JSON, Answer, Error
from loramux.server.openapi_fields import describe_uploads, state_fields
from loramux.server.services import Services

Document = dict[str, Any]
_METHODS: Final = ("get", "put", "post", "delete", "patch", "head", "options")
_REF: Final = "#/components/schemas/{name}"

_ALWAYS: Final = (500, 503)
_GUARDED: Final = (401, 403, 429)
_WITH_BODY: Final = (400, 408, 413, 415)
_CHANGES: Final = (400, 404, 409, 424)  # of adapters
_MEANING: Final = {
    400: "The request is wrong; the message names field, value and limit",
    404: "There is no such model or adapter, or the operator has closed this route",
    409: "The name stands for something else",
    424: "The adapter's source refused the server's credentials",
    429: "Too much from this key",
    503: "Overloaded, loading, draining or down",
}
_HEADERS: Final[Mapping[int, Mapping[str, str]]] = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "seconds to wait"},
    503: {"Retry-After": "seconds to wait"},
}


def install_openapi(app: FastAPI, services: Services, routes: RouteTable) -> None:
    """Make `app.openapi()` describe what this server takes and answers; needs all routes to be there."""
    plain: Callable[[], Document] = app.openapi
    documents: list[Document] = []

    def openapi() -> Document:
        if not documents:
            documents.append(_complete(plain(), services, routes))
        return documents[0]

    setattr(app, "openapi", openapi)  # noqa: B010 - the framework's own way to replace it


def operations(document: Document) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method in _METHODS:
                yield method.upper(), path, operation


def _complete(document: Document, services: Services, routes: RouteTable) -> Document:
    schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    state_fields(document, services)
    describe_uploads(document)
    shapes = [
        shape for answers in ANSWERS.values() for answer in answers.values() for shape in _shapes(answer)
    ]
    _, components = msgspec.json.schema_components([*shapes, Error], ref_template=_REF)
    schemas.update(components)
    rules = {(method, _shown(rule)): rule for rule in routes.rules for method in rule.methods}
    has_keys = services.access.config.has_keys
    for method, path, operation in operations(document):
        rule = rules[method, path]
        errors = _errors(method, path, operation, rule, has_keys=has_keys)
        answers = ANSWERS.get(f"{method} {path}", {200: Answer("Done", {JSON: dict[str, Any]})})
        operation["responses"] = {
            **{str(status): _answer(answer) for status, answer in answers.items()},
            **{str(status): _error(status) for status in errors if status not in answers},
        }
        if has_keys and not rule.is_public:
            operation["security"] = [{"bearer": []}]
            operation["x-scopes"] = sorted(rule.scopes)
    if has_keys:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    _add_links(document)
    return document


def _shown(rule: RouteRule) -> str:
    return rule.path.replace(":path}", "}")


def _shapes(answer: Answer) -> list[Any]:
    shapes = [shape for shape in (*answer.shapes.values(), answer.events) if shape is not None]
    return [member for shape in shapes for member in _members(shape)]


def _members(shape: Any) -> tuple[Any, ...]:
    """The structs of a union, which the encoder cannot tell apart, or the shape alone."""
    return shape.__args__ if isinstance(shape, UnionType) else (shape,)


def _errors(
    method: str, path: str, operation: Mapping[str, Any], rule: RouteRule, *, has_keys: bool
) -> list[int]:
    """The statuses beside success that an operation can answer with."""
    statuses = set(_ALWAYS) if path not in ("/live", "/version") else {500}
    if rule.is_public:
        return sorted(statuses)
    statuses |= set(_GUARDED) if has_keys else {429}
    if "requestBody" in operation:
        statuses |= {*_WITH_BODY, 404}
    if operation.get("parameters"):
        statuses |= {400, 404}
    if "adapters:write" in rule.scopes:
        statuses |= set(_CHANGES)
    if method == "POST" and "inference" in rule.scopes:
        statuses.add(424)  # an adapter that is loaded because the request names it
    return sorted(statuses)


def _answer(answer: Answer) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for kind, shape in answer.shapes.items():
        if kind == EVENTS:
            schema = _event_schema(answer.events)
        else:
            schema = _schema(shape) if shape is not None else {"type": "string"}
        content[kind] = {"schema": schema}
    return {"description": answer.description, **({"content": content} if content else {})}


def _event_schema(shape: Any) -> dict[str, Any]:
    """One event of a stream; the schema language has no words for JSON that ends with `[DONE]`."""
    schema: dict[str, Any] = {
        "type": "object",
        "description": "Of each event. `data` is the JSON of `x-event`, or of an error; at the end `[DONE]`.",
        "properties": {"event": {"type": "string"}, "id": {"type": "string"}, "data": {"type": "string"}},
    }
    return schema | ({"x-event": _schema(shape)} if shape is not None else {})


def _schema(shape: Any) -> dict[str, Any]:
    schemas, _ = msgspec.json.schema_components(_members(shape), ref_template=_REF)
    return {"anyOf": list(schemas)} if len(schemas) > 1 else schemas[0]


def _error(status: int) -> dict[str, Any]:
    headers = {
        name: {"description": text, "schema": {"type": "string"}}
        for name, text in _HEADERS.get(status, {}).items()
    }
    return {
        "description": _MEANING.get(status, HTTPStatus(status).phrase),
        **({"headers": headers} if headers else {}),
        "content": {JSON: {"schema": {"$ref": _REF.format(name="Error")}}},
    }


def _add_links(document: Document) -> None:
    """From a load to what can be done with the adapter: look at it, use it, unload it."""
    ids = {f"{method} {path}": operation["operationId"] for method, path, operation in operations(document)}
    put = "PUT /v1/lora_adapters/{name}"
    sources = {put: ("200", "201"), "POST /v1/load_lora_adapter": ("200",), "POST /v1/loras": ("200",)}
    for source, statuses in sources.items():
        method, path = source.split()
        # Not the request's path, which is percent-encoded.
        name = "$response.body#/adapter/name" if source == put else "$request.body#/lora_name"
        for status in statuses:
            responses = document["paths"][path][method.lower()]["responses"]
            responses[status]["links"] = {
                "look": _link(ids["GET /v1/lora_adapters/{name}"], name=name),
                "find": _link(ids["GET /v1/models/{model_id}"], model_id=name),
                "complete": _link(ids["POST /v1/completions"], body={"model": name, "prompt": "Hello"}),
                "chat": _link(
                    ids["POST /v1/chat/completions"],
                    body={"model": name, "messages": [{"role": "user", "content": "Hello"}]},
                ),
                "unload": _link(ids["POST /v1/unload_lora_adapter"], body={"lora_name": name}),
                "delete": _link(ids["DELETE /v1/lora_adapters/{name}"], name=name),
            }


def _link(operation_id: str, *, body: Mapping[str, Any] | None = None, **parameters: str) -> dict[str, Any]:
    return {
        "operationId": operation_id,
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": body} if body else {}),
    }
