"""The engine process is lost, again and again; another one takes its place and nobody waits for ever."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapter_files import llama_sites, write_adapter
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND

NAMED = ("--served-model-name=tiny",)
SLOW = {"prompt": "!slow", "max_tokens": 400, "ignore_eos": True}


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; the test's own time limit ends it."""
    asked = threading.Event()
    for _ in range(4000):
        if condition():
            return
        asked.wait(0.005)
    pytest.fail("it never came true")


@pytest.fixture
def own_model(text_model: Path, tmp_path: Path) -> Path:
    """A model folder that the test may change."""
    return Path(shutil.copytree(text_model, tmp_path / "model"))


@pytest.fixture
def server(own_model: Path, adapter_folder: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server whose engine the test may kill."""
    flags = ["--served-model-name=tiny", "--enable-lora", "--allow-runtime-lora-updating"]
    flags += [f"--lora-modules=shout={adapter_folder}", f"--allowed-local-path={tmp_path}"]
    with running_server(str(own_model), *flags, command=COMMAND) as server:
        yield server


def kill_engine(server: RunningServer, number: signal.Signals = signal.SIGKILL) -> int:
    """End the engine's process and wait until the server knows; returns its id."""
    pid = server.engine_pid()
    os.kill(pid, number)
    until(lambda: number == signal.SIGSTOP or not Path(f"/proc/{pid}").exists())
    return pid


def text(http: httpx.Client, model: str = "tiny", **fields: Any) -> str:
    response = http.post("/v1/completions", json={"model": model, "prompt": "abc", **fields})
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["text"]
    return answer


def test_killed_engine_is_replaced_and_adapters_answer_as_before(server: RunningServer) -> None:
    with server.client() as http:
        before = http.get("/v1/lora_adapters/shout").json()

        killed = kill_engine(server)

        assert text(http, "shout") == "ABC"
        assert text(http) == "abc"
        after = http.get("/v1/lora_adapters/shout").json()
        assert (after["digest"], after["version"]) == (before["digest"], before["version"])
        assert server.engine_pid() != killed
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json() == {"ready": True, "reasons": []}


def test_probes_tell_of_a_restart_and_requests_wait_for_its_end(
    server: RunningServer, own_model: Path
) -> None:
    hold = own_model / "hold"
    hold.touch()
    answers: list[str] = []
    with server.client() as http:
        kill_engine(server)
        until(lambda: http.get("/health").status_code == 503)

        waiting = threading.Thread(target=lambda: answers.append(text(http, "shout")))
        waiting.start()

        assert http.get("/live").status_code == 200
        ready = http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["reasons"] == ["the engine is restarting"]
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny", "shout"]
        assert answers == []
        hold.unlink()
        waiting.join()
        assert answers == ["ABC"]


def test_a_request_waits_only_so_long_for_the_next_engine(own_model: Path) -> None:
    with running_server(str(own_model), "--engine-restart-wait=0.1", command=COMMAND) as server:
        (own_model / "hold").touch()
        with server.client() as http:
            kill_engine(server)
            until(lambda: http.get("/health").status_code == 503)

            response = http.post("/v1/completions", json={"prompt": "a", "stream": True})

            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_unavailable"
            message = "the engine is restarting (service unavailable)"
            assert response.json()["error"]["message"] == message
            assert response.headers["retry-after"]
        assert server.stop(signal.SIGTERM) == 0


def test_the_wait_for_the_next_engine_counts_as_waiting_in_the_queue(own_model: Path) -> None:
    with running_server(str(own_model), "--max-queue-wait=0.1", command=COMMAND) as server:
        (own_model / "hold").touch()
        with server.client() as http:
            kill_engine(server)
            until(lambda: http.get("/health").status_code == 503)

            response = http.post("/v1/completions", json={"prompt": "a"})

            assert response.status_code == 503
            assert response.elapsed.total_seconds() < 5.0  # of the 10 that --engine-restart-wait allows
        assert server.stop(signal.SIGTERM) == 0


def test_a_draining_server_waits_for_its_next_engine(own_model: Path) -> None:
    flags = ("--shutdown-timeout=60", "--sse-keep-alive-interval=0.1")
    with running_server(str(own_model), *flags, command=COMMAND) as server:
        (own_model / "hold").touch()
        with server.client() as http:
            kill_engine(server)
            until(lambda: http.get("/health").status_code == 503)
            body = {"prompt": "abc", "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                assert next(lines) == ": keep-alive"

                server.process.send_signal(signal.SIGTERM)
                server.wait_line("draining 1 request")
                (own_model / "hold").unlink()

                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait_ended() == 0


def test_stopped_engine_is_noticed_and_replaced(own_model: Path) -> None:
    with running_server(str(own_model), "--engine-watchdog-timeout=0.5", *NAMED, command=COMMAND) as server:
        with server.client() as http:
            with http.stream("POST", "/v1/completions", json={**SLOW, "stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                stopped = kill_engine(server, signal.SIGSTOP)
                rest = [line for line in lines if line]

            assert '"code":"engine_unavailable"' in rest[-1]
            assert "has neither said nor computed anything" in rest[-1]
            assert text(http) == "abc"
        assert not Path(f"/proc/{stopped}").exists()


def test_an_engine_that_cannot_come_back_ends_the_server(own_model: Path) -> None:
    with running_server(str(own_model), "--max-engine-restarts=2", command=COMMAND) as server:
        (own_model / "broken").touch()
        kill_engine(server)

        assert server.wait_ended() == 1
        assert server.lines[-1] == (
            "loramux: error: the server ended, because its engine cannot be kept running\n"
        )


def test_a_load_that_was_under_way_is_done_by_the_next_engine(
    server: RunningServer, own_model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "late", llama_sites(), seed=3, base_model_name_or_path="!stuck-once")
    (own_model / "stuck-once").touch()
    answers: list[httpx.Response] = []
    with server.client() as http:
        body = {"lora_name": "late", "lora_path": str(adapter)}
        loading = threading.Thread(
            target=lambda: answers.append(http.post("/v1/load_lora_adapter", json=body))
        )
        loading.start()
        until(lambda: not (own_model / "stuck-once").exists())

        kill_engine(server)

        loading.join()
        assert answers[0].status_code == 200, answers[0].text
        assert text(http, "late") == "ABC"


def test_an_unload_that_was_under_way_ends(server: RunningServer) -> None:
    answers: list[httpx.Response] = []
    with server.client() as http:
        with http.stream(
            "POST", "/v1/completions", json={**SLOW, "model": "shout", "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            path = "/v1/lora_adapters/shout?drain_timeout_s=60"
            leaving = threading.Thread(target=lambda: answers.append(http.delete(path)))
            leaving.start()
            until(lambda: http.get("/v1/lora_adapters").json()["data"][0]["state"] == "draining")
            kill_engine(server)
            assert '"engine_unavailable"' in [line for line in lines if line][-1]
        leaving.join()

        assert answers[0].status_code == 200
        assert text(http) == "abc"
        assert http.get("/v1/lora_adapters").json()["data"] == []
        assert http.get("/load").json()["host_adapters"] == []
