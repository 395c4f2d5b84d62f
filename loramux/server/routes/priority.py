"""How urgent a request is."""

from __future__ import annotations

import re
from typing import Final

from fastapi import Request

from loramux.engine.errors import InvalidRequest
from loramux.server.schemas.common import GenerationRequest

_HEADER: Final = "x-vllm-priority"
_NUMBER: Final = re.compile(r"-?\d{1,9}")


def priority_of(request: Request, body: GenerationRequest) -> int:
    """The request's `priority`; a header `X-Vllm-Priority` wins over the body.

    Raises:
        InvalidRequest: the header is not a whole number of at most 9 digits.
    """
    text = request.headers.get(_HEADER)
    if text is None:
        return body.priority
    if _NUMBER.fullmatch(text.strip()) is None:
        message = f"X-Vllm-Priority must be a whole number of at most 9 digits, got {text[:50]!r}"
        raise InvalidRequest(message, param=_HEADER)
    return int(text)
