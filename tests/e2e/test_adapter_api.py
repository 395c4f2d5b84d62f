"""Adapters that come and go on a real server with real weights: never the wrong ones, never a stall."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer, running_server
from tests.server.tiny_text import byte_tokenizer
from tests.tiny_models import make_adapter, make_tiny

PROMPT = "The quick brown fox jumps over the lazy dog, and then it does so again and again until it is tired."
ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters to copy from (`content-0`, ...), and room for folders that change."""
    folder = tmp_path_factory.mktemp("world")
    model = make_tiny("llama", folder / "model", vocab_size=260, max_position_embeddings=2048)
    byte_tokenizer().save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}")
    for number in range(4):
        targets = ALL_LAYERS if number % 2 else ["q_proj", "v_proj"]
        make_adapter(model, folder / f"content-{number}", r=4 + 4 * number, targets=targets, seed=number)
    return folder


def arguments(world: Path) -> list[str]:
    return [
        *(str(world / "model"), "--served-model-name=tiny", "--dtype=float32", "--kv-cache-bytes=64M"),
        *("--enable-lora", "--num-lanes=32", "--max-num-seqs=32", "--allow-runtime-lora-updating"),
        *(f"--allowed-local-path={world}", "--disable-uvicorn-access-log"),
    ]


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[RunningServer]:
    """A server whose adapters come and go; names under `world/named` resolve."""
    (world / "named").mkdir()
    environ = {"LORAMUX_LORA_RESOLVER_CACHE_DIR": str(world / "named")}
    with running_server(*arguments(world), environ=environ) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A client; what a test loaded goes with it."""
    with server.client() as client:
        yield client
        for name in client.get("/v1/loras").json()["loras"]:
            client.delete(f"/v1/loras/{name}")


def put_content(world: Path, folder: str, number: int) -> str:
    """Overwrite a folder's files with those of a content, in place; returns the folder's path."""
    target = world / folder
    target.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((world / f"content-{number}" / name).read_bytes())
    return str(target)


def load(http: httpx.Client, name: str, path: str, **fields: Any) -> None:
    body = {"lora_name": name, "lora_path": path, **fields}
    response = http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 200, response.text


def unload(http: httpx.Client, name: str) -> None:
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200


def request_body(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }


def ask(http: httpx.Client, name: str, **fields: Any) -> tuple[list[int], int, str]:
    """The answer's token ids, how many prompt tokens were cached, and who answered."""
    response = http.post("/v1/completions", json=request_body(name, **fields))
    assert response.status_code == 200, response.text
    body = response.json()
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return body["choices"][0]["token_ids"], cached, response.headers.get("x-loramux-adapter", "")


def stream_tokens(lines: Iterator[str]) -> Iterator[int]:
    """Token ids of a stream, as they come."""
    for line in lines:
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                yield from choice["token_ids"] or []


@pytest.fixture(scope="module")
def right_answers(server: RunningServer, world: Path) -> dict[int, list[int]]:
    """What each content answers when it is freshly loaded under a name of its own."""
    answers: dict[int, list[int]] = {}
    with server.client() as http:
        for number in range(4):
            load(http, f"fresh-{number}", str(world / f"content-{number}"))
            answers[number] = ask(http, f"fresh-{number}", max_tokens=400)[0]
            unload(http, f"fresh-{number}")
    assert len({tuple(answer[:24]) for answer in answers.values()}) == 4, "contents must differ"
    return answers


def test_a_reload_in_place_never_serves_old_weights_and_never_changes_a_running_stream(
    http: httpx.Client, world: Path, right_answers: dict[int, list[int]]
) -> None:
    path = put_content(world, "hot", 0)
    load(http, "hot", path)
    old, _, old_header = ask(http, "hot")
    assert ask(http, "hot")[1] >= 64, "the prompt is cached while the adapter stays the same"
    body = request_body("hot", stream=True, max_tokens=400)
    with http.stream("POST", "/v1/completions", json=body) as running:
        tokens = stream_tokens(running.iter_lines())
        first = next(tokens)

        put_content(world, "hot", 1)
        load(http, "hot", path, load_inplace=True)
        new, cached, new_header = ask(http, "hot")
        streamed = [first, *tokens]

    assert old == right_answers[0][:24]
    assert (new, cached) == (right_answers[1][:24], 0)
    assert old_header != new_header
    assert streamed == right_answers[0]


def test_files_that_change_without_a_reload_change_nothing(
    http: httpx.Client, world: Path, right_answers: dict[int, list[int]]
) -> None:
    path = put_content(world, "quiet", 2)
    load(http, "quiet", path)
    put_content(world, "quiet", 3)

    assert ask(http, "quiet")[0] == right_answers[2][:24]


def test_unload_overwrite_and_load_serves_the_new_weights(
    http: httpx.Client, world: Path, right_answers: dict[int, list[int]]
) -> None:
    path = put_content(world, "cold", 0)
    load(http, "cold", path)
    ask(http, "cold")
    unload(http, "cold")
    put_content(world, "cold", 3)
    load(http, "cold", path)

    assert ask(http, "cold")[:2] == (right_answers[3][:24], 0)


def test_unload_then_other_requests_and_the_memory_is_as_before(http: httpx.Client, world: Path) -> None:
    before = http.get("/load").json()
    path = put_content(world, "memory", 1)
    load(http, "memory", path)
    ask(http, "memory")
    during = http.get("/load").json()

    deleted = http.delete("/v1/lora_adapters/memory").json()

    after = http.get("/load").json()
    assert during["host_bytes"] > before["host_bytes"]
    assert deleted["state"] == "gone"
    assert deleted["freed"]["host_bytes"] == during["host_bytes"] - before["host_bytes"]
    assert deleted["freed"]["lanes"] == 8
    assert deleted["freed"]["kv_blocks"] > 0
    for key in ("host_bytes", "lanes_used", "device_adapters", "host_adapters"):
        assert after[key] == before[key], key


def test_two_names_with_one_content_cost_it_once(http: httpx.Client, world: Path) -> None:
    load(http, "one", put_content(world, "one", 1))
    single = http.get("/load").json()["host_bytes"]
    load(http, "two", put_content(world, "two", 1))

    tokens, cached, _ = ask(http, "one")
    assert http.get("/load").json()["host_bytes"] == single
    assert ask(http, "two")[:2] == (tokens, cached or 96)  # and they share what is cached
    unload(http, "one")
    assert ask(http, "two")[0] == tokens


def test_parallel_first_requests_resolve_and_load_once(
    server: RunningServer, http: httpx.Client, world: Path, right_answers: dict[int, list[int]]
) -> None:
    put_content(world, "named/late", 2)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda _: ask(http, "late"), range(12)))

    assert {tuple(tokens) for tokens, _, _ in answers} == {tuple(right_answers[2][:24])}
    assert {header.partition(" ")[0] for _, _, header in answers} == {"late@1"}
    found = [line for line in server.lines if "lora_filesystem_resolver found" in line and "'late'" in line]
    assert len(found) == 1


def churn(server: RunningServer, world: Path, seed: int, num_changes: int) -> None:
    """Load, replace, use and unload adapters at random, with valid and with broken files."""
    rng = random.Random(seed)
    with server.client() as http:
        for _ in range(num_changes):
            path = put_content(world, f"churn-{seed}", rng.randrange(4))
            name = f"churning-{rng.randrange(3)}"
            match rng.randrange(6):
                case 0 | 1 | 2:
                    http.put(f"/v1/lora_adapters/{name}", json={"source": path, "load_inplace": True})
                case 3:
                    http.delete(f"/v1/lora_adapters/{name}")
                case 4:
                    http.post("/v1/completions", json=request_body(name, max_tokens=2))
                case 5:
                    (world / f"churn-{seed}" / "adapter_model.safetensors").write_bytes(b"broken")
                    http.put(f"/v1/lora_adapters/{name}", json={"source": path, "load_inplace": True})


def test_streams_are_what_they_would_be_without_churn(
    server: RunningServer, world: Path, right_answers: dict[int, list[int]]
) -> None:
    contents = {f"steady-{number}": number for number in range(4)}

    def read(name: str) -> None:
        body = request_body(name, stream=True, max_tokens=400)
        with server.client() as http:
            for _ in range(1_000):
                with http.stream("POST", "/v1/completions", json=body) as response:
                    tokens = list(stream_tokens(response.iter_lines()))
                assert tokens == right_answers[contents[name]], name
                if all(task.done() for task in churning):
                    return

    with server.client() as http:
        for name, number in contents.items():
            load(http, name, str(world / f"content-{number}"))
    with ThreadPoolExecutor(20) as threads:
        churning = [threads.submit(churn, server, world, seed, 250) for seed in range(4)]
        streams = [threads.submit(read, name) for name in contents for _ in range(4)]
        for task in (*streams, *churning):
            task.result()

    with server.client() as http:
        for name in http.get("/v1/loras").json()["loras"]:
            http.delete(f"/v1/loras/{name}")
        after = http.get("/load").json()
    assert (after["host_adapters"], after["lanes_used"]) == ([], 0)
    assert list((server.store / "partial").iterdir()) == list((server.store / "trash").iterdir()) == []


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; the test's own time limit ends it."""
    for _ in range(3000):
        if condition():
            return
    pytest.fail("it never came true")


def test_the_journal_brings_adapters_back_after_a_kill(
    world: Path, tmp_path: Path, right_answers: dict[int, list[int]]
) -> None:
    store, state = tmp_path / "store", tmp_path / "state"
    flags = [*arguments(world), f"--state-dir={state}", f"--adapter-store-dir={store}"]
    flags += ["--lora-modules", f"static={world / 'content-0'}", f"doomed={world / 'content-0'}"]
    config = (world / "content-2" / "adapter_config.json").read_text().replace("\n", " ")
    weights = (world / "content-2" / "adapter_model.safetensors").read_bytes()
    upload = {"content-type": "application/x-safetensors", "x-loramux-adapter-config": config}
    with running_server(*flags) as first, first.client() as http:
        load(http, "org/x y", put_content(world, "journaled", 1), pinned=True)
        load(http, "static", str(world / "content-3"), load_inplace=True)
        assert http.put("/v1/lora_adapters/up", content=weights, headers=upload).status_code == 201
        assert http.put("/v1/lora_adapters/up", content=weights, headers=upload).status_code == 200
        unload(http, "doomed")
        before = {view["name"]: view for view in http.get("/v1/lora_adapters").json()["data"]}
        first.process.send_signal(signal.SIGKILL)
        first.wait_ended()

    with running_server(*flags) as second, second.client() as http:
        until(lambda: http.get("/ready").status_code == 200)
        assert ask(http, "org/x y")[0] == right_answers[1][:24]
        assert ask(http, "static")[0] == right_answers[3][:24]
        assert ask(http, "up")[0] == right_answers[2][:24]
        assert http.post("/v1/completions", json=request_body("doomed")).status_code == 404
        after = {view["name"]: view for view in http.get("/v1/lora_adapters").json()["data"]}

    same = ("version", "digest", "source", "pinned", "origin")
    assert after.keys() == before.keys() == {"org/x y", "static", "up"}
    for name, view in before.items():
        assert [after[name][key] for key in same] == [view[key] for key in same]
    assert (after["org/x y"]["pinned"], after["up"]["source"]) == (True, "upload")
    assert sorted(path.name for path in state.iterdir()) == ["adapters.json", "lock", "uploads"]


def test_ready_names_the_pinned_adapter_that_is_missing(world: Path, tmp_path: Path) -> None:
    flags = [*arguments(world), f"--state-dir={tmp_path}", "--lora-modules-strict"]
    path = put_content(world, "vanishing", 1)
    with running_server(*flags) as first, first.client() as http:
        load(http, "gone", path, pinned=True)
    shutil.rmtree(path)

    with running_server(*flags) as second, second.client() as http:
        until(lambda: http.get("/v1/lora_adapters/gone").json()["state"] == "failed")
        ready = http.get("/ready")
        answered = http.post("/v1/completions", json=request_body("gone"))
        http.delete("/v1/lora_adapters/gone")
        ready_again = http.get("/ready")

    assert ready.status_code == 503
    assert "pinned adapter 'gone'" in ready.json()["reasons"][0]
    assert "No adapter found" in ready.json()["reasons"][0]
    assert answered.status_code == 404
    assert ready_again.status_code == 200


def test_the_adapters_file_is_followed(
    world: Path, tmp_path: Path, right_answers: dict[int, list[int]]
) -> None:
    file = tmp_path / "adapters.yaml"
    contents = {name: put_content(world, f"desired-{name}", number) for name, number in (("a", 0), ("b", 1))}

    def write(**adapters: str) -> None:
        entries = [{"name": name, "source": path, "pinned": True} for name, path in adapters.items()]
        scratch = tmp_path / "scratch"
        scratch.write_text(json.dumps({"adapters": entries}))
        scratch.rename(file)

    def desired(http: httpx.Client) -> dict[str, Any]:
        report: dict[str, Any] = http.get("/v1/lora_adapters").json()["desired"]
        return report

    write(a=contents["a"])
    flags = [*arguments(world), f"--adapters-file={file}", "--adapters-file-interval=0.05"]
    with running_server(*flags) as running, running.client() as http:
        until(lambda: http.get("/ready").status_code == 200)
        assert ask(http, "a")[0] == right_answers[0][:24]

        write(b=contents["b"], c=str(world / "nowhere"))
        until(lambda: set(http.get("/v1/loras").json()["loras"]) == {"b"})
        until(
            lambda: any(
                one["name"] == "c" and "No adapter" in one["problem"] for one in desired(http)["drift"]
            )
        )
        assert ask(http, "b")[0] == right_answers[1][:24]

        unload(http, "b")
        assert {"name": "b", "problem": "unloaded by a client"} in desired(http)["drift"]
        assert desired(http)["in_sync"] is False

        file.write_text("adapters: [")
        until(lambda: desired(http)["error"] is not None)
        write(a=contents["b"])
        until(lambda: desired(http)["in_sync"])
        assert ask(http, "a")[0] == right_answers[1][:24]


def test_a_bad_adapter_at_the_start_stops_it_only_if_that_is_asked_for(world: Path) -> None:
    modules = ["--lora-modules", f"good={world / 'content-0'}", f"bad={world / 'nowhere'}"]

    strict = RunningServer([*arguments(world), *modules])
    code = strict.wait_ended()
    modules.append("--no-lora-modules-strict")
    with running_server(*arguments(world), *modules) as lenient, lenient.client() as http:
        views = {view["name"]: view["state"] for view in http.get("/v1/lora_adapters").json()["data"]}
        models = [card["id"] for card in http.get("/v1/models").json()["data"]]

    assert code == 1
    assert "adapter 'bad'" in strict.lines[-1]
    assert views == {"bad": "failed", "good": "ready"}
    assert models == ["tiny", "good"]
