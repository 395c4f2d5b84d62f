"""Start, stop, disconnects and the engine's death, in real processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.adapter_files import llama_sites, write_adapter
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND

KEPT_ALIVE = ("--sse-keep-alive-interval=0.2",)
SLOW = {"prompt": "!slow", "max_tokens": 400, "ignore_eos": True}


def start_fails(*arguments: str, port: int = 0) -> tuple[int, str]:
    """Exit code and last line of a server that does not start."""
    server = RunningServer(arguments, command=COMMAND, port=port)
    code = server.wait_ended()
    assert "Traceback" not in server.stderr, server.stderr
    return code, server.lines[-1]


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; the test's own time limit ends it."""
    for _ in range(2000):
        if condition():
            return
    pytest.fail("it never came true")


@pytest.fixture
def own_server(text_model: Path) -> Iterator[RunningServer]:
    """A server that the test may break."""
    with running_server(str(text_model), "--served-model-name=tiny", command=COMMAND) as server:
        yield server


def test_an_open_stream_of_adapter_events_does_not_hold_the_server_back(own_server: RunningServer) -> None:
    with own_server.client() as http, http.stream("GET", "/v1/lora_adapters/events") as response:
        lines = response.iter_lines()
        assert next(lines) == ": connected"

        assert own_server.stop() == 0

        assert [line for line in lines if line.startswith("data")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_server_cleanly(own_server: RunningServer, number: signal.Signals) -> None:
    engine = own_server.engine_pid()

    code = own_server.stop(number)

    assert code == 0
    assert "Traceback" not in own_server.stderr
    assert not Path(f"/proc/{engine}").exists()


def test_signal_fails_running_streams_at_once(own_server: RunningServer) -> None:
    with (
        own_server.client() as http,
        http.stream("POST", "/v1/completions", json={**SLOW, "stream": True}) as r,
    ):
        lines = r.iter_lines()
        next(lines)
        own_server.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]

    assert '"error"' in rest[-1]
    assert '"finish_reason":"' not in "".join(rest)
    assert own_server.wait_ended() == 0
    assert "Traceback" not in own_server.stderr


def test_shutdown_timeout_lets_running_answers_finish(text_model: Path) -> None:
    arguments = (str(text_model), "--shutdown-timeout=30")
    body = {**SLOW, "max_tokens": 50, "stream": True}
    with running_server(*arguments, command=COMMAND) as server, server.client() as http:
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]

        assert rest[-1] == "data: [DONE]"
        assert server.wait_ended() == 0


def test_a_draining_server_says_so_and_begins_nothing_new(text_model: Path) -> None:
    arguments = (str(text_model), "--shutdown-timeout=60", "--served-model-name=tiny")
    body = {**SLOW, "max_tokens": 300, "stream": True}
    with running_server(*arguments, command=COMMAND) as server, server.client() as http:
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: http.get("/ready").status_code == 503)

            refused = http.post("/v1/completions", json={"prompt": "a"})

            assert http.get("/ready").json()["reasons"] == ["the server is draining: it shuts down"]
            assert http.get("/health").status_code == http.head("/health").status_code == 200
            assert http.get("/v1/models").status_code == 200
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["connection"] == "close"
            assert refused.headers["retry-after"]
            assert refused.headers["x-request-id"]
            rest = [line for line in lines if line]

        assert rest[-1] == "data: [DONE]"
        assert server.wait_ended() == 0


def test_the_time_for_draining_ends_with_one_error_for_each_stream(text_model: Path) -> None:
    with (
        running_server(str(text_model), "--shutdown-timeout=0.3", command=COMMAND) as server,
        server.client() as http,
        http.stream("POST", "/v1/completions", json={**SLOW, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]

        assert '"code":"engine_unavailable"' in rest[-1]
        assert server.wait_ended() == 0


def test_a_second_signal_ends_the_draining(text_model: Path) -> None:
    with (
        running_server(str(text_model), *KEPT_ALIVE, "--shutdown-timeout=600", command=COMMAND) as server,
        server.client() as http,
        http.stream("POST", "/v1/completions", json={"prompt": "!stuck", "stream": True}) as response,
    ):
        server.process.send_signal(signal.SIGTERM)
        until(lambda: http.get("/ready").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        lines = [line for line in response.iter_lines() if line]

        assert '"error"' in lines[-1]
        assert server.wait_ended() == 0


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_signal_ends_a_start_whose_model_is_still_loading(
    text_model: Path, tmp_path: Path, num_signals: int
) -> None:
    model = Path(shutil.copytree(text_model, tmp_path / "model"))
    (model / "hold").touch()
    server = RunningServer([str(model)], command=COMMAND)
    server.wait_line("loading model")

    for _ in range(num_signals):
        server.process.send_signal(signal.SIGTERM)

    assert server.wait_ended(4.0) == 0  # less than a running engine gets for its last step


def test_a_signal_ends_a_start_that_waits_for_a_hub_which_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.settimeout(60.0)
        endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
        server = RunningServer(["org/model"], command=COMMAND, environ={"HF_ENDPOINT": endpoint})
        connection, _ = hub.accept()
        with connection:
            server.process.send_signal(signal.SIGTERM)

            assert server.wait_ended(8.0) == 0
    assert "Traceback" not in server.stderr


def test_who_waits_for_an_adapter_is_told_that_the_server_ends(text_model: Path, tmp_path: Path) -> None:
    stuck = write_adapter(tmp_path / "stuck", llama_sites(), base_model_name_or_path="!stuck")
    flags = ["--enable-lora", "--allow-runtime-lora-updating", f"--allowed-local-path={tmp_path}"]
    with running_server(str(text_model), *flags, *KEPT_ALIVE, command=COMMAND) as server:
        load = server.open_post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(stuck)})
        with load, server.client() as http:
            until(lambda: http.get("/v1/lora_adapters/x").status_code == 200)
            body = {"model": "x", "prompt": "a", "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                assert next(lines) == ": keep-alive"

                server.process.send_signal(signal.SIGTERM)

                events = [line for line in lines if line.startswith("data")]
            assert len(events) == 1
            assert '"code":"engine_unavailable"' in events[0]  # and not that there is no such model
        assert server.wait_ended() == 0


def test_engine_death_fails_what_runs_once(own_server: RunningServer) -> None:
    answers: list[httpx.Response] = []
    with own_server.client() as http:
        waiting = threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=SLOW)))
        waiting.start()
        with http.stream("POST", "/v1/completions", json={**SLOW, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            until(lambda: http.get("/load").json()["num_running"] == 2)
            os.kill(own_server.engine_pid(), signal.SIGKILL)
            rest = [line for line in lines if line]
        waiting.join(10)

        assert '"code":"engine_unavailable"' in rest[-1]
        assert "[DONE]" not in "".join(rest)
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "engine_unavailable"
        assert answers[0].headers["retry-after"] == "1"


def test_engine_that_dies_of_a_request_fails_it_before_the_first_byte(own_server: RunningServer) -> None:
    with own_server.client() as http:
        response = http.post("/v1/completions", json={"prompt": "!crash", "stream": True})

        assert response.status_code == 503
        assert "SIGKILL" in response.json()["error"]["message"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("prompt", ["!slow", "!stuck"])
def test_closed_connection_aborts_every_sequence(
    fake_server: RunningServer, is_stream: bool, prompt: str
) -> None:
    body = {**SLOW, "prompt": [prompt] * 2, "n": 3, "stream": is_stream}
    with fake_server.client() as http:
        with fake_server.open_post("/v1/completions", body):
            until(lambda: http.get("/load").json()["num_running"] == 6)

        until(lambda: http.get("/load").json()["num_running"] == 0)
        assert http.get("/load").json()["server_load"] == 0


def test_silent_stream_gets_comments(fake_server: RunningServer) -> None:
    with (
        fake_server.client() as http,
        http.stream("POST", "/v1/completions", json={"prompt": "!stuck", "stream": True}) as response,
    ):
        assert response.status_code == 200
        assert next(response.iter_lines()) == ": keep-alive"


def test_unsupported_model_stops_the_start(tmp_path: Path, text_model: Path) -> None:
    broken = tmp_path / "broken"
    broken.symlink_to(text_model)

    assert start_fails(str(broken)) == (1, "loramux: error: architecture Broken is not supported\n")


def test_missing_model_folder_stops_the_start(tmp_path: Path) -> None:
    code, line = start_fails(str(tmp_path / "none"))

    assert code == 1
    assert str(tmp_path / "none") in line


def test_adapter_folder_as_model_is_recognised(adapter_folder: Path) -> None:
    code, line = start_fails(str(adapter_folder))

    assert code == 1
    assert "LoRA adapter" in line


def test_model_without_a_tokenizer_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    code, line = start_fails(str(tmp_path))

    assert code == 1
    assert "tokenizer.json" in line


def test_bad_adapter_stops_the_start_and_is_named(text_model: Path, tmp_path: Path) -> None:
    wrong = write_adapter(tmp_path / "wrong", llama_sites(), rank=300)

    code, line = start_fails(str(text_model), "--enable-lora", "--lora-modules", f"big={wrong}")

    assert code == 1
    assert "adapter 'big'" in line
    assert "300" in line
    assert "256" in line


def test_missing_adapter_folder_stops_the_start(text_model: Path, tmp_path: Path) -> None:
    code, line = start_fails(str(text_model), "--enable-lora", "--lora-modules", f"gone={tmp_path / 'gone'}")

    assert code == 1
    assert "adapter 'gone'" in line


def test_taken_port_stops_the_start(text_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]

        code, line = start_fails(str(text_model), port=port)

    assert code == 1
    assert f"port {port}" in line


def test_store_that_cannot_be_written_stops_the_start_and_names_the_flag(text_model: Path) -> None:
    code, line = start_fails(str(text_model), "--enable-lora", "--adapter-store-dir=/proc/none")

    assert code == 1
    assert "(--adapter-store-dir)" in line
