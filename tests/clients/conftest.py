"""The two servers that every client talks to, and one run of each client's script."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.clients.features import ADAPTERS, World
from tests.clients.venvs import client_python
from tests.demo import demo_model_folder
from tests.running_server import ROOT, running_server
from tests.server.fake_serve import COMMAND
from tests.server.tiny_text import write_text_model

KEY = "sk-of-the-tests"
ECHO_TEMPLATE = "{{ messages[-1].content }}"  # the stand-in engine repeats its prompt

Problems = dict[str, str | None]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Both servers, as users start them: with a key."""
    tiny = write_text_model(tmp_path_factory.mktemp("models") / "tiny")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")
    modules = [f"{name}={ROOT / 'examples' / 'adapters' / name}" for name in ADAPTERS]
    with (
        running_server(
            *(str(demo_model_folder()), "--served-model-name=smollm2", "--dtype=float32"),
            *("--max-model-len=1024", "--kv-cache-bytes=200M", "--enable-lora", "--lora-modules", *modules),
            *(f"--api-key={KEY}", *tools),
        ) as real,
        running_server(
            *(str(tiny), "--served-model-name=echo", f"--chat-template={ECHO_TEMPLATE}"),
            *(f"--api-key={KEY}", *tools),
            command=COMMAND,
        ) as echo,
    ):
        yield World(real_url=f"{real.url}/v1", echo_url=f"{echo.url}/v1", key=KEY)


@pytest.fixture(scope="session")
def pythons(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Path]]]:
    """The interpreter of each client that a test names; they are installed side by side: an index is slow."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = [str(item.callspec.params["client"]) for item in functions if "pythons" in item.fixturenames]
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(client_python, name) for name in dict.fromkeys(names)}


@pytest.fixture(scope="session")
def problems_of(
    pythons: dict[str, Future[Path]], world: World, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Problems]:
    """What went wrong with each feature of a client; its script runs once."""

    @cache
    def run(client: str) -> Problems:
        python = pythons[client].result()
        report = tmp_path_factory.mktemp("clients") / f"{client}.json"
        module = f"tests.clients.with_{client.replace('-', '_')}"
        done = subprocess.run(
            [str(python), "-m", module, json.dumps(dataclasses.asdict(world)), str(report)],
            cwd=ROOT,
            env=_environ(report.parent),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        problems: Problems = json.loads(report.read_text())
        return problems

    return run


def _environ(home: Path) -> dict[str, str]:
    """Nothing of the caller's keys, and no telemetry of the clients."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
        "NO_PROXY": "127.0.0.1",
    }
