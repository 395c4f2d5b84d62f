"""The Grafana dashboard: each of its queries returns data of a real server that has had some traffic.

With a `prometheus` program (on the path, or named by PROMETHEUS) the queries are evaluated by Prometheus
itself; without one, every selector in them must find series on the server's page.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import httpx
import pytest

from tests.running_server import ROOT, RunningServer, running_server
from tests.server.scrapes import scrape
from tests.server.tiny_text import byte_tokenizer
from tests.tiny_models import make_adapter, make_tiny

DASHBOARD: Final = ROOT / "deploy" / "grafana" / "loramux.json"
PROMETHEUS: Final = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
PROMPT: Final = "The quick brown fox jumps over the lazy dog, again and again."
_SELECTOR: Final = re.compile(r"([a-zA-Z_][\w:]*)\{([^}]*)\}")
_MATCHER: Final = re.compile(r'(\w+)(=~|=)"([^"]*)"')
_PAUSE_S: Final = 0.05


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter that is loaded at the start, and one that a resolver finds."""
    folder = tmp_path_factory.mktemp("dashboard")
    model = make_tiny("llama", folder / "model", vocab_size=260, max_position_embeddings=512)
    byte_tokenizer().save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}")
    make_adapter(model, folder / "early", r=4, targets=["q_proj"], seed=1)
    make_adapter(model, folder / "named" / "late", r=8, targets=["q_proj", "v_proj"], seed=2)
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[RunningServer]:
    """A server with the real engine."""
    with running_server(
        *(str(world / "model"), "--served-model-name=tiny", "--dtype=float32", "--kv-cache-bytes=16M"),
        *("--enable-lora", "--num-lanes=32", "--lora-modules", f"early={world / 'early'}"),
        *("--allow-runtime-lora-updating", f"--allowed-local-path={world}"),
        environ={"LORAMUX_LORA_RESOLVER_CACHE_DIR": str(world / "named")},
    ) as running:
        yield running


def make_traffic(server: RunningServer) -> None:
    """Some of everything: an adapter that is there and one that must be found, a prefix twice, an error."""
    with server.client() as http:
        http.delete("/v1/lora_adapters/late")  # if an earlier test had it found
        for model in ("tiny", "early", "early", "late", "nobody"):
            body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
            response = http.post("/v1/completions", json=body)
            assert response.status_code == (404 if model == "nobody" else 200), response.text


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> list[str]:
    """Every query, with Grafana's variables filled in."""
    expressions = [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    variables = {"$__rate_interval": "1m", "$model_name": ".*", "$instance": ".*"}
    for name, value in variables.items():
        expressions = [expression.replace(name, value) for expression in expressions]
    assert not [expression for expression in expressions if "$" in expression]
    return expressions


def test_every_selector_of_the_dashboard_finds_series_on_the_page(server: RunningServer) -> None:
    make_traffic(server)
    with server.client() as http:
        page = scrape(http)
    assert page.value("vllm:request_success_total") > 0

    empty = {
        f"{name}{{{matchers}}}"
        for query in queries()
        for name, matchers in _SELECTOR.findall(query)
        if not any(_fits(matchers, labels) for labels in page.labels(name))
    }

    assert empty == set()


def test_the_dashboard_is_laid_out_without_gaps_in_its_data() -> None:
    found = panels()

    assert [panel["title"] for panel in found if panel["type"] == "row"] == [
        *("Traffic", "Latency", "KV cache", "Adapters", "Errors", "Process")
    ]
    assert len({panel["id"] for panel in found}) == len(found)
    assert all(panel["description"] and panel["targets"] for panel in found if panel["type"] != "row")
    assert len(queries()) == sum(len(_SELECTOR.findall(query)) > 0 for query in queries()) > 40


@pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus program (set PROMETHEUS)")
def test_every_query_of_the_dashboard_returns_data(server: RunningServer, tmp_path: Path) -> None:
    with prometheus(server, tmp_path) as http:
        wait_until(lambda: bool(ask(http, "loramux:engine_up == 1")))
        with server.client() as direct:
            ended = scrape(direct).value("vllm:request_success_total")
        make_traffic(server)
        wait_until(lambda: bool(ask(http, f"sum(vllm:request_success_total) >= {ended + 4}")))

        empty = queries()
        for _ in range(40):  # what the engine tells comes once a second
            empty = [query for query in empty if not any(value == value for value in ask(http, query))]
            if not empty:
                break
            Event().wait(5 * _PAUSE_S)

    assert empty == []


def _fits(matchers: str, labels: dict[str, str]) -> bool:
    for label, operator, value in _MATCHER.findall(matchers):
        if label == "instance":
            continue  # Prometheus adds it
        pattern = value if operator == "=~" else re.escape(value)
        if not re.fullmatch(pattern, labels.get(label, "")):
            return False
    return True


@contextmanager
def prometheus(server: RunningServer, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes the server, and a client for it."""
    assert PROMETHEUS is not None
    target = server.url.removeprefix("http://")
    (folder / "prometheus.yml").write_text(
        "scrape_configs:\n- job_name: loramux\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\n"
        f"  static_configs:\n  - targets: ['{target}']\n"
    )
    process = subprocess.Popen(
        [
            *(PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}"),
            *(f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    found: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r'msg="Listening on" address=(127\.0\.0\.1:[1-9]\d*)', line):
                found.put(match[1])

    reader = Thread(target=read)
    reader.start()
    try:
        with httpx.Client(base_url=f"http://{found.get(timeout=20)}") as http:
            yield http
    finally:
        process.terminate()
        process.wait(20)
        reader.join()
        assert process.stderr is not None
        process.stderr.close()


def ask(http: httpx.Client, query: str) -> list[float]:
    """The values that a query gives now."""
    response = http.get("/api/v1/query", params={"query": query})
    assert response.status_code == 200, f"{query}: {response.text}"
    return [float(series["value"][1]) for series in response.json()["data"]["result"]]


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    for _ in range(int(timeout_s / _PAUSE_S)):
        if holds():
            return
        Event().wait(_PAUSE_S)
    raise AssertionError("it never held")
