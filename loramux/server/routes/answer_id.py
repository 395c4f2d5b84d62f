"""Ids of answers."""

from __future__ import annotations

from fastapi import Request


def answer_id(prefix: str, request: Request, wanted: str | None) -> str:
    """`chatcmpl-...` and the like: the client's own id if it gave one, else the request's.

    The header `x-request-id` wins over a `request_id` in the body, as with vLLM.
    """
    request_id: str = request.scope["loramux.request_id"]
    if wanted and "x-request-id" not in request.headers and wanted.isprintable() and len(wanted) <= 128:
        request_id = wanted
    return f"{prefix}-{request_id}"
