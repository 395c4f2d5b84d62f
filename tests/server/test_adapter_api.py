"""The adapter routes over HTTP: shapes, statuses, texts; ours, vLLM's, Dynamo's and SageMaker's."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    llama_sites,
    peft_config,
    write_adapter,
    write_folder,
)
from tests.resolvers.bad_adapters import ALL, GOOD, SITES, Bad
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND
from tests.server.scrapes import scrape

NAMES = ["plain", "org/name", "a:b", "with space", "v1.2", "ü/ö:x y", "events/2", "Events", "100%", "q?a#b"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where adapters of this module lie."""
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def updatable(text_model: Path, roots: Path) -> Iterator[RunningServer]:
    """A server whose adapters clients may change; names under `roots/named` resolve."""
    (roots / "named").mkdir()
    with running_server(
        *(str(text_model), "--served-model-name", "tiny", "alias", "--enable-lora", "--max-lora-rank=64"),
        *("--allow-runtime-lora-updating", f"--allowed-local-path={roots}", "--sse-keep-alive-interval=0.2"),
        command=COMMAND,
        environ={"VLLM_LORA_RESOLVER_CACHE_DIR": str(roots / "named")},
    ) as server:
        yield server


@pytest.fixture
def http(updatable: RunningServer) -> Iterator[httpx.Client]:
    """A client; what a test loaded goes with it."""
    with updatable.client() as client:
        yield client
        for adapter in client.get("/v1/lora_adapters").json()["data"]:
            client.delete(f"/v1/lora_adapters/{quote(adapter['name'], safe='')}")


@pytest.fixture
def folder(roots: Path) -> Path:
    """An adapter of the test's own."""
    return write_adapter(roots / f"adapter-{len(list(roots.iterdir()))}", llama_sites())


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, after a check of its shape: on routes that change adapters twice, else once."""
    body = response.json()
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    is_twofold = "completions" not in response.request.url.path
    assert body == ({"error": error, **error} if is_twofold else {"error": error}), body
    return error


def answer(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "abc"})


# vLLM's routes


def test_vllm_load_and_unload_with_its_texts(http: httpx.Client, folder: Path) -> None:
    body = {"lora_name": "a", "lora_path": str(folder), "base_model_name": "alias", "unknown": 1}

    loaded = http.post("/v1/load_lora_adapter", json=body)
    again = http.post("/v1/load_lora_adapter", json=body)
    in_place = http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})
    cards = http.get("/v1/models").json()["data"]
    answered = answer(http, "a")
    unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": "a", "lora_int_id": None})
    missing = http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})

    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'a' added successfully.")
    assert again.status_code == 400
    assert error_of(again)["type"] == "InvalidUserInput"
    assert "has already been loaded" in error_of(again)["message"]
    assert in_place.status_code == 200
    assert [(card["id"], card["root"], card["parent"]) for card in cards[2:]] == [("a", folder.name, "alias")]
    assert answered.json()["choices"][0]["text"] == "ABC"
    assert (unloaded.status_code, unloaded.text) == (
        200,
        "Success: LoRA adapter 'a' removed successfully.",
    )
    assert (missing.status_code, error_of(missing)["type"]) == (404, "NotFoundError")
    assert "The lora adapter 'a' cannot be found." in error_of(missing)["message"]
    assert answer(http, "a").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "kind", "fragment"),
    [
        ({"lora_name": "a"}, 400, "invalid_request_error", "lora_path"),
        ({"lora_name": 5, "lora_path": "/x"}, 400, "invalid_request_error", "lora_name"),
        ({"lora_name": "", "lora_path": "/x"}, 400, "InvalidUserInput", "must be provided"),
        ({"lora_name": "a", "lora_path": ""}, 400, "InvalidUserInput", "must be provided"),
        ({"lora_name": "tiny", "lora_path": "/x"}, 400, "InvalidUserInput", "conflicts with a served base"),
        ({"lora_name": "a/../b", "lora_path": "/x"}, 400, "InvalidUserInput", "'..'"),
        ({"lora_name": "a", "lora_path": "/etc"}, 400, "invalid_request_error", "--allowed-local-path"),
        ({"lora_name": "a", "lora_path": "ftp://x/y"}, 400, "invalid_request_error", "unknown scheme"),
        ({"lora_name": "a", "lora_path": "{roots}/none"}, 404, "NotFoundError", "No adapter found for"),
    ],
)
def test_loads_that_are_refused(
    http: httpx.Client, roots: Path, body: dict[str, Any], status: int, kind: str, fragment: str
) -> None:
    body = {
        key: value.replace("{roots}", str(roots)) if isinstance(value, str) else value
        for key, value in body.items()
    }

    response = http.post("/v1/load_lora_adapter", json=body)

    assert (response.status_code, error_of(response)["type"]) == (status, kind)
    assert fragment in error_of(response)["message"]
    assert len(http.get("/v1/models").json()["data"]) == 2


@pytest.mark.parametrize("bad", [bad for bad in ALL if bad.sites is SITES], ids=lambda bad: bad.name)
def test_a_bad_adapter_gets_one_error_and_the_server_goes_on(
    http: httpx.Client, tmp_path_factory: pytest.TempPathFactory, roots: Path, bad: Bad
) -> None:
    folder = roots / f"bad-{tmp_path_factory.mktemp('bad').name}"
    folder.mkdir()
    bad.make(folder)

    response = http.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(folder)})

    assert response.status_code in (400, 404), response.text
    assert error_of(response)["code"] in ("adapter_incompatible", "adapter_not_found")
    assert http.get("/v1/models").json()["data"][-1]["id"] == "alias"
    assert http.get("/health").status_code == 200


def test_a_rank_above_the_limit_names_limit_and_flag(http: httpx.Client, roots: Path) -> None:
    folder = write_adapter(roots / "rank-100", llama_sites(), rank=100)

    response = http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": str(folder)})

    error = error_of(response)
    assert "LoRA rank 100 is greater than max_lora_rank 64" in error["message"]
    assert "--max-lora-rank" in error["message"]


# Ours


@pytest.mark.parametrize("name", NAMES)
def test_every_name_works_in_every_route(http: httpx.Client, folder: Path, name: str) -> None:
    path = f"/v1/lora_adapters/{quote(name, safe='')}"

    created = http.put(path, json={"source": str(folder)})
    shown = http.get(path)
    model = http.get(f"/v1/models/{quote(name, safe='')}")
    answered = answer(http, name)
    listed = http.get("/v1/lora_adapters").json()["data"]
    deleted = http.delete(path)

    assert created.status_code == 201, created.text
    assert shown.json()["name"] == model.json()["id"] == name
    assert [one["name"] for one in listed] == [name]
    assert answered.json()["model"] == name
    header = answered.headers["x-loramux-adapter"]
    assert header.endswith(f"@{shown.json()['version']} sha256:{shown.json()['digest']}")
    assert deleted.json()["deleted"] is True
    assert http.get(path).status_code == 404


def test_slashes_of_a_name_need_not_be_encoded(http: httpx.Client, folder: Path) -> None:
    assert http.put("/v1/lora_adapters/org/team/x", json={"source": str(folder)}).status_code == 201
    assert http.get("/v1/lora_adapters/org%2Fteam%2Fx").json()["name"] == "org/team/x"


def test_put_is_idempotent_and_says_what_it_did(http: httpx.Client, roots: Path, folder: Path) -> None:
    other = write_adapter(roots / "other", llama_sites(), seed=9)

    first = http.put("/v1/lora_adapters/idempotent", json={"source": str(folder)})
    second = http.put("/v1/lora_adapters/idempotent", json={"source": str(folder)})
    digest = first.json()["adapter"]["digest"]
    by_digest = http.put(
        "/v1/lora_adapters/idempotent", json={"source": "s3://not/asked", "digest": f"sha256:{digest}"}
    )
    conflict = http.put("/v1/lora_adapters/idempotent", json={"source": str(other)})
    after = http.get("/v1/lora_adapters/idempotent").json()
    replaced = http.put("/v1/lora_adapters/idempotent", json={"source": str(other), "load_inplace": True})

    assert (first.status_code, first.json()["outcome"]) == (201, "added")
    assert (second.status_code, second.json()["outcome"]) == (200, "unchanged")
    assert (by_digest.status_code, by_digest.json()["outcome"]) == (200, "unchanged")
    assert (conflict.status_code, error_of(conflict)["code"]) == (409, "adapter_conflict")
    assert conflict.headers["x-should-retry"] == "false"
    assert (after["state"], after["version"], after["error"]) == ("ready", 1, None)
    assert (replaced.status_code, replaced.json()["outcome"]) == (200, "replaced")
    assert replaced.json()["adapter"]["version"] == 2


def test_the_view_of_an_adapter_is_complete(http: httpx.Client, folder: Path) -> None:
    http.put("/v1/lora_adapters/a", json={"source": str(folder), "pinned": True})
    answer(http, "a")

    view = http.get("/v1/lora_adapters/a").json()

    assert view["state"] == "ready"
    assert view["source"] == folder.name
    assert (view["rank"], view["num_modules"], view["modules"]) == (4, 4, ["q_proj", "v_proj"])
    assert view["bytes"] > 0
    assert (view["tier"], view["pinned"], view["leases"]) == ("host", True, 0)
    assert view["last_used"] >= view["loaded_at"] >= view["created"]
    assert view["trained_on"] == "tiny"
    assert (view["error"], view["update"], view["draining"]) == (None, None, [])


def test_pinning_can_change_without_a_new_version(http: httpx.Client, folder: Path) -> None:
    http.put("/v1/lora_adapters/pinned", json={"source": str(folder)})

    pinned = http.put("/v1/lora_adapters/pinned", json={"source": str(folder), "pinned": True}).json()

    assert (pinned["outcome"], pinned["adapter"]["pinned"]) == ("unchanged", True)
    assert pinned["adapter"]["version"] == 1


def test_a_failure_is_shown_until_a_load_ends_well(http: httpx.Client, roots: Path) -> None:
    folder = write_adapter(roots / "late", llama_sites(), rank=99)
    assert http.put("/v1/lora_adapters/late", json={"source": str(folder)}).status_code == 400

    failed = http.get("/v1/lora_adapters/late").json()
    write_adapter(folder, llama_sites())
    http.put("/v1/lora_adapters/late", json={"source": str(folder)})

    assert (failed["state"], failed["error"]["code"]) == ("failed", "adapter_incompatible")
    assert "99" in failed["error"]["message"]
    assert http.get("/v1/lora_adapters/late").json()["error"] is None


def test_delete_says_what_it_freed(http: httpx.Client, roots: Path, folder: Path) -> None:
    http.put("/v1/lora_adapters/a", json={"source": str(folder)})
    http.put("/v1/lora_adapters/b", json={"source": str(folder)})
    nbytes = http.get("/v1/lora_adapters/a").json()["bytes"]

    first = http.delete("/v1/lora_adapters/a").json()
    second = http.delete("/v1/lora_adapters/b").json()

    assert (first["freed"], first["shared_with"]) == (None, ["b"])
    assert (second["state"], second["leases"], second["freed"]["host_bytes"]) == ("gone", 0, nbytes)
    missing = http.delete("/v1/lora_adapters/b")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "adapter_not_found")


def test_delete_waits_for_running_requests_if_asked_to(http: httpx.Client, folder: Path) -> None:
    http.put("/v1/lora_adapters/a", json={"source": str(folder)})
    slow = {"model": "a", "prompt": "!slow", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=slow) as stream:
        lines = stream.iter_lines()
        next(lines)

        at_once = http.delete("/v1/lora_adapters/a")
        view = http.get("/v1/lora_adapters/a").json()
        refused = answer(http, "a")
        rest = [line for line in lines if line]

    assert (at_once.status_code, at_once.json()["state"], at_once.json()["leases"]) == (202, "draining", 1)
    assert (view["state"], view["draining"][0]["leases"]) == ("draining", 1)
    assert refused.status_code == 404
    assert rest[-1] == "data: [DONE]"

    http.put("/v1/lora_adapters/a", json={"source": str(folder)})
    with http.stream("POST", "/v1/completions", json=slow) as stream:
        lines = stream.iter_lines()
        next(lines)
        reading = threading.Thread(target=lambda: list(lines))
        reading.start()
        waited = http.delete("/v1/lora_adapters/a?drain_timeout_s=30")
        reading.join()
    assert (waited.status_code, waited.json()["leases"]) == (200, 0)
    assert waited.json()["freed"]["host_bytes"] > 0


def test_dry_run_explains_and_loads_nothing(http: httpx.Client, roots: Path, folder: Path) -> None:
    wrong = write_folder(roots / "wrong", peft_config(r=100), GOOD)

    good = http.put("/v1/lora_adapters/a?dry_run=true", json={"source": str(folder)})
    bad = http.put("/v1/lora_adapters/a?dry_run=true", json={"source": str(wrong)})

    report = good.json()["report"]
    assert good.status_code == bad.status_code == 200
    assert report["can_be_served"] is True
    assert (report["rank"], report["lanes"], report["num_tensors"], report["num_unmatched"]) == (4, 8, 8, 0)
    assert bad.json()["report"]["can_be_served"] is False
    assert "--max-lora-rank" in bad.json()["report"]["problem"]
    assert http.get("/v1/lora_adapters").json()["data"] == []


@pytest.mark.parametrize("is_encoded", [False, True])
def test_an_adapter_can_be_uploaded(http: httpx.Client, folder: Path, is_encoded: bool) -> None:
    config = (folder / CONFIG_FILE).read_text()
    header = base64.b64encode(config.encode()).decode() if is_encoded else config
    headers = {"content-type": "application/x-safetensors", "x-loramux-adapter-config": header}
    weights = (folder / WEIGHTS_FILE).read_bytes()

    uploaded = http.put("/v1/lora_adapters/up?pinned=true", content=weights, headers=headers)
    again = http.put("/v1/lora_adapters/up", content=weights, headers=headers)
    same = http.put("/v1/lora_adapters/local", json={"source": str(folder)})

    view = uploaded.json()["adapter"]
    assert uploaded.status_code == 201, uploaded.text
    assert (view["source"], view["pinned"]) == ("upload", True)
    assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
    assert same.json()["adapter"]["digest"] == view["digest"]
    assert answer(http, "up").json()["choices"][0]["text"] == "ABC"


def test_uploads_that_are_refused(http: httpx.Client, folder: Path, updatable: RunningServer) -> None:
    config = (folder / CONFIG_FILE).read_text()
    kind = {"content-type": "application/x-safetensors"}
    weights = (folder / WEIGHTS_FILE).read_bytes()

    without = http.put("/v1/lora_adapters/up", content=weights, headers=kind)
    wrong = http.put(
        "/v1/lora_adapters/up", content=weights, headers={**kind, "x-loramux-adapter-config": "!!"}
    )
    cut = http.put(
        "/v1/lora_adapters/up", content=weights[:-9], headers={**kind, "x-loramux-adapter-config": config}
    )

    for response in (without, wrong):
        assert (response.status_code, error_of(response)["param"]) == (400, "x-loramux-adapter-config")
    assert (cut.status_code, error_of(cut)["code"]) == (400, "adapter_incompatible")
    assert list(updatable.store.glob("uploads/*/*")) == []


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/v1/load_lora_adapter", {"lora_name": "events", "lora_path": "{}"}, "lora_name"),
        ("PUT", "/v1/lora_adapters/events", {"source": "{}"}, "name"),
        ("PUT", "/v1/lora_adapters/events?dry_run=true", {"source": "{}"}, "name"),
        ("PUT", "/v1/lora_adapters/%65vents", None, "name"),
        ("POST", "/v1/loras", {"lora_name": "events", "source": {"uri": "{}"}}, "lora_name"),
        ("POST", "/adapters", {"name": "events", "src": "{}"}, "name"),
    ],
)
def test_no_adapter_takes_the_name_of_the_event_stream(
    http: httpx.Client, folder: Path, method: str, path: str, body: dict[str, Any] | None, param: str
) -> None:
    content = json.dumps(body).replace("{}", str(folder)) if body else b"\0" * 64
    kind = "application/json" if body else "application/x-safetensors"

    refused = http.request(method, path, content=content, headers={"content-type": kind})

    assert refused.status_code == 400
    assert (error_of(refused)["code"], error_of(refused)["param"]) == ("invalid_adapter_name", param)
    assert "'events' is reserved: GET /v1/lora_adapters/events is the stream" in error_of(refused)["message"]
    assert http.get("/v1/lora_adapters").json()["data"] == []
    with http.stream("GET", "/v1/lora_adapters/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert next(stream.iter_lines()) == ": connected"


def test_events_tell_of_every_change(http: httpx.Client, updatable: RunningServer, folder: Path) -> None:
    with updatable.client() as other, other.stream("GET", "/v1/lora_adapters/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert next(lines) == ": connected"

        http.put("/v1/lora_adapters/a", json={"source": str(folder)})
        http.put("/v1/lora_adapters/b", json={"source": str(folder.parent / "none")})
        http.delete("/v1/lora_adapters/a")

        events: list[dict[str, Any]] = []
        while not events or events[-1]["state"] != "gone":
            line = next(lines)
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))

    states = [event["state"] for event in events if event["name"] == "a"]
    assert (states[0], states[-2:]) == ("resolving", ["ready", "gone"])
    failed = next(event for event in events if event["name"] == "b" and event["state"] == "failed")
    assert failed["error"]["code"] == "adapter_not_found"
    assert events[-1]["freed"]["host_bytes"] > 0
    assert [event["id"] for event in events] == sorted(event["id"] for event in events)


# Resolving on first use


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_unknown_name_is_resolved_loaded_and_answered(
    http: httpx.Client, roots: Path, is_stream: bool
) -> None:
    name = f"found-{is_stream}"
    write_adapter(roots / "named" / name, llama_sites())

    response = http.post("/v1/completions", json={"model": name, "prompt": "abc", "stream": is_stream})
    unknown = http.post("/v1/completions", json={"model": "nobody", "prompt": "abc", "stream": is_stream})

    assert response.status_code == 200
    assert "ABC"[0] in response.text
    assert response.headers["x-loramux-adapter"].startswith(f"{name}@1 ")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "model_not_found")
    assert http.get(f"/v1/lora_adapters/{name}").json()["origin"] == "resolver"
    assert http.get("/v1/models").json()["data"][-1]["id"] == name


def test_a_found_adapter_that_cannot_be_served_is_an_error_before_the_first_byte(
    http: httpx.Client, roots: Path
) -> None:
    write_adapter(roots / "named" / "big", llama_sites(), rank=100)

    for is_stream in (False, True):
        response = http.post("/v1/completions", json={"model": "big", "prompt": "abc", "stream": is_stream})
        assert (response.status_code, error_of(response)["code"]) == (400, "adapter_incompatible")
    assert len(http.get("/v1/models").json()["data"]) == 2


# Other systems


def test_errors_name_the_field_that_the_route_has(http: httpx.Client, roots: Path, folder: Path) -> None:
    missing = str(roots / "missing")
    dynamo = http.post("/v1/loras", json={"lora_name": "d", "source": {"uri": missing}})
    sagemaker = http.post("/adapters", json={"name": "s", "src": missing})
    once = http.post("/adapters", json={"name": "s", "src": str(folder)})
    twice = http.post("/adapters", json={"name": "s", "src": str(folder)})
    gone = [http.delete("/adapters/gone"), http.delete("/v1/lora_adapters/gone")]

    assert error_of(dynamo)["param"] == "source.uri"
    assert error_of(sagemaker)["param"] == "src"
    assert (once.status_code, error_of(twice)["param"]) == (200, "name")
    assert [error_of(answer)["param"] for answer in gone] == ["name", "name"]


def test_an_unload_that_has_nothing_to_do_is_no_error(http: httpx.Client) -> None:
    before = scrape(http)

    deleted = http.delete("/v1/loras/nobody")

    code = "adapter_not_found"
    gained = scrape(http).value("loramux:request_errors_total", code=code)
    assert deleted.status_code == 200
    assert gained == before.value("loramux:request_errors_total", code=code)


def test_dynamo_calls(http: httpx.Client, roots: Path, folder: Path) -> None:
    other = write_adapter(roots / "dynamo", llama_sites(), seed=4)
    body = {"lora_name": "org/x", "source": {"uri": f"file://{folder}"}}

    loaded = http.post("/v1/loras", json=body)
    again = http.post("/v1/loras", json=body)
    swapped = http.post("/v1/loras", json={**body, "source": {"uri": f"file://{other}"}})
    listed = http.get("/v1/loras").json()
    deleted = [http.delete("/v1/loras/org/x") for _ in range(2)]

    assert (loaded.status_code, loaded.json()["status"], loaded.json()["lora_name"]) == (
        200,
        "success",
        "org/x",
    )
    assert again.json()["lora_id"] == loaded.json()["lora_id"]
    assert swapped.json()["hot_swap"] is True
    assert listed == {"status": "success", "loras": {"org/x": loaded.json()["lora_id"]}, "count": 1}
    assert [response.status_code for response in deleted] == [200, 200]
    assert http.get("/v1/loras").json()["count"] == 0


def test_sagemaker_calls(http: httpx.Client, folder: Path) -> None:
    loaded = http.post("/adapters", json={"name": "sm", "src": str(folder), "preload": True, "pin": True})
    deleted = http.delete("/adapters/sm")

    assert (loaded.status_code, loaded.text) == (200, "Adapter sm registered")
    assert (deleted.status_code, deleted.text) == (200, "Adapter sm unregistered")
    assert http.delete("/adapters/sm").status_code == 404
    assert http.get("/adapters").status_code == 405


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("PUT", "/v1/lora_adapters/a"),
        ("DELETE", "/v1/lora_adapters/a"),
        ("POST", "/v1/loras"),
        ("DELETE", "/v1/loras/a"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/a"),
    ],
)
def test_changes_are_off_unless_the_operator_allows_them(
    fake_server: RunningServer, method: str, path: str
) -> None:
    with fake_server.client() as client:
        response = client.request(method, path, content=b"not even JSON")

    assert (response.status_code, error_of(response)["code"]) == (404, "runtime_lora_updates_disabled")
    assert "LORAMUX_ALLOW_RUNTIME_LORA_UPDATING" in error_of(response)["message"]


def test_reading_is_always_allowed(fake_server: RunningServer) -> None:
    with fake_server.client() as client:
        listed = client.get("/v1/lora_adapters").json()["data"]
        assert [(view["name"], view["origin"]) for view in listed] == [
            ("org/loud one:v1", "flag"),
            ("shout", "flag"),
        ]
        assert client.get("/v1/loras").json()["count"] == 2


def test_the_variable_of_vllm_allows_changes_too(text_model: Path, folder: Path) -> None:
    with (
        running_server(
            *(str(text_model), "--enable-lora", f"--allowed-local-path={folder}"),
            command=COMMAND,
            environ={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        ) as server,
        server.client() as client,
    ):
        assert client.put("/v1/lora_adapters/a", json={"source": str(folder)}).status_code == 201


@pytest.mark.parametrize("name", ["/", "a/", "a//"])
def test_no_name_ends_with_a_slash_and_an_encoded_slash_is_no_path(
    http: httpx.Client, folder: Path, name: str
) -> None:
    http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": str(folder)}).raise_for_status()

    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
    deleted = http.delete(f"/v1/lora_adapters/{quote(name, safe='')}")
    seen = http.get(f"/v1/models/{quote(name, safe='')}")

    assert (loaded.status_code, loaded.json()["error"]["code"]) == (400, "invalid_adapter_name")
    assert (deleted.status_code, seen.status_code) == (404, 404)
    assert http.get("/v1/models/a").status_code == 200
