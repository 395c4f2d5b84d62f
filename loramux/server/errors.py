"""From an error class to an HTTP answer: one table, one renderer, for every path and status.

Nothing else in the server decides a status. An error that is not in the table answers with the
entry of its nearest mapped base class; anything that is no `LoramuxError` is a 500 whose text stays
in the log.
"""

from __future__ import annotations

import logging
import math
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
from loramux.engine.errors import InvalidRequest, LoramuxError, ModelNotFound
from loramux.server.adapter_names import AdapterNameRefused
from loramux.server.observe.call_record import note_error

logger = logging.getLogger(__name__)


class AuthFailed(LoramuxError):
    """The request brought no key, or a wrong one."""


class NotAllowed(LoramuxError):
    """The request's key does not allow this."""


class AdapterHidden(ModelNotFound):
    """The request's key may not use this adapter; the answer is that to a name that nobody knows.

    Args:
        message: that answer.
        param: the field that named the adapter.
        name: the adapter's, for the audit log.
    """

    def __init__(self, message: str, *, param: str | None = None, name: str = "") -> None:
        super().__init__(message, param=param)
        self.name = name


class HostRefused(LoramuxError):
    """The request is for a host that the server does not go by."""


class CorsRefused(LoramuxError):
    """A web page may not do this."""


class UnsupportedMediaType(LoramuxError):
    """The body is not of a kind that the route reads."""


class RequestTooLarge(LoramuxError):
    """The body is larger than the server reads."""


class RequestTooSlow(LoramuxError):
    """The client took too long to send its headers or its body."""


class HeadersTooLarge(LoramuxError):
    """The headers are larger, or more, than the server reads."""


class MalformedHttp(LoramuxError):
    """What came over the connection is no HTTP request."""


class RateLimited(engine_errors.Overloaded):
    """This caller, or the adapter it asks for, has as much queued and running as it may have."""


class AdapterLoading(engine_errors.AdapterUnavailable):
    """The adapter was still on its way when the request had waited long enough."""


class ClientGone(LoramuxError):
    """The client closed the connection; nobody reads the answer."""


class ServerDraining(LoramuxError):
    """The server is about to end; another one, or the next one, can serve the request."""


class RuntimeUpdatesDisabled(LoramuxError):
    """The operator did not allow clients to change adapters."""


class RouteDisabled(LoramuxError):
    """The operator did not switch this route on."""


class UnsupportedContent(InvalidRequest):
    """A message brings an image, audio or a file; the model reads text."""


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


TWOFOLD: Final = "loramux.twofold_errors"  # in the scope of a request that wants such, see `respond`

_RETRY: Final = {"retry-after": "1"}
_RETRY_LOADING: Final = {"retry-after": "5"}
_CLOSE: Final = {"connection": "close"}
# For clients that retry a 409 or a 500 by themselves: the same request would end the same way.
_NO_RETRY: Final = {"x-should-retry": "false"}

ERRORS: Final[dict[type[LoramuxError], HttpError]] = {
    engine_errors.InvalidRequest: HttpError(400, "invalid_request_error", "invalid_value"),
    engine_errors.ContextTooLong: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    RouteDisabled: HttpError(404, "NotFoundError", "route_disabled"),
    UnsupportedContent: HttpError(400, "invalid_request_error", "unsupported_content_type"),
    engine_errors.ModelNotFound: HttpError(404, "NotFoundError", "model_not_found"),
    engine_errors.AdapterError: HttpError(400, "BadRequestError", "adapter_error"),
    engine_errors.AdapterNotFound: HttpError(404, "NotFoundError", "adapter_not_found"),
    engine_errors.AdapterIncompatible: HttpError(400, "BadRequestError", "adapter_incompatible"),
    engine_errors.AdapterUnavailable: HttpError(503, "server_error", "adapter_unavailable", _RETRY),
    AdapterLoading: HttpError(503, "server_error", "adapter_loading", _RETRY_LOADING),
    engine_errors.AdapterSourceAuth: HttpError(424, "BadRequestError", "adapter_source_auth"),
    engine_errors.Overloaded: HttpError(503, "server_error", "overloaded", _RETRY),
    RateLimited: HttpError(429, "rate_limit_error", "rate_limit_exceeded", _RETRY),
    engine_errors.EngineDead: HttpError(503, "server_error", "engine_unavailable", _RETRY),
    ServerDraining: HttpError(503, "server_error", "draining", {**_RETRY, **_CLOSE}),
    RuntimeUpdatesDisabled: HttpError(404, "NotFoundError", "runtime_lora_updates_disabled"),
    AdapterNameRefused: HttpError(400, "InvalidUserInput", "invalid_adapter_name"),
    AdapterExists: HttpError(400, "InvalidUserInput", "adapter_already_loaded"),
    AdapterConflict: HttpError(409, "InvalidUserInput", "adapter_conflict", _NO_RETRY),
    UnsupportedMediaType: HttpError(415, "invalid_request_error", "unsupported_media_type"),
    AuthFailed: HttpError(401, "invalid_request_error", "invalid_api_key", {"www-authenticate": "Bearer"}),
    NotAllowed: HttpError(403, "invalid_request_error", "insufficient_permissions"),
    HostRefused: HttpError(400, "invalid_request_error", "host_not_allowed"),
    CorsRefused: HttpError(400, "invalid_request_error", "cors_not_allowed"),
    RequestTooLarge: HttpError(413, "invalid_request_error", "request_too_large"),
    RequestTooSlow: HttpError(408, "invalid_request_error", "request_timeout", _CLOSE),
    HeadersTooLarge: HttpError(431, "invalid_request_error", "request_header_fields_too_large", _CLOSE),
    MalformedHttp: HttpError(400, "invalid_request_error", "malformed_http", _CLOSE),
    ClientGone: HttpError(499, "invalid_request_error", "client_closed_request"),
    LoramuxError: HttpError(500, "server_error", "internal_error", _NO_RETRY),
}

_UNEXPECTED: Final = ERRORS[LoramuxError]

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


def code_of(error: Exception) -> str:
    """What a client is told as `code`."""
    return (lookup(error) if isinstance(error, LoramuxError) else _UNEXPECTED).code


def envelope(message: str, entry: HttpError, param: str | None = None) -> bytes:
    """The JSON text of an error, as bodies and stream events carry it; the request counts as failed."""
    note_error(entry.code)
    return msgspec.json.encode(
        {"error": {"message": message, "type": entry.type, "param": param, "code": entry.code}}
    )


def describe(error: Exception, request_id: str | None = None) -> tuple[HttpError, bytes]:
    """The table entry and the JSON text of any error; the text of one that answers 500 is hidden."""
    entry = lookup(error) if isinstance(error, LoramuxError) else _UNEXPECTED
    if isinstance(error, LoramuxError) and entry.status != 500:
        # Clients that see only the text (langchain over openai 3) know a full context by the code in it.
        suffix = f" ({entry.code})" if isinstance(error, engine_errors.ContextTooLong) else ""
        if entry.status == 503:  # AIBrix tries a load again if it finds these words
            suffix = " (service unavailable)"
        return entry, envelope(error.message + suffix, entry, error.param)
    reference = f" (request {request_id})" if request_id else ""
    return _UNEXPECTED, envelope(f"The server had an internal error{reference}.", _UNEXPECTED)


def respond(error: Exception, request_id: str | None = None, *, is_twofold: bool = False) -> Response:
    """The whole HTTP answer for an error.

    Args:
        is_twofold: its fields stand at the top level, too, where older vLLM had them and the
            production-stack operator looks for them.
    """
    entry, body = describe(error, request_id)
    if is_twofold:
        fields = msgspec.json.decode(body)
        body = msgspec.json.encode({**fields, **fields["error"]})
    headers = {**(entry.headers or {}), **_when_to_retry(error)}
    return Response(body, entry.status, headers=headers, media_type="application/json")


def _when_to_retry(error: Exception) -> dict[str, str]:
    """Whole seconds for everybody, and milliseconds for the OpenAI clients, which prefer them."""
    if not isinstance(error, engine_errors.Overloaded):
        return {}
    wait_s = error.retry_after_s
    return {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}


async def handle_loramux_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for our own errors."""
    request_id = request.scope.get("loramux.request_id")
    if isinstance(error, LoramuxError) and lookup(error).status == 500:  # the client is not told why
        logger.error("internal error", exc_info=error, extra={"request_id": request_id})
    return respond(error, request_id, is_twofold=TWOFOLD in request.scope)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for what routing refuses: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, HTTPStatus(error.status_code).name.lower())
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    entry = HttpError(error.status_code, kind, code)
    message, headers = str(error.detail), dict(error.headers or {})
    path = _shown_path(request.scope["path"])
    if error.status_code == 404:
        message = f"There is no route {request.method} {path}."
    elif error.status_code == 405:
        message = f"{request.method} is not allowed on {path}."
        headers = {"allow": ", ".join(request.app.state.route_table.methods(request.scope))}
    elif error.status_code >= 500:
        message = "The server had an internal error."
    return Response(envelope(message, entry), entry.status, headers=headers, media_type="application/json")


def _shown_path(path: str, limit: int = 100) -> str:
    """A path as a message may repeat it: plain ASCII, and not longer than anybody reads."""
    text = path.encode("unicode_escape").decode()
    return text if len(text) <= limit else f"{text[:limit]}..."


async def handle_validation_error(request: Request, error: Exception) -> Response:
    """The framework's refusal of a body or a query, in words that name field, value and rule."""
    assert isinstance(error, RequestValidationError)
    message, param = explain_validation(error.errors())
    return respond(engine_errors.InvalidRequest(message, param=param), is_twofold=TWOFOLD in request.scope)


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
    _, _, demand = message.partition(" should ")  # "Input should be ...", "List should have ..."
    return f"must {demand}" if demand else message


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
