"""What meets a request first: error shapes, paths and hosts that lie, CORS; over raw sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND

PAGE = "http://page.example"
KEY = {"authorization": "Bearer right"}


@pytest.fixture(scope="module")
def guarded(text_model: Path) -> Iterator[RunningServer]:
    """One key, one page that may ask, one name, and a path prefix."""
    with running_server(
        *(str(text_model), "--served-model-name=tiny", "--api-key=right", "--host=127.0.0.1"),
        *(f'--allowed-origins=["{PAGE}"]', "--root-path=/llm/"),
        *("--allowed-hosts", "127.0.0.1", "llm.example", "*.inside.example"),
        command=COMMAND,
    ) as server:
        yield server


@pytest.fixture
def http(guarded: RunningServer) -> Iterator[httpx.Client]:
    with guarded.client() as client:
        yield client


def raw(server: RunningServer, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        response = HTTPResponse(connection)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()


def get(server: RunningServer, target: str, *headers: str, method: str = "GET") -> tuple[int, bytes]:
    lines = [f"{method} {target} HTTP/1.1", *headers, "connection: close", "", ""]
    status, _, body = raw(server, "\r\n".join(lines).encode("latin-1"))
    return status, body


def error_in(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    return error


TARGETS = [
    "/v1/models",
    "//v1/models",
    "///v1/models",
    "/./v1/models",
    "/v1/../v1/models",
    "/health/../v1/models",
    "/v1/../health",
    "/health/v1/models",
    "/health%2f..%2fv1/models",
    "/health/%2e%2e/v1/models",
    "/%2e%2e/v1/models",
    "/v1%2fmodels",
    "/v1%2Fmodels/",
    "/v1/models/",
    "/v1/models%00/health",
    "/v1/models%0a/health",
    "/v1/models;/health",
    "/v1/models?/health",
    "/v1/models#/health",
    "/V1/MODELS",
    "/HEALTH",
    "/llm/v1/models",
    "/llm//v1/models",
    "/llm/llm/v1/models",
    "/llmv1/models",
    "/llm/health/../v1/models",
    "http://127.0.0.1/v1/models",
    "http://127.0.0.1/llm/v1/models",
    "http://health/v1/models",
    "http://127.0.0.1/health@x/v1/models",
    "http://user@127.0.0.1/v1/models",
    "https://127.0.0.1:1/v1/models",
    "http:/v1/models",
    "v1/models",
    "*",
    "\\v1\\models",
    "/v1/models\\..\\..\\health",
]
LIARS = [
    ("host: 127.0.0.1",),
    ("host: 127.0.0.1/health?",),
    ("host: 127.0.0.1/health#",),
    ("host: llm.example/health",),
    ("host: llm.example:80/health?x=",),
    ("host: ",),
    ("host: 127.0.0.1", "x-original-url: /health", "x-rewrite-url: /health"),
    ("host: 127.0.0.1", "x-forwarded-prefix: /v1/models", "x-forwarded-host: x/health?"),
]


@pytest.mark.parametrize("target", TARGETS)
def test_no_way_to_write_a_path_or_a_host_gets_past_the_key(guarded: RunningServer, target: str) -> None:
    for headers in LIARS:
        status, body = get(guarded, target, *headers)

        assert status in (400, 401), (headers, status, body)
        assert error_in(body)["code"] in ("invalid_api_key", "malformed_http", "host_not_allowed")


def test_routes_answer_with_and_without_the_prefix(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers=KEY).json() == http.get("/llm/v1/models", headers=KEY).json()
    assert http.get("/llm/openapi.json", headers=KEY).json()["servers"] == [{"url": "/llm"}]
    assert http.get("/llm/llm/v1/models", headers=KEY).status_code == 404
    assert http.get("/llmv1/models", headers=KEY).status_code == 404


def test_public_routes_answer_under_both_paths_only(guarded: RunningServer) -> None:
    for target in ("/health", "/llm/health", "http://127.0.0.1/health", "/health?x=1"):
        assert get(guarded, target, "host: 127.0.0.1")[0] == 200, target


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("LLM.example", True),
        ("a.b.inside.example:1", True),
        ("inside.example", False),
        ("evilinside.example", False),
        ("evil.example", False),
        ("llm.example.evil", False),
        ("[::1]:80", False),
        ("", False),
    ],
)
def test_hosts_outside_the_list_are_refused(guarded: RunningServer, host: str, is_known: bool) -> None:
    status, body = get(guarded, "/v1/models", f"host: {host}", "authorization: Bearer right")

    assert status == (200 if is_known else 400), body
    if not is_known:
        assert error_in(body)["code"] == "host_not_allowed"
    assert get(guarded, "/health", f"host: {host}")[0] == 200


def test_two_hosts_are_none(guarded: RunningServer) -> None:
    hosts = ("host: 127.0.0.1", "host: evil.example")

    assert get(guarded, "/v1/models", *hosts, "authorization: Bearer right")[0] == 400


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: a\x00b\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http_gets_an_error_of_the_same_shape(guarded: RunningServer, request_: bytes) -> None:
    status, headers, body = raw(guarded, request_)

    assert status in (400, 401)
    assert headers["content-type"] == "application/json"
    assert error_in(body)["code"] in ("malformed_http", "invalid_api_key")
    with guarded.client() as http:
        assert http.get("/live").status_code == 200


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_asking_for_another_protocol_gets_nobody_past_the_key(guarded: RunningServer, protocol: str) -> None:
    upgrade = (
        *("host: 127.0.0.1", f"upgrade: {protocol}", "sec-websocket-version: 13"),
        *("sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==", "connection: upgrade"),
    )
    lines = "\r\n".join(("GET /v1/models HTTP/1.1", *upgrade, "", ""))

    assert raw(guarded, lines.encode())[0] == 401


def test_unknown_path_is_repeated_briefly_and_escaped(http: httpx.Client) -> None:
    response = http.get(f"/a%0a%1b%22%E2%80%AE{'x' * 3000}", headers=KEY)

    assert response.status_code == 404
    message = error_in(response.content)["message"]
    assert len(message) < 200
    assert message.isprintable()
    assert message.isascii()


PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-os, x-stainless-retry-count",
}


def test_preflight_needs_no_key(http: httpx.Client) -> None:
    response = http.options("/v1/chat/completions", headers=PREFLIGHT)

    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]


@pytest.mark.parametrize("missing", ["origin", "access-control-request-method"])
def test_options_that_is_no_preflight_needs_a_key(http: httpx.Client, missing: str) -> None:
    headers = {name: value for name, value in PREFLIGHT.items() if name != missing}

    without = http.options("/v1/chat/completions", headers=headers)
    with_key = http.options("/v1/chat/completions", headers={**headers, **KEY})

    assert without.status_code == 401
    assert with_key.status_code == 405
    assert with_key.headers["allow"] == "POST"


def test_preflight_of_another_page_is_refused_in_the_shape_of_errors(http: httpx.Client) -> None:
    response = http.options("/v1/models", headers={**PREFLIGHT, "origin": "http://evil.example"})

    assert response.status_code == 400
    assert error_in(response.content)["code"] == "cors_not_allowed"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/nothing", None, 404),
        ("PATCH", "/v1/models", None, 405),
        ("POST", "/v1/completions", {"prompt": 5.5}, 400),
        ("POST", "/v1/completions", {"prompt": "!weird"}, 500),
        ("POST", "/v1/completions", {"prompt": "a", "stream": True}, 200),
    ],
)
def test_pages_may_read_every_answer(
    http: httpx.Client, method: str, path: str, body: Any, status: int
) -> None:
    response = http.request(method, path, json=body, headers={**KEY, "origin": PAGE})

    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == PAGE
    exposed = response.headers["access-control-expose-headers"]
    assert {"x-request-id", "retry-after", "x-loramux-adapter"} <= set(exposed.split(", "))
    assert response.headers["x-request-id"]


def test_pages_may_read_a_401_and_others_may_not(http: httpx.Client) -> None:
    own = http.get("/v1/models", headers={"origin": PAGE})
    other = http.get("/v1/models", headers={"origin": "http://evil.example"})

    assert own.status_code == other.status_code == 401
    assert own.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-origin" not in other.headers


def test_no_page_is_allowed_unless_the_operator_says_so(fake_server: RunningServer) -> None:
    with fake_server.client() as http:
        simple = http.get("/v1/models", headers={"origin": PAGE})
        preflight = http.options("/v1/models", headers=PREFLIGHT)

    assert simple.status_code == 200
    assert "access-control-allow-origin" not in simple.headers
    assert preflight.status_code == 405


@pytest.mark.parametrize("is_stream", [False, True])
def test_unexpected_error_shows_nothing_of_the_request_or_the_server(
    guarded: RunningServer, is_stream: bool
) -> None:
    body = {"prompt": "!weird sesame", "stream": is_stream}
    with guarded.client() as http:
        response = http.post(
            "/v1/completions", json=body, headers={**KEY, "x-request-id": f"weird-{is_stream}"}
        )

    text = response.text
    assert response.status_code == 500
    error = error_in(response.content)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert f"weird-{is_stream}" in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert not any(word in text for word in ("sesame", "Traceback", "Error:", ".py", "loramux/", "token"))
    guarded.wait_line("Traceback")  # the operator sees it
    assert "sesame" not in guarded.stderr


def test_unexpected_error_in_a_stream_is_one_event_that_shows_nothing(guarded: RunningServer) -> None:
    body = {"prompt": "!weird!weird!weird sesame", "stream": True}
    with guarded.client() as http:
        response = http.post("/v1/completions", json=body, headers={**KEY, "x-request-id": "weird-late"})

    *_, last = [line for line in response.text.split("\n") if line]
    assert response.status_code == 200
    assert last.startswith('data: {"error":')
    error = error_in(last.removeprefix("data: ").encode())
    assert error["code"] == "internal_error"
    assert "weird-late" in error["message"]
    assert not any(word in last for word in ("sesame", "Traceback", "Error:", ".py"))
    assert '"finish_reason":"' not in response.text
    assert "sesame" not in guarded.stderr
