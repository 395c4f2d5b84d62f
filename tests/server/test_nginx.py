"""nginx in front, with the example configuration: streams flow, clients that leave end their requests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND
from tests.server.nginx import NginxUnavailable, nginx_program, running_nginx

ENDLESS = {"model": "tiny", "prompt": "!slow", "max_tokens": 150, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(text_model: Path, adapter_folder: Path) -> Iterator[RunningServer]:
    """The server behind nginx."""
    with running_server(
        *(str(text_model), "--served-model-name=tiny", "--host=127.0.0.1", "--enable-lora"),
        *("--lora-modules", f"org/loud one:v1={adapter_folder}"),
        *("--sse-keep-alive-interval=0.2", "--allow-runtime-lora-updating"),
        command=COMMAND,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def proxied(server: RunningServer) -> Iterator[Callable[[], httpx.Client]]:
    """Makes clients that reach the server through nginx."""
    try:
        program = nginx_program()
    except NginxUnavailable as error:
        pytest.skip(str(error))
    with (
        tempfile.TemporaryDirectory(prefix="nginx-") as folder,  # short: a socket's path has 107 bytes
        running_nginx(program, Path(folder), upstream=server.url.removeprefix("http://")) as listening,
    ):

        def client() -> httpx.Client:
            transport = httpx.HTTPTransport(uds=str(listening), retries=20)  # it may still be starting
            return httpx.Client(transport=transport, base_url="http://nginx", timeout=30.0)

        yield client


def until_running(http: httpx.Client, count: int) -> None:
    """Ask the server itself until it runs as many requests."""
    running = -1
    for _ in range(5000):
        running = http.get("/load").json()["num_running"]
        if running == count:
            return
    pytest.fail(f"it never ran {count}, but {running} at the end")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_events_arrive_while_the_answer_is_still_written(
    server: RunningServer, proxied: Callable[[], httpx.Client], path: str
) -> None:
    body = {**ENDLESS, "stream": True, "messages": [{"role": "user", "content": "!slow"}]}
    with (
        server.client() as direct,
        proxied() as http,
        http.stream("POST", path, json=body) as response,
    ):
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))

        # The last event is 150 tokens of 10 ms away.
        assert direct.get("/load").json()["num_running"] == 1
        assert first.startswith('data: {"id":')
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_nginx_ends_its_request_in_the_engine(
    server: RunningServer, proxied: Callable[[], httpx.Client], is_stream: bool
) -> None:
    body = {**ENDLESS, "max_tokens": 500, "n": 2, "stream": is_stream}
    with server.client() as direct:
        with proxied() as http:
            if is_stream:
                with http.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.iter_lines()  # kept: a dropped iterator closes the connection
                    assert next(lines).startswith("data: {")
                    until_running(direct, 2)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/completions", json=body, timeout=0.3)
        until_running(direct, 0)


def test_comments_keep_a_silent_stream_open(proxied: Callable[[], httpx.Client]) -> None:
    body = {"model": "tiny", "prompt": "!stuck", "stream": True}
    with proxied() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(":")


def test_encoded_names_arrive_as_they_were_sent(proxied: Callable[[], httpx.Client]) -> None:
    with proxied() as http:
        card = http.get("/v1/models/org%2Floud%20one:v1").json()

    assert card["id"] == "org/loud one:v1"


def test_errors_and_request_ids_come_through(proxied: Callable[[], httpx.Client]) -> None:
    with proxied() as http:
        response = http.post("/v1/completions", json={"model": "nobody", "prompt": "a"})

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.headers["x-request-id"]
