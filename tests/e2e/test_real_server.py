"""A real server with real weights: curl, bad input, cancelling, the engine's death, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable

import httpx
import pytest

from tests.bad_requests import BAD_REQUESTS, BadRequest
from tests.e2e.conftest import demo_arguments
from tests.running_server import ROOT, RunningServer, running_server

pytestmark = pytest.mark.demo

LONG = {"model": "json", "prompt": "Count: 1, 2, 3,", "max_tokens": 900, "ignore_eos": True}


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again."""
    for _ in range(5000):
        if condition():
            return
    pytest.fail("it never came true")


def curl(*arguments: str) -> str:
    """What curl prints."""
    return subprocess.run(["curl", "-sS", *arguments], check=True, capture_output=True, text=True).stdout


def test_curl_gets_an_answer_and_a_stream(server: RunningServer) -> None:
    url = f"{server.url}/v1/chat/completions"
    json_type = ("-H", "content-type: application/json")
    body = {
        "model": "sql",
        "messages": [{"role": "user", "content": "Table t(a). Show a."}],
        "temperature": 0,
        "max_tokens": 24,
    }

    answer = json.loads(curl(url, *json_type, "-d", json.dumps(body)))
    stream = curl("-N", "-i", url, *json_type, "-d", json.dumps({**body, "stream": True}))

    head, _, events = stream.partition("\n\n") if "\r\n\r\n" not in stream else stream.partition("\r\n\r\n")
    assert "content-type: text/event-stream; charset=utf-8" in head
    chunks = [json.loads(line[6:]) for line in events.split("\n") if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"]
    assert text.startswith("SELECT")
    assert events.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in BAD_REQUESTS])
def test_bad_input_gets_one_clear_error_and_the_server_goes_on(http: httpx.Client, bad: BadRequest) -> None:
    response = http.post("/v1/completions", json=bad.body)

    assert response.status_code == bad.status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (bad.param, bad.code)
    for fragment in bad.fragments:
        assert fragment in error["message"]
    good = http.post("/v1/completions", json={"model": "sql", "prompt": "a", "max_tokens": 1})
    assert good.status_code == 200


@pytest.mark.parametrize("is_stream", [True, False])
def test_closed_connection_frees_every_sequence_and_block(server: RunningServer, is_stream: bool) -> None:
    body = {**LONG, "n": 3, "stream": is_stream}
    with server.client() as watcher:
        before = watcher.get("/load").json()

        with server.open_post("/v1/completions", body):
            until(lambda: watcher.get("/load").json()["num_running"] == 3)

        until(lambda: watcher.get("/load").json()["num_running"] == 0)
        after = watcher.get("/load").json()
    assert after["num_waiting"] == 0
    assert after["server_load"] == 0
    assert after["kv_blocks_used"] == before["kv_blocks_used"]


def test_start_says_what_was_loaded(server: RunningServer) -> None:
    assert "loading model" in server.stderr
    assert "adapter pirate: rank 16, " in server.stderr
    assert "ready on http://127.0.0.1:" in server.stderr


def test_engine_death_ends_what_runs_and_ctrl_c_ends_a_server_that_restarts_it() -> None:
    with running_server(*demo_arguments()) as server, server.client() as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engine_pid(), signal.SIGKILL)
            rest = [line for line in lines if line]

        assert '"code":"engine_unavailable"' in rest[-1]
        assert "[DONE]" not in "".join(rest)
        assert http.get("/live").status_code == 200
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.stderr


def test_ctrl_c_under_load_ends_cleanly() -> None:
    with running_server(*demo_arguments()) as server, server.client() as http:
        engine = server.engine_pid()
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]

        assert '"error"' in rest[-1]
        assert server.wait_ended() == 0
        assert "Traceback" not in server.stderr
        assert not (ROOT / f"/proc/{engine}").exists()


@pytest.mark.parametrize(
    ("modules", "fragments"),
    [
        (["gone=/nowhere/adapter"], ["adapter 'gone'", "/nowhere/adapter"]),
        ([f"code={ROOT / 'examples' / 'adapters' / 'data'}"], ["adapter 'code'", "adapter_config.json"]),
    ],
)
def test_bad_adapter_stops_the_start_with_one_line(modules: list[str], fragments: list[str]) -> None:
    arguments = [*demo_arguments()[:4], "--enable-lora", "--kv-cache-bytes=50M", "--lora-modules", *modules]
    server = RunningServer(arguments)

    code = server.wait_ended()

    assert code == 1
    assert "Traceback" not in server.stderr
    for fragment in fragments:
        assert fragment in server.lines[-1]
