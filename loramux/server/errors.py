"""From an error class to an HTTP answer: one table, one renderer, for every path and status.

Nothing else in the server decides a status. An error that is not in the table answers with the
entry of its nearest mapped base class; anything that is no `LoramuxError` is a 500 whose text stays
in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loramux.engine import errors as engine_errors
from loramux.engine.errors import InvalidRequest, LoramuxError


class AuthFailed(LoramuxError):
    """The request brought no key, or a wrong one."""


class RequestTooLarge(LoramuxError):
    """The body is larger than the server reads."""


class ClientGone(LoramuxError):
    """The client closed the connection; nobody reads the answer."""


class RuntimeUpdatesDisabled(LoramuxError):
    """The operator did not allow clients to change adapters."""


class AdapterNameRefused(InvalidRequest):
    """No adapter may have this name, or none was given."""


class AdapterExists(InvalidRequest):
    """The name is taken, and the caller did not ask for a replacement."""


class AdapterConflict(LoramuxError):
    """The name stands for other content, and the caller did not ask for a replacement."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """How one class of errors looks to a client."""

    status: int
    type: str
    code: str
    headers: Mapping[str, str] | None = None


_RETRY: Final = {"retry-after": "1"}
_NO_RETRY: Final = {"x-should-retry": "false"}  # for clients that retry a 409 by themselves

ERRORS: Final[dict[type[LoramuxError], HttpError]] = {
    engine_errors.InvalidRequest: HttpError(400, "invalid_request_error", "invalid_value"),
    engine_errors.ContextTooLong: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    engine_errors.ModelNotFound: HttpError(404, "NotFoundError", "model_not_found"),
    engine_errors.AdapterError: HttpError(400, "BadRequestError", "adapter_error"),
    engine_errors.AdapterNotFound: HttpError(404, "NotFoundError", "adapter_not_found"),
    engine_errors.AdapterIncompatible: HttpError(400, "BadRequestError", "adapter_incompatible"),
    engine_errors.AdapterUnavailable: HttpError(503, "server_error", "adapter_unavailable", _RETRY),
    engine_errors.AdapterSourceAuth: HttpError(424, "BadRequestError", "adapter_source_auth"),
    engine_errors.Overloaded: HttpError(503, "server_error", "overloaded", _RETRY),
    engine_errors.EngineDead: HttpError(503, "server_error", "engine_unavailable", _RETRY),
    RuntimeUpdatesDisabled: HttpError(404, "NotFoundError", "runtime_lora_updates_disabled"),
    AdapterNameRefused: HttpError(400, "InvalidUserInput", "invalid_adapter_name"),
    AdapterExists: HttpError(400, "InvalidUserInput", "adapter_already_loaded"),
    AdapterConflict: HttpError(409, "InvalidUserInput", "adapter_conflict", _NO_RETRY),
    AuthFailed: HttpError(401, "invalid_request_error", "invalid_api_key", {"www-authenticate": "Bearer"}),
    RequestTooLarge: HttpError(413, "invalid_request_error", "request_too_large"),
    ClientGone: HttpError(499, "invalid_request_error", "client_closed_request"),
    LoramuxError: HttpError(500, "server_error", "internal_error"),
}

_UNEXPECTED: Final = HttpError(500, "server_error", "internal_error")

# What a request can meet outside our own code (routing, the framework): status -> code.
_HTTP_CODES: Final = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


def lookup(error: LoramuxError) -> HttpError:
    """The entry of the nearest mapped class, most specific first."""
    return next(ERRORS[cls] for cls in type(error).__mro__ if cls in ERRORS)


def envelope(message: str, entry: HttpError, param: str | None = None) -> bytes:
    """The JSON text of an error, as bodies and stream events carry it."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": entry.type, "param": param, "code": entry.code}}
    )


def describe(error: Exception, request_id: str | None = None) -> tuple[HttpError, bytes]:
    """The table entry and the JSON text of any error; the text of an unexpected one is hidden."""
    if isinstance(error, LoramuxError):
        entry = lookup(error)
        return entry, envelope(error.message, entry, error.param)
    reference = f" (request {request_id})" if request_id else ""
    return _UNEXPECTED, envelope(f"The server had an internal error{reference}.", _UNEXPECTED)


def respond(error: Exception, request_id: str | None = None) -> Response:
    """The whole HTTP answer for an error."""
    entry, body = describe(error, request_id)
    headers = dict(entry.headers or {})
    return Response(body, entry.status, headers=headers, media_type="application/json")


async def handle_loramux_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for our own errors."""
    return respond(error, request.scope.get("loramux.request_id"))


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for what routing refuses: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, HTTPStatus(error.status_code).name.lower())
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    entry = HttpError(error.status_code, kind, code)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is no route {request.method} {request.scope['path']}."
    elif error.status_code == 405:
        message = f"{request.method} is not allowed on {request.scope['path']}."
    return Response(
        envelope(message, entry), entry.status, headers=error.headers, media_type="application/json"
    )


async def handle_validation_error(request: Request, error: Exception) -> Response:
    """The framework's refusal of a body or a query, in words that name field, value and rule."""
    assert isinstance(error, RequestValidationError)
    message, param = explain_validation(error.errors())
    return respond(engine_errors.InvalidRequest(message, param=param))


def explain_validation(problems: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One readable sentence for pydantic's list of problems, and the first field at fault.

    A value that fits no member of a union is reported once, with what each member wanted.
    """
    wanted: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for problem in problems[:64]:
        field = _field_name(problem["loc"])
        text = _rule(problem)
        if text not in wanted.setdefault(field, []):
            wanted[field].append(text)
        if problem["type"] != "missing":
            values.setdefault(field, _shorten(problem.get("input")))
    lines = [_sentence(field, rules, values.get(field)) for field, rules in list(wanted.items())[:10]]
    first = next(iter(wanted), "")
    return " ".join(lines), first or None


def _sentence(field: str, rules: list[str], value: str | None) -> str:
    where = f"'{field}'" if field else "The request body"
    got = f", got {value}" if value is not None else ""
    first, *others = rules[:6]
    rule = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    return f"{where} {rule}{got}."


def _rule(problem: Mapping[str, Any]) -> str:
    """Pydantic's words, as the end of a sentence about the field."""
    if problem["type"] == "missing":
        return "is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if message.startswith("Input should "):
        return f"must {message.removeprefix('Input should ')}"
    return f": {message}"


def _field_name(location: Sequence[int | str]) -> str:
    """`('body', 'messages', 0, 'role')` as `messages[0].role`.

    Pydantic adds the name of the union member that it tried; those parts are not fields.
    """
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in _UNION_MEMBERS:
            name += f".{part}" if name else part
        else:
            break
    return name


_UNION_MEMBERS: Final = frozenset({"str", "int", "float", "bool", "dict", "list", "constrained"})


def _shorten(value: object, limit: int = 100) -> str:
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
