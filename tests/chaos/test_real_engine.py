"""The real engine killed at bad moments: the next one answers with the very same weights."""

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

from tests.e2e.conftest import ADAPTERS, demo_arguments
from tests.running_server import ROOT, RunningServer, running_server

pytestmark = pytest.mark.demo

MODELS = ("smollm2", *ADAPTERS)
BODY: dict[str, Any] = {"prompt": "Count: 1, 2, 3,", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
QUESTION = [{"role": "user", "content": "What is the capital of France, and who lives there?"}]
LONG = {**BODY, "max_tokens": 800, "stream": True}


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; the test's own time limit ends it."""
    asked = threading.Event()
    for _ in range(3000):
        if condition():
            return
        asked.wait(0.01)
    pytest.fail("it never came true")


@pytest.fixture(scope="module")
def late_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is loaded later; its weights are those of `sql`."""
    folder = tmp_path_factory.mktemp("adapters") / "late"
    return Path(shutil.copytree(ROOT / "examples" / "adapters" / "sql", folder))


@pytest.fixture(scope="module")
def server(late_adapter: Path) -> Iterator[RunningServer]:
    """A server of its own, for its engine will not live."""
    flags = [*demo_arguments(), "--allow-runtime-lora-updating", f"--allowed-local-path={late_adapter}"]
    with running_server(*flags, "--engine-watchdog-timeout=3", "--engine-restart-wait=60") as running:
        yield running


def texts(http: httpx.Client) -> dict[str, str]:
    """What the base model and each adapter say."""
    found = {}
    for model in MODELS:
        body = {"model": model, "messages": QUESTION, "max_tokens": 20, "temperature": 0}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        found[model] = response.json()["choices"][0]["message"]["content"]
    return found


def lose_engine(server: RunningServer, number: signal.Signals) -> None:
    """Kill or stop it, and wait until there is another one."""
    lost = server.engine_pid()
    os.kill(lost, number)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    until(lambda: children.read_text().split() not in ([], [str(lost)]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_end_in_one_error_and_the_same_weights_answer_again(
    server: RunningServer, number: signal.Signals
) -> None:
    with server.client() as http:
        before = texts(http)
        assert len(set(before.values())) == len(MODELS)
        ends: list[list[str]] = []

        def stream(model: str) -> None:
            body = {**LONG, "model": model}
            url = f"{server.url}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=120) as response:
                ends.append([line for line in response.iter_lines() if line.startswith("data")])

        streams = [threading.Thread(target=stream, args=(model,)) for model in MODELS]
        for each in streams:
            each.start()
        until(lambda: http.get("/load").json()["num_running"] == len(MODELS))

        lose_engine(server, number)

        for each in streams:
            each.join()
        for lines in ends:
            assert '"code":"engine_unavailable"' in lines[-1]
            assert sum('"error"' in line for line in lines) == 1
        assert texts(http) == before
        assert http.get("/ready").status_code == 200


def test_an_adapter_that_was_being_loaded_is_there_with_its_weights(
    server: RunningServer, late_adapter: Path
) -> None:
    with server.client() as http:
        answers: list[httpx.Response] = []
        body = {"lora_name": "late", "lora_path": str(late_adapter)}
        loading = threading.Thread(
            target=lambda: answers.append(http.post("/v1/load_lora_adapter", json=body, timeout=120))
        )
        loading.start()
        lose_engine(server, signal.SIGKILL)
        loading.join()

        assert answers[0].status_code == 200, answers[0].text
        late_text = http.post("/v1/completions", json={**BODY, "model": "late"}).json()
        sql_text = http.post("/v1/completions", json={**BODY, "model": "sql"}).json()
        assert late_text["choices"][0]["text"] == sql_text["choices"][0]["text"]
        http.post("/v1/unload_lora_adapter", json={"lora_name": "late"})


def test_an_idle_engine_that_is_killed_comes_back_with_every_adapter(server: RunningServer) -> None:
    with server.client() as http:
        before = texts(http)
        views = http.get("/v1/lora_adapters").json()["data"]

        lose_engine(server, signal.SIGKILL)

        assert texts(http) == before
        again = http.get("/v1/lora_adapters").json()["data"]
        assert [(v["name"], v["version"], v["digest"]) for v in again] == [
            (v["name"], v["version"], v["digest"]) for v in views
        ]
