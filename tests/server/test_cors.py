"""Preflights, where the operator lists what pages may send."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from loramux.server.access.cors import CorsLayer


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that is never asked."""


def preflight(wanted: str, *, allowed: list[str], method: str = "POST") -> tuple[int, set[str]]:
    """The status, and the headers that a page may send."""
    layer = CorsLayer(nothing, allow_origins=["http://page"], allow_methods=["POST"], allow_headers=allowed)
    headers = {"origin": "http://page", "access-control-request-method": method}
    if wanted:
        headers["access-control-request-headers"] = wanted
    response = layer.preflight_response(Headers(headers))
    names = response.headers.get("access-control-allow-headers", "").lower()
    return response.status_code, {name.strip() for name in names.split(",")}


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ("authorization", 200),
        ("authorization, X-Stainless-OS,x-stainless-retry-count", 200),
        ("x-stainless-os", 200),
        ("x-evil, x-stainless-os", 400),
        ("x-evil", 400),
        ("", 200),
    ],
)
def test_headers_of_the_official_client_are_allowed_beside_the_listed_ones(wanted: str, status: int) -> None:
    given, allowed = preflight(wanted, allowed=["Authorization"])

    assert given == status
    if status == 200:
        assert {name.strip().lower() for name in wanted.split(",") if name} <= allowed


def test_any_header_is_allowed_where_all_are() -> None:
    assert preflight("x-any, x-stainless-os", allowed=["*"]) == (200, {"x-any", "x-stainless-os"})


def test_method_that_is_not_listed_is_refused() -> None:
    assert preflight("authorization", allowed=["authorization"], method="DELETE")[0] == 400
