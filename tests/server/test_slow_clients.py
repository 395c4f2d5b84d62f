"""Clients that are slow, silent, many or malformed, over raw sockets."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapter_files import llama_sites, write_adapter
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND

_PATIENCE_S = 20.0  # of these tests; the server's own limits are much shorter


@pytest.fixture(scope="module")
def strict_server(text_model: Path) -> Iterator[RunningServer]:
    """A server that waits for nobody."""
    with running_server(
        *(str(text_model), "--served-model-name=tiny", "--request-header-timeout=0.4"),
        *("--request-read-timeout=0.4", "--stream-write-timeout=0.5", "--max-connections=8"),
        *("--max-header-bytes=4096", "--max-header-count=20", "--timeout-keep-alive=1"),
        *("--max-buffered-bytes=3M", "--max-request-bytes=2M"),
        command=COMMAND,
    ) as server:
        yield server


def connect(server: RunningServer, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(_PATIENCE_S)
    connection.connect((host, int(port)))
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    data = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece


def assert_error(answer: bytes, status: int, code: str) -> None:
    """An answer in the one shape of errors."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    assert b"x-request-id: " in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; each question is a round trip."""
    for _ in range(5000):
        if condition():
            return
    pytest.fail("it never came true")


def running(http: httpx.Client) -> int:
    """Sequences in the engine."""
    count: int = http.get("/load").json()["num_running"]
    return count


def assert_serving(server: RunningServer) -> None:
    with server.client() as http:
        assert http.post("/v1/completions", json={"prompt": "ok"}).json()["choices"][0]["text"] == "ok"


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_connection_that_says_nothing_is_closed(strict_server: RunningServer) -> None:
    with connect(strict_server) as connection:
        assert read_all(connection) == b""


def test_headers_that_never_end_are_a_408(strict_server: RunningServer) -> None:
    with connect(strict_server) as connection:
        connection.sendall(HEAD + b"x-slow: 1\r\n")

        assert_error(read_all(connection), 408, "request_timeout")
    assert_serving(strict_server)


def test_headers_that_trickle_are_a_408_too(strict_server: RunningServer) -> None:
    answer = b""
    with connect(strict_server) as connection:
        connection.settimeout(0.05)
        for byte in HEAD * 20:
            connection.sendall(bytes([byte]))
            try:
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue

    assert_error(answer, 408, "request_timeout")


def test_second_request_of_a_connection_has_the_same_time(strict_server: RunningServer) -> None:
    with connect(strict_server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health HT")

        assert_error(read_all(connection), 408, "request_timeout")


def test_body_that_never_ends_is_a_408(strict_server: RunningServer) -> None:
    with connect(strict_server) as connection:
        connection.sendall(HEAD + b'content-length: 1000\r\n\r\n{"prompt": ')

        assert_error(read_all(connection), 408, "request_timeout")
    assert_serving(strict_server)


def test_slow_body_that_keeps_its_pace_is_read(strict_server: RunningServer) -> None:
    body = json.dumps({"prompt": "a", "x": "y" * 100_000}).encode()
    with connect(strict_server) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body))
        connection.sendall(body[:60_000])
        connection.settimeout(0.9)  # twice what the timeout alone allows
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(_PATIENCE_S)
        connection.sendall(body[60_000:])

        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "headers",
    [b"x: " + b"y" * 5000 + b"\r\n", b"x: y\r\n" * 30, b"x: " + b"y" * 300_000],
    ids=["long", "many", "endless"],
)
def test_large_headers_are_a_431(strict_server: RunningServer, headers: bytes) -> None:
    with connect(strict_server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + headers)

        assert_error(connection.recv(65536), 431, "request_header_fields_too_large")
    assert_serving(strict_server)


def test_long_request_line_is_a_431(strict_server: RunningServer) -> None:
    with connect(strict_server) as connection:
        connection.sendall(b"GET /" + b"a" * 5000)

        assert_error(connection.recv(65536), 431, "request_header_fields_too_large")


@pytest.mark.parametrize("data", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n"])
def test_bytes_that_are_no_http_get_an_error_in_the_same_shape(
    strict_server: RunningServer, data: bytes
) -> None:
    with connect(strict_server) as connection:
        connection.sendall(data)

        assert_error(read_all(connection), 400, "malformed_http")


def test_connections_over_the_limit_get_a_503_and_probes_an_answer(strict_server: RunningServer) -> None:
    with ExitStack() as stack:
        busy = HEAD + b"content-length: 60000\r\n\r\n" + b" " * 40_000  # may take three seconds
        for _ in range(9):
            stack.enter_context(connect(strict_server)).sendall(busy)
        with connect(strict_server) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            assert_error(read_all(connection), 503, "overloaded")
        with connect(strict_server) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert_serving(strict_server)


def test_bodies_together_are_bounded(strict_server: RunningServer) -> None:
    head = HEAD + b"content-length: 2000000\r\n\r\n"
    with connect(strict_server) as first, connect(strict_server) as second:
        first.sendall(head + b" " * 1_900_000)
        second.sendall(head + b" " * 1_500_000)

        answered, _, _ = select.select([first, second], [], [], _PATIENCE_S)

        assert [connection.recv(65536)[:13] for connection in answered] == [b"HTTP/1.1 503 "]
    assert_serving(strict_server)


def large_stream() -> dict[str, Any]:
    """Some megabytes of events within a second or two."""
    return {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 8, "logprobs": 20, "stream": True}


def test_client_that_stops_reading_is_cut_and_frees_the_engine(strict_server: RunningServer) -> None:
    with strict_server.client() as http, connect(strict_server, receive_buffer=4096) as connection:
        body = json.dumps({**large_stream(), "prompt": "a" * 8}).encode()
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)

        until(lambda: http.get("/load").json()["server_load"] == 1)
        until(lambda: http.get("/load").json()["server_load"] == 0)

        assert running(http) == 0
        assert not read_all(connection).endswith(b"0\r\n\r\n")


def test_client_that_reads_slowly_gets_everything(strict_server: RunningServer) -> None:
    with connect(strict_server, receive_buffer=4096) as connection:
        body = json.dumps({**large_stream(), "n": 1, "max_tokens": 300}).encode()
        connection.sendall(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        received = 0
        tail = b""
        while piece := connection.recv(2048):
            received += len(piece)
            tail = (tail + piece)[-100:]

    assert received > 100_000
    assert b"data: [DONE]" in tail


@pytest.fixture(scope="module")
def loading(
    text_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, str]]:
    """A server, and the name of an adapter that it goes on loading for ever."""
    folder = tmp_path_factory.mktemp("cold")
    path = write_adapter(folder / "cold", llama_sites(), base_model_name_or_path="!stuck")
    body = {"lora_name": "cold", "lora_path": str(path)}
    with running_server(
        *(str(text_model), "--served-model-name=tiny", "--enable-lora", f"--allowed-local-path={folder}"),
        *("--adapter-load-timeout=0.9", "--sse-keep-alive-interval=0.2"),
        command=COMMAND,
        environ={"LORAMUX_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        with server.client() as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/load_lora_adapter", json=body, timeout=0.3)
        yield server, "cold"


def test_caller_without_a_stream_is_told_that_the_adapter_is_loading(
    loading: tuple[RunningServer, str],
) -> None:
    server, name = loading
    with server.client() as http:
        response = http.post("/v1/completions", json={"model": name, "prompt": "a"})

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "adapter_loading"
    assert int(response.headers["retry-after"]) >= 1


def test_stream_that_waits_for_an_adapter_begins_with_comments(loading: tuple[RunningServer, str]) -> None:
    server, name = loading
    messages = [{"role": "user", "content": "hi"}]
    with server.client() as http:
        body = {"model": name, "messages": messages, "stream": True}
        response = http.post("/v1/chat/completions", json=body)

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "x-request-id" in response.headers
    parts = response.text.strip().split("\n\n")
    assert len(parts) > 2
    assert set(parts[:-1]) == {": keep-alive"}
    assert '"code":"adapter_loading"' in parts[-1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 10**6}),
        ("/v1/completions", {"prompt": "a" * 600}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 10**9}),
        ("/invocations", {"prompt": "a", "stop_token_ids": [10**9]}),
    ],
)
def test_bad_request_is_refused_before_its_adapter_is_there(
    loading: tuple[RunningServer, str], path: str, body: dict[str, Any]
) -> None:
    server, name = loading
    with server.client() as http:
        response = http.post(path, json={"model": name, "stream": True, **body})

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_client_that_leaves_while_its_adapter_loads_is_forgotten(loading: tuple[RunningServer, str]) -> None:
    server, name = loading
    with server.client() as http:
        body = {"model": name, "prompt": "a", "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines()) == ": keep-alive"

        response = http.post("/v1/completions", json={"prompt": "ok"})
        assert response.status_code == 200, response.text


def test_garbage_behind_a_request_ends_it_without_harm(strict_server: RunningServer) -> None:
    body = json.dumps({"prompt": "!slow", "max_tokens": 400, "ignore_eos": True}).encode()
    with strict_server.client() as http, connect(strict_server) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        until(lambda: running(http) == 1)
        connection.sendall(b"garbage\r\n\r\n")

        assert_error(read_all(connection), 400, "malformed_http")
        until(lambda: running(http) == 0)

    assert "Traceback" not in strict_server.stderr
