"""Killed at any moment, the server starts again with what it had answered for, and leaves no litter."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapter_files import CONFIG_FILE, WEIGHTS_FILE, llama_sites, write_adapter
from tests.running_server import running_server
from tests.server.fake_serve import COMMAND

NUM_KILLS = int(os.environ.get("NUM_KILLS", "3"))  # 50 were tried once
NAMES = ("a", "b", "c d")


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
    pytest.fail("it never came true")


class Client:
    """Changes adapters at random, and keeps book of what may be true after a kill."""

    def __init__(self, http: httpx.Client, adapters: list[Path], rng: random.Random) -> None:
        self._http = http
        self._adapters = adapters
        self._rng = rng
        self.digests: dict[str, set[str | None]] = {}  # what each name may stand for

    def run(self) -> None:
        """Until the server is gone."""
        try:
            while True:
                self._change(self._rng.choice(NAMES))
        except httpx.TransportError:
            return

    def _change(self, name: str) -> None:
        before = self.digests.get(name, {None})
        adapter = self._rng.choice(self._adapters)
        path = f"/v1/lora_adapters/{name}"
        match self._rng.randrange(4):
            case 0:
                self.digests[name] = before | {None}
                self._http.delete(path)
                self.digests[name] = {None}
            case 1:
                headers = {
                    "content-type": "application/x-safetensors",
                    "x-loramux-adapter-config": (adapter / CONFIG_FILE).read_text(),
                }
                self.digests[name] = {*before, DIGESTS.get(adapter.name)}
                weights = (adapter / WEIGHTS_FILE).read_bytes()
                response = self._http.put(f"{path}?load_inplace=1", content=weights, headers=headers)
                self._loaded(name, adapter, response)
            case _:
                self.digests[name] = {*before, DIGESTS.get(adapter.name)}
                body = {"source": str(adapter), "load_inplace": True}
                self._loaded(name, adapter, self._http.put(path, json=body))

    def _loaded(self, name: str, adapter: Path, response: httpx.Response) -> None:
        assert response.status_code in (200, 201), response.text
        digest = response.json()["adapter"]["digest"]
        assert DIGESTS.setdefault(adapter.name, digest) == digest
        self.digests[name] = {digest}


DIGESTS: dict[str, str] = {}  # of each adapter's content


def test_a_kill_at_any_moment_loses_nothing_that_was_answered(tmp_path: Path, text_model: Path) -> None:
    adapters = [write_adapter(tmp_path / f"adapter-{seed}", llama_sites(), seed=seed) for seed in range(3)]
    state, store = tmp_path / "state", tmp_path / "store"
    rng = random.Random(7)
    may_be: dict[str, set[str | None]] = {}
    for kill in range(NUM_KILLS + 1):
        flags = [str(text_model), "--enable-lora", "--allow-runtime-lora-updating", f"--state-dir={state}"]
        flags += [f"--allowed-local-path={tmp_path}", f"--adapter-store-dir={store}"]
        with running_server(*flags, command=COMMAND) as server, server.client() as http:
            until(lambda: not any(view["update"] for view in views(http)))
            assert [view["error"] for view in views(http) if view["error"]] == []
            now = {view["name"]: view["digest"] for view in views(http)}
            if kill == 0:
                for adapter in adapters:  # so that every digest is known
                    body = {"source": str(adapter)}
                    response = http.put(f"/v1/lora_adapters/{adapter.name}", json=body)
                    DIGESTS[adapter.name] = response.json()["adapter"]["digest"]
                    http.delete(f"/v1/lora_adapters/{adapter.name}")
            for name, digests in may_be.items():
                assert now.get(name) in digests, (kill, name)
            check_tidy(state, store, len(now))
            client = Client(http, adapters, rng)
            client.digests = {name: {digest} for name, digest in now.items()}
            changing = threading.Thread(target=client.run)
            changing.start()
            threading.Event().wait(rng.random() * 0.3)
            server.process.send_signal(signal.SIGKILL)
            changing.join()
            may_be = client.digests


def views(http: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get("/v1/lora_adapters").json()["data"]
    return found


def check_tidy(state: Path, store: Path, num_adapters: int) -> None:
    """Nothing is left of what the killed server had begun."""
    assert {path.name for path in state.iterdir()} <= {"adapters.json", "lock", "uploads"}
    uploads = list((state / "uploads").iterdir()) if (state / "uploads").exists() else []
    assert len(uploads) <= num_adapters
    assert len(list((store / "sessions").iterdir())) == 1
    assert list((store / "partial").iterdir()) == list((store / "trash").iterdir()) == []
