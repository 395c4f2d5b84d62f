"""The request log: one line a request, in both formats, that nobody can forge and that shows no prompt."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from loramux.engine.log_format import JsonFormatter, TextFormatter
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND

SECRET = "swordfish"
_PAUSE_S = 0.02


@pytest.fixture(scope="module")
def server(text_model: Path, adapter_folder: Path) -> Iterator[RunningServer]:
    """One that logs JSON."""
    with running_server(
        *(str(text_model), "--served-model-name", "tiny", "--enable-lora", "--log-format=json"),
        *("--lora-modules", f"shout={adapter_folder}", "--api-key=k1"),
        "--disable-access-log-for-endpoints=/v1/loras,/v1/lora_adapters",
        command=COMMAND,
    ) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer k1"}) as client:
        yield client


def wait_for(server: RunningServer, wanted: Callable[[str], bool]) -> str:
    """The first line of stderr that is wanted."""
    for _ in range(int(10 / _PAUSE_S)):
        for line in list(server.lines):
            if wanted(line):
                return line
        Event().wait(_PAUSE_S)
    raise AssertionError(server.stderr)


def entry_of(server: RunningServer, response: httpx.Response) -> dict[str, Any]:
    """The line about the request that a response answers."""
    request_id = response.headers["x-request-id"]
    line = wait_for(server, lambda line: request_id in line and "loramux.request" in line)
    entry: dict[str, Any] = json.loads(line)
    return entry


def test_the_line_says_who_asked_what_of_which_adapter_and_how_it_went(
    server: RunningServer, http: httpx.Client
) -> None:
    body = {"model": "shout", "prompt": "hello there, this is long", "max_tokens": 5, "n": 2}
    response = http.post("/v1/completions", json=body)

    entry = entry_of(server, response)
    measured = {name: entry.pop(name) for name in ("time", "total_ms", "ttft_ms", "key_id")}
    assert entry == {
        "level": "info",
        "logger": "loramux.request",
        "message": "POST /v1/completions 200",
        "request_id": response.headers["x-request-id"],
        "status": 200,
        "route": "/v1/completions",
        "model": "shout",
        "adapter": "shout@1",
        "prompt_tokens": 25,
        "cached_tokens": 16,
        "output_tokens": 10,
        "n": 2,
        "finish_reason": "length",
    }
    assert 0 < measured["ttft_ms"] <= measured["total_ms"] < 10_000
    assert measured["key_id"] not in (None, "", "k1")


def test_errors_are_logged_with_their_code(server: RunningServer, http: httpx.Client) -> None:
    unknown = entry_of(server, http.post("/v1/completions", json={"model": "who", "prompt": "x"}))
    refused = entry_of(server, http.post("/v1/completions", json={"model": "tiny", "prompt": "!refuse"}))
    no_key = entry_of(server, http.get("/v1/models", headers={"authorization": "Bearer wrong"}))
    late = http.post("/v1/completions", json={"model": "tiny", "prompt": "!refuse", "stream": True})

    assert (unknown["status"], unknown["error"], unknown["model"]) == (404, "model_not_found", "who")
    assert (refused["status"], refused["error"], refused["finish_reason"]) == (400, "invalid_value", "error")
    assert (no_key["status"], no_key["error"]) == (401, "invalid_api_key")
    assert no_key["route"] == "/v1/models"
    assert entry_of(server, late)["error"] == "invalid_value"


def test_a_client_that_leaves_is_logged_with_what_it_got(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": "!slow", "max_tokens": 400, "stream": True}
    with (
        httpx.Client(base_url=server.url, headers={"authorization": "Bearer k1"}) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        request_id = response.headers["x-request-id"]
        next(response.iter_bytes())

    line = wait_for(server, lambda line: request_id in line and "loramux.request" in line)

    entry = json.loads(line)
    assert (entry["finish_reason"], entry["error"]) == ("abort", "client_closed_request")
    assert entry["output_tokens"] >= 1


def test_a_stream_that_ends_with_an_error_is_a_warning(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": "!slow", "max_tokens": 400, "stream": True}
    with (
        httpx.Client(base_url=server.url, headers={"authorization": "Bearer k1"}) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        chunks = response.iter_bytes()
        next(chunks)
        os.kill(server.engine_pid(), signal.SIGKILL)
        rest = b"".join(chunks)

    assert b"engine_unavailable" in rest
    entry = entry_of(server, response)
    assert (entry["level"], entry["status"], entry["error"]) == ("warning", 200, "engine_unavailable")
    assert entry["finish_reason"] == "error"


def test_every_line_is_one_json_object_without_the_prompt(server: RunningServer, http: httpx.Client) -> None:
    http.post("/v1/completions", json={"model": "tiny", "prompt": SECRET})
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": SECRET}], "bad": SECRET})
    http.post("/v1/completions", json={"model": "tiny", "prompt": [SECRET, 5]})
    last = http.post("/v1/completions", json={"model": "x\n{}\x1b[2J\u202e", "prompt": SECRET})

    assert entry_of(server, last)["model"] == "x\n{}\x1b[2J\u202e"
    lines = list(server.lines)
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert all(line.isascii() and line.rstrip("\n").isprintable() for line in lines)
    assert SECRET not in server.stderr.lower()


def test_quiet_endpoints_probes_and_scrapes_get_no_line(server: RunningServer, http: httpx.Client) -> None:
    quiet = [http.get(path) for path in ("/v1/lora_adapters", "/v1/loras", "/health", "/metrics")]
    entry_of(server, http.get("/v1/models"))

    assert not [one for one in quiet if one.headers["x-request-id"] in server.stderr]


def test_a_trace_is_followed_in_log_and_answer(server: RunningServer, http: httpx.Client) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    response = http.get("/v1/models", headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})

    assert entry_of(server, response)["trace_id"] == trace_id
    version, answered_id, span_id, flags = response.headers["traceresponse"].split("-")
    assert (version, answered_id, flags) == ("00", trace_id, "01")
    assert span_id != "00f067aa0ba902b7"


def test_prompts_and_answers_are_logged_on_request_and_cut(text_model: Path) -> None:
    flags = (
        "--enable-log-requests",
        "--enable-log-outputs",
        "--max-log-len=4",
        "--disable-uvicorn-access-log",
    )
    with running_server(str(text_model), *flags, command=COMMAND) as server, server.client() as client:
        models = client.get("/v1/models")
        broken = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        answer = client.post("/v1/completions", json={"prompt": ["abcdefgh", "12"], "max_tokens": 64})
        request_id = answer.headers["x-request-id"]
        line = wait_for(server, lambda line: f"request_id={request_id}" in line)

    assert line.endswith('prompts=["abcd", "12"] outputs=["abcd", "12"]\n')
    assert models.headers["x-request-id"] not in server.stderr
    assert broken.headers["x-request-id"] in server.stderr


def record(message: str, **fields: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "a.b", "levelname": "INFO", "msg": message, **fields})


def test_text_lines_escape_what_could_forge_one() -> None:
    line = TextFormatter().format(record("gone\nINFO fake: \x1b[31m\x9b", adapter="a b\r\n\u202e", n=2))

    assert line.endswith(r'INFO a.b: gone\x0aINFO fake: \x1b[31m\x9b adapter="a b\\x0d\\x0a\\u202e" n=2')
    assert line.isprintable()


@pytest.mark.parametrize(
    "program", ["raise ValueError('x')", "import threading; threading.Thread(target=lambda: 1 / 0).start()"]
)
def test_what_ends_a_process_or_a_thread_is_one_json_line(program: str) -> None:
    set_up = "import logging; from loramux.engine import log_format; log_format.set_up(logging.INFO, 'json')"
    warn = "import warnings; warnings.warn('careful', stacklevel=1)"

    done = subprocess.run(
        [sys.executable, "-c", f"{set_up}; {warn}; {program}"], capture_output=True, text=True, check=False
    )

    warning, failure = (json.loads(line) for line in done.stderr.splitlines())
    assert "careful" in warning["message"]
    assert failure["level"] == "critical"
    assert "Error" in failure["exception"]


def test_lines_of_a_traceback_cannot_pass_for_lines_of_their_own() -> None:
    try:
        raise ValueError("first\n2026-01-01 INFO loramux: fake")
    except ValueError:
        failed = record("it failed", exc_info=sys.exc_info())

    text = TextFormatter().format(failed)
    entry = json.loads(JsonFormatter("engine").format(failed))

    first, *others = text.split("\n")
    assert first.endswith("it failed")
    assert all(line.startswith("    | ") for line in others)
    assert entry["exception"].startswith("Traceback")
    assert (entry["process"], entry["message"]) == ("engine", "it failed")
