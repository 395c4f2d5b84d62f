"""Calls and results of earlier turns, as chat templates expect them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidRequest
from loramux.server.schemas.chat import ChatMessage

SHORT_ID_CHARS: Final = 9
_SHORT_ID: Final = re.compile(r"[A-Za-z0-9]{9}")


def read_arguments(call: dict[str, Any], field: str) -> None:
    """Turn the arguments of a call from JSON text into the object that it means, in place.

    Args:
        call: one entry of a message's `tool_calls`.
        field: where it stands, for errors.

    Raises:
        InvalidRequest: the call has no function with a name, or its arguments are no JSON object.
    """
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{field} must have a function with a name", param=field)
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError) as error:
            message = f"{field}.function.arguments must be a JSON text: {str(error)[:200]}"
            raise InvalidRequest(message, param=field) from error
    if not isinstance(arguments, dict):
        message = f"{field}.function.arguments must be the JSON text of an object"
        raise InvalidRequest(message, param=field)
    function["arguments"] = arguments


def with_short_ids(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages with ids of calls as Mistral's templates demand: 9 letters or digits.

    Equal ids stay equal, so a result still belongs to its call.
    """
    short: list[ChatMessage] = []
    for message in messages:
        changes: dict[str, Any] = {}
        if message.tool_call_id is not None:
            changes["tool_call_id"] = _short_id(message.tool_call_id)
        if message.tool_calls is not None:
            changes["tool_calls"] = [
                {**call, "id": _short_id(str(call.get("id", "")))} for call in message.tool_calls
            ]
        short.append(message.model_copy(update=changes) if changes else message)
    return short


def _short_id(id_: str) -> str:
    if _SHORT_ID.fullmatch(id_):
        return id_
    return hashlib.sha256(id_.encode("utf-8", "replace")).hexdigest()[:SHORT_ID_CHARS]
