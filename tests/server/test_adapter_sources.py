"""Adapters from a Hub through the whole server: addresses, statuses, and a Hub that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hub_server import HubServer, running_hub
from tests.resolvers.remote_adapters import adapter_files, below
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A stand-in hub with three repositories."""
    with running_hub() as running:
        running.commit("team/pirate", adapter_files())
        running.commit("team/many", below("sub/a", adapter_files(1)) | below("sub/b", adapter_files(2)))
        running.commit("team/private", adapter_files(3))
        running.repos["team/private"].token = "hf_right"
        yield running


@pytest.fixture(scope="module")
def server(hub: HubServer, text_model: Path) -> Iterator[RunningServer]:
    """A server for it; names in `team/many` resolve."""
    with running_server(
        *(str(text_model), "--served-model-name=tiny", "--enable-lora", "--allow-runtime-lora-updating"),
        command=COMMAND,
        environ={
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_wrong",
            "VLLM_LORA_RESOLVER_HF_REPO_LIST": "team/many",
        },
    ) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A client for it."""
    with server.client() as client:
        yield client


def load(http: httpx.Client, name: str, path: str) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def test_a_load_from_the_hub_is_pinned_and_shown_with_its_commit(http: httpx.Client, hub: HubServer) -> None:
    commit = hub.repos["team/pirate"].branches["main"]

    assert load(http, "p", "hf://team/pirate").status_code == 200

    view = http.get("/v1/lora_adapters/p").json()
    assert (view["source"], view["revision"]) == (f"hf://team/pirate@{commit}", commit)
    assert http.get("/v1/models/p").json()["root"] == f"hf://team/pirate@{commit}"
    for address in ("team/pirate", "huggingface://team/pirate@main"):
        body = {"source": address}
        assert http.put("/v1/lora_adapters/p", json=body).json()["outcome"] == "unchanged"


@pytest.mark.parametrize(
    ("address", "status", "code"),
    [
        ("team/nothing", 404, "adapter_not_found"),
        ("team/pirate@no-branch", 404, "adapter_not_found"),
        ("hf://team/pirate/no/folder", 404, "adapter_not_found"),
        ("team/private", 424, "adapter_source_auth"),
        ("hf://team", 400, "invalid_value"),
        ("hf://user:secret@host/team/pirate", 400, "invalid_value"),
    ],
)
def test_what_a_hub_refuses_has_one_status_each(
    http: httpx.Client, address: str, status: int, code: str
) -> None:
    response = load(http, "x", address)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert "hf_wrong" not in response.text
    assert all(card["id"] != "x" for card in http.get("/v1/models").json()["data"])


def test_a_hub_that_is_down_is_a_503_that_may_be_tried_again(http: httpx.Client, hub: HubServer) -> None:
    hub.faults.status, hub.faults.status_for, hub.faults.num_status = 500, "team/later", -1
    hub.commit("team/later", adapter_files(5))

    down = load(http, "later", "team/later")
    asked = http.post("/v1/completions", json={"model": "later", "prompt": "a"})
    hub.faults.num_status = 0
    up = load(http, "later", "team/later")

    assert (down.status_code, down.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert down.headers["retry-after"]
    assert "service unavailable" in down.json()["error"]["message"], "AIBrix tries again only then"
    assert asked.status_code == 503, "known, but not here yet"
    assert up.status_code == 200


def test_parallel_first_requests_ask_the_hub_once(http: httpx.Client, hub: HubServer) -> None:
    def ask(_: int) -> Any:
        body = {"model": "team/many/sub/a", "prompt": "abc"}
        return http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(8))) == {"ABC"}

    assert hub.count(r"resolve/.*sub/a/adapter_model\.safetensors") == 1


def test_unknown_names_do_not_reach_the_hub(http: httpx.Client, hub: HubServer) -> None:
    http.post("/v1/completions", json={"model": "team/many/none", "prompt": "a"})
    before = len(hub.requests)

    for number in range(200):
        for name in (f"nobody-{number}", f"other/repo-{number}", f"team/many/none-{number}"):
            response = http.post("/v1/completions", json={"model": name, "prompt": "a"})
            assert response.status_code == 404, response.text

    assert len(hub.requests) - before <= 4
    rows = [view["name"] for view in http.get("/v1/lora_adapters").json()["data"]]
    assert not any("none" in name or "nobody" in name for name in rows)


def test_a_restart_without_the_hub_serves_from_the_store(
    hub: HubServer, text_model: Path, tmp_path: Path
) -> None:
    flags = [str(text_model), "--enable-lora", "--allow-runtime-lora-updating"]
    flags += [f"--state-dir={tmp_path / 'state'}", f"--adapter-store-dir={tmp_path / 'store'}"]
    environ = {"HF_ENDPOINT": hub.url, "HF_TOKEN": ""}
    with running_server(*flags, command=COMMAND, environ=environ) as first, first.client() as http:
        body = {"source": "team/pirate", "pinned": True}
        assert http.put("/v1/lora_adapters/p", json=body).status_code == 201
    num_requests = len(hub.requests)

    flags.append("--offline")
    with running_server(*flags, command=COMMAND, environ=environ) as second, second.client() as http:
        answer = http.post("/v1/completions", json={"model": "p", "prompt": "abc"})
        missing = load(http, "q", "team/many")
        ready = http.get("/ready")

    assert answer.json()["choices"][0]["text"] == "ABC"
    assert ready.status_code == 200
    assert (missing.status_code, missing.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert "offline" in missing.json()["error"]["message"]
    assert len(hub.requests) == num_requests
