"""`/metrics`: everything is there from the start, counts are true, and nothing a client sends can grow it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loramux.engine.types import Distribution, EngineStats
from loramux.server.observe.engine_metrics import EngineMetrics
from loramux.server.observe.label_budget import LabelBudget
from tests.running_server import ROOT, RunningServer, running_server
from tests.server.fake_serve import COMMAND
from tests.server.scrapes import Scrape, scrape, scrape_until

PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")
VLLM_COUNTERS = (
    *("prompt_tokens", "prompt_tokens_by_source", "prompt_tokens_cached", "generation_tokens"),
    *("request_success", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits"),
    "admission_rejections",
)
VLLM_GAUGES = (
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason"),
    *("kv_cache_usage_perc", "cache_config_info", "lora_requests_info", "lora_adapter_loaded"),
    *("num_gpu_loaded_lora_adapters", "num_cpu_loaded_lora_adapters"),
)
VLLM_HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *(
        "request_time_per_output_token_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
    ),
    *("request_prefill_time_seconds", "request_decode_time_seconds"),
    "request_prompt_tokens",
    *("request_generation_tokens", "iteration_tokens_total", "request_max_num_generation_tokens"),
    *("request_params_n", "request_params_max_tokens", "request_num_preemptions"),
    "request_prefill_kv_computed_tokens",
)
OWN = {
    "counter": (
        *("adapter_loads", "adapter_evictions", "adapter_requests", "adapter_prompt_tokens"),
        *(
            "adapter_generation_tokens",
            "resolver_errors",
            "queue_rejections",
            "engine_restarts",
            *("request_errors", "engine_cpu_seconds"),
        ),
    ),
    "gauge": (
        "adapter_resident_bytes",
        "adapters",
        "engine_up",
        "lanes",
        "lanes_used",
        "engine_resident_memory_bytes",
    ),
    "histogram": (
        *("adapter_load_seconds", "adapter_cold_start_seconds", "adapter_lease_wait_seconds"),
        "adapter_time_to_first_token_seconds",
    ),
}
# The base model's labels, in front of every sample of `vllm:` but these.
UNLABELLED = {"vllm:lora_requests_info": set[str](), "vllm:admission_rejections": {"model_name"}}


@pytest.fixture(scope="module")
def server(text_model: Path, adapter_folder: Path) -> Iterator[RunningServer]:
    """A server of its own, so that counts are this file's."""
    with running_server(
        *(str(text_model), "--served-model-name", "tiny", "alias", "--enable-lora", "--max-loras=3"),
        *("--lora-modules", f"shout={adapter_folder}", f"a,b={adapter_folder}"),
        *("--metrics-max-adapters=1", "--max-key-requests=0"),
        command=COMMAND,
    ) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def complete(http: httpx.Client, **body: object) -> httpx.Response:
    return http.post("/v1/completions", json={"model": "tiny", "max_tokens": 64, **body})


def families_of(kind: str, names: tuple[str, ...]) -> dict[str, str]:
    return {f"vllm:{name}": kind for name in names}


def test_every_metric_is_there_before_the_first_request_and_without_lora(text_model: Path) -> None:
    with running_server(str(text_model), command=COMMAND) as running, running.client() as client:
        page = scrape(client)

    expected = families_of("counter", VLLM_COUNTERS)
    expected |= families_of("gauge", VLLM_GAUGES) | families_of("histogram", VLLM_HISTOGRAMS)
    expected |= {f"loramux:{name}": kind for kind, names in OWN.items() for name in names}
    expected |= {"http_requests": "counter", "http_request_duration_seconds": "histogram"}
    expected |= {"process_cpu_seconds": "counter", "process_resident_memory_bytes": "gauge"}
    kinds = {name: page.families[name].type for name in expected if name in page.families}
    assert kinds == expected
    empty = {name for name in expected if not page.families[name].samples}
    assert empty == {"vllm:lora_adapter_loaded", "http_requests", "http_request_duration_seconds"}
    assert page.labels("vllm:lora_requests_info") == [
        {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    ]
    for reason in ("stop", "length", "abort", "error"):
        assert {"finished_reason": reason}.items() <= {
            pair for labels in page.labels("vllm:request_success_total") for pair in labels.items()
        }


def test_labels_are_those_of_vllm(http: httpx.Client) -> None:
    page = scrape(http)

    for name, family in page.families.items():
        if name.startswith("vllm:"):
            common = UNLABELLED.get(name, {"model_name", "engine"})
            assert all(common <= sample.labels.keys() for sample in family.samples), name
            assert all(sample.labels.get("model_name") in (None, "tiny") for sample in family.samples)
            assert all(sample.labels.get("engine") in (None, "0") for sample in family.samples)


def test_a_request_is_counted_once_with_all_of_its_tokens(http: httpx.Client) -> None:
    before = scrape(http)

    answer = complete(http, prompt="hello there, this is long", n=2).json()

    after = scrape(http)

    def gain(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    usage = answer["usage"]
    assert gain("vllm:generation_tokens_total") == usage["completion_tokens"]
    assert gain("vllm:prompt_tokens_total") == 2 * usage["prompt_tokens"]  # each choice, as vLLM counts
    assert gain("vllm:prompt_tokens_cached_total") == 2 * 16
    assert gain("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 2 * 16
    assert gain("vllm:request_success_total", finished_reason="stop") == 2
    assert gain("vllm:time_to_first_token_seconds_count") == 2
    assert gain("vllm:inter_token_latency_seconds_count") == usage["completion_tokens"] - 2
    assert gain("vllm:e2e_request_latency_seconds_count") == 2
    assert gain("vllm:request_decode_time_seconds_count") == 2
    assert gain("vllm:request_params_n_sum") == 2
    assert gain("vllm:request_params_n_count") == 1
    assert gain("vllm:request_max_num_generation_tokens_sum") == usage["completion_tokens"] / 2
    assert gain("vllm:request_params_max_tokens_sum") == 2 * 64
    assert gain("http_requests_total", handler="/v1/completions", method="POST", status="2xx") == 1
    assert gain("http_request_duration_seconds_count", handler="/v1/completions") == 1


def test_a_stop_string_counts_as_stop_and_a_failure_as_error(http: httpx.Client) -> None:
    before = scrape(http)

    complete(http, prompt="abcdef", stop="cd")
    complete(http, prompt="!refuse")
    complete(http, prompt="aaaa", max_tokens=2)

    after = scrape(http)
    reasons = {
        reason: after.value("vllm:request_success_total", finished_reason=reason)
        - before.value("vllm:request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert reasons == {"stop": 1, "length": 1, "abort": 0, "error": 1}
    code = "invalid_value"
    gained = after.value("loramux:request_errors_total", code=code)
    assert gained - before.value("loramux:request_errors_total", code=code) == 1


def test_a_client_that_leaves_counts_as_abort(server: RunningServer, http: httpx.Client) -> None:
    before = scrape(http).value("vllm:request_success_total", finished_reason="abort")
    body = {"model": "tiny", "prompt": "!slow", "max_tokens": 400, "stream": True}

    connection = server.open_post("/v1/completions", body)
    connection.recv(1000)
    connection.close()

    scrape_until(
        http,
        lambda page: page.value("vllm:request_success_total", finished_reason="abort") == before + 1,
    )


def test_adapters_with_running_and_with_waiting_requests_are_told_apart(
    server: RunningServer, http: httpx.Client
) -> None:
    def lists(page: Scrape) -> tuple[str, str]:
        (labels,) = page.labels("vllm:lora_requests_info")
        assert labels["max_lora"] == "3"
        return labels["running_lora_adapters"], labels["waiting_lora_adapters"]

    runs = server.open_post(
        "/v1/completions", {"model": "shout", "prompt": "!slow", "max_tokens": 400, "stream": True}
    )
    waits = server.open_post("/v1/completions", {"model": "a,b", "prompt": "!stuck", "stream": True})

    scrape_until(http, lambda page: lists(page) == ("shout", "a%2Cb"))
    runs.close()
    waits.close()
    scrape_until(http, lambda page: lists(page) == ("", ""))


def test_loaded_adapters_are_shown_by_name_and_level(http: httpx.Client) -> None:
    page = scrape_until(http, lambda page: page.value("vllm:num_cpu_loaded_lora_adapters") > 0)

    assert page.labels("vllm:lora_adapter_loaded") == [
        {
            "model_name": "tiny",
            "engine": "0",
            "adapter_name": name,
            "level": "cpu",
            "pinned": "false",
        }
        for name in ("a,b", "shout")
    ]
    assert page.value("vllm:num_cpu_loaded_lora_adapters") == 1  # one content under two names
    assert page.value("loramux:adapters", state="ready") == 2
    assert page.value("loramux:adapter_loads_total", source="file", result="added") == 2
    for phase in ("resolve", "verify"):
        assert page.value("loramux:adapter_load_seconds_count", phase=phase) == 2
    assert page.value("loramux:adapter_resident_bytes", tier="host") > 0


def test_handlers_are_route_templates_and_never_what_a_client_sent(http: httpx.Client) -> None:
    http.get("/v1/models/some-name")
    http.get("/a/path/that/nobody/serves")
    http.request("BREW", "/v1/models")

    page = scrape(http)
    labels = page.labels("http_requests_total")
    assert {"handler": "/v1/models/{model_id:path}", "method": "GET", "status": "4xx"} in labels
    assert {"handler": "none", "method": "GET", "status": "4xx"} in labels
    assert {one["method"] for one in labels} <= {"GET", "POST", "other"}
    assert not [one for one in labels if one["handler"] in ("/metrics", "/health", "/ready")]
    assert "nobody" not in page.page


def test_many_adapter_names_share_the_series_of_a_few(http: httpx.Client) -> None:
    for model in ("shout", "a,b", "shout"):
        complete(http, prompt="x", model=model)

    labels = scrape(http).labels("loramux:adapter_requests_total")

    assert len(labels) == 2
    assert "other" in {one["adapter"] for one in labels}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics/anything"])
def test_every_path_below_metrics_is_the_page_without_a_redirect(http: httpx.Client, path: str) -> None:
    response = http.get(path)

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "vllm:num_requests_running" in response.text


def test_a_scrape_answers_while_the_engine_does_not(server: RunningServer, http: httpx.Client) -> None:
    response = ask_beside_a_stopped_engine(server, http, "/metrics")

    assert response.status_code == 200
    assert Scrape(response.text).value("loramux:engine_up") == 1


@pytest.mark.parametrize("path", ["/load", "/v1/lora_adapters"])
def test_facts_are_told_while_the_engine_says_nothing(
    server: RunningServer, http: httpx.Client, path: str
) -> None:
    assert ask_beside_a_stopped_engine(server, http, path).status_code == 200


def ask_beside_a_stopped_engine(server: RunningServer, http: httpx.Client, path: str) -> httpx.Response:
    os.kill(server.engine_pid(), signal.SIGSTOP)
    try:
        return http.get(path, timeout=10.0)
    finally:
        os.kill(server.engine_pid(), signal.SIGCONT)


def test_counters_outlive_the_engine(server: RunningServer, http: httpx.Client) -> None:
    complete(http, prompt="hello")
    before = scrape(http)

    os.kill(server.engine_pid(), signal.SIGKILL)
    after = scrape_until(
        http,
        lambda page: bool(page.value("loramux:engine_restarts_total") and page.value("loramux:engine_up")),
    )

    fallen = {
        (sample.name, *sample.labels.items()): sample.value
        for family in before.families.values()
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if after.value(sample.name, **sample.labels) < sample.value
    }
    assert fallen == {}
    assert complete(http, prompt="hello").status_code == 200


def test_the_page_has_no_fault_that_a_linter_would_find(http: httpx.Client) -> None:
    complete(http, prompt="hello")
    page = scrape(http)

    helped = re.findall(r"^# HELP (\S+) (.+)$", page.page, re.MULTILINE)
    typed = re.findall(r"^# TYPE (\S+) (\w+)$", page.page, re.MULTILINE)
    series = [line.rpartition(" ")[0] for line in page.page.splitlines() if not line.startswith("#")]
    assert [name for name, _ in helped] == [name for name, _ in typed]
    assert len({name for name, _ in typed}) == len(typed), "a family is there twice"
    assert len(set(series)) == len(series), "a series is there twice"
    for name, kind in typed:
        is_vllms = name == "vllm:iteration_tokens_total"  # a histogram, and vLLM's own name for it
        assert name.endswith("_total") == (kind == "counter" or is_vllms), name
        assert not re.search(r"_(milliseconds|ms|minutes|kilobytes|mb|percent)(_|$)", name), name
        if kind == "histogram":
            assert page.value(f"{name}_count") == page.value(f"{name}_bucket", le="+Inf"), name


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool (set PROMTOOL)")
def test_promtool_objects_to_nothing_but_vllms_names(http: httpx.Client) -> None:
    assert PROMTOOL is not None
    complete(http, prompt="hello")

    done = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=scrape(http).page,
        capture_output=True,
        text=True,
        check=False,
    )

    objections = [line for line in done.stderr.splitlines() if "should not contain ':'" not in line]
    assert objections == ['vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix']


def test_every_metric_is_explained(http: httpx.Client) -> None:
    typed = re.findall(r"^# TYPE (\S+)", scrape(http).page, re.MULTILINE)

    explained = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for name in typed if not re.search(rf"`{name}[`{{]", explained)] == []


def test_a_new_engine_adds_to_what_the_one_before_it_counted() -> None:
    metrics = EngineMetrics()
    step = Distribution([1, 2] + [0] * 12, 9.0)

    metrics.take(EngineStats(started_at=1.0, num_preemptions=3, prefix_cache_hits=10, step_tokens=step))
    metrics.take(EngineStats(started_at=1.0, num_preemptions=5, prefix_cache_hits=10, step_tokens=step))
    metrics.take(EngineStats(started_at=2.0, num_preemptions=1, prefix_cache_hits=4, step_tokens=step))

    assert metrics.num_preemptions == 6
    assert metrics.prefix_hits == 14
    assert metrics.step_tokens.counts[:2] == [2, 4]
    assert metrics.step_tokens.total == 18.0


class Uses:
    """Something that is counted."""

    def __init__(self) -> None:
        self.count = 0


def test_a_hundred_thousand_names_take_no_more_room_than_a_few() -> None:
    budget = LabelBudget(10, Uses, clock=lambda: 0.0)

    for number in range(100_000):
        budget.of(f"name-{number}").count += 1

    entries = dict(budget.items())
    assert len(entries) == 11
    assert sum(uses.count for uses in entries.values()) == 100_000
    assert len(budget.watched) <= 40


def test_a_name_that_becomes_busy_takes_the_place_of_an_idle_one() -> None:
    now_s = 0.0
    budget = LabelBudget(2, Uses, clock=lambda: now_s)
    for name in ("old", "busy", "busy", "busy", "busy"):
        budget.of(name)

    now_s = 600.0
    for _ in range(3):
        budget.of("new").count += 1

    assert {name for name, _ in budget.items()} == {"busy", "new", "other"}


def test_a_name_called_other_shares_the_series_of_the_rest() -> None:
    budget = LabelBudget(5, Uses, clock=lambda: 0.0)

    budget.of("other").count += 1

    assert [(name, uses.count) for name, uses in budget.items()] == [("other", 1)]
