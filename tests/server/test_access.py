"""Who may do what: a server with a keys file, over real sockets."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapter_files import llama_sites, write_adapter
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND
from tests.server.key_files import bearer, key_entry, write_keys

ALL = ("inference", "adapters:read", "adapters:write", "admin")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of two teams."""
    folder = tmp_path_factory.mktemp("sources")
    for team in ("red", "blue"):
        write_adapter(folder / team / "one", llama_sites(), seed=len(team))
    return folder


@pytest.fixture(scope="module")
def guarded(
    text_model: Path, adapter_folder: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Adapters `shout` and `red/base`; keys by what they may do, and `flag-key` with all rights."""
    keys = write_keys(
        tmp_path_factory.mktemp("keys") / "keys.json",
        key_entry("boss", *ALL),
        key_entry("user", "inference"),
        key_entry("reader", "adapters:read"),
        key_entry("narrow", "inference", limits={"max_requests": 1}),
        key_entry("red", *ALL[:3], adapters=["red/*"], sources=[f"file://{sources}/red/*"]),
    )
    wanted = keys.with_name("adapters.yaml")
    wanted.write_text(f"adapters: [{{name: wanted, source: {sources}/nowhere, pinned: true}}]")
    with running_server(
        *(str(text_model), "--served-model-name=tiny", "--enable-lora", "--allow-runtime-lora-updating"),
        f"--adapters-file={wanted}",
        *("--lora-modules", f"shout={adapter_folder}", f"red/base={adapter_folder}"),
        *(f"--allowed-local-path={sources}", f"--api-keys-file={keys}", "--host=127.0.0.1"),
        *("--root-path=/llm", '--allowed-origins=["http://page"]'),
        command=COMMAND,
        environ={"VLLM_API_KEY": "flag-key"},
    ) as server:
        yield server


@pytest.fixture
def http(guarded: RunningServer) -> Iterator[httpx.Client]:
    with guarded.client() as client:
        yield client


def ids(response: httpx.Response) -> list[str]:
    return [card["id"] for card in response.json()["data"]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong",
        "Basic Zmxhzy1rZXk=",
        "flag-key",
        "Bearer flag-key2",
        "Bearer FLAG-KEY",
        "Bearer flag-key, Bearer flag-key",
    ],
)
def test_wrong_key_is_a_401(http: httpx.Client, header: str) -> None:
    response = http.get("/v1/models", headers={"authorization": header} if header else {})

    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert "flag-key" not in response.text


def test_two_keys_in_one_request_are_none(http: httpx.Client) -> None:
    headers = [("authorization", "Bearer flag-key"), ("authorization", "Bearer wrong")]

    assert http.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("header", ["Bearer flag-key", "bearer flag-key", "BEARER   flag-key"])
def test_key_of_the_environment_has_all_rights(http: httpx.Client, header: str) -> None:
    for path in ("/v1/models", "/v1/lora_adapters", "/load", "/openapi.json"):
        assert http.get(path, headers={"authorization": header}).status_code == 200, path


def test_key_without_the_scope_is_a_403_that_names_it(http: httpx.Client) -> None:
    response = http.get("/load", headers=bearer("user"))

    assert response.status_code == 403
    error = error_of(response)
    assert error["code"] == "insufficient_permissions"
    assert "'admin'" in error["message"]
    assert "www-authenticate" not in response.headers
    inference = http.post("/v1/completions", json={"prompt": "a"}, headers=bearer("reader"))
    assert inference.status_code == 403
    assert http.post("/v1/completions", json={"prompt": "a"}, headers=bearer("user")).status_code == 200
    assert http.get("/v1/lora_adapters", headers=bearer("reader")).status_code == 200
    assert http.delete("/v1/lora_adapters/shout", headers=bearer("reader")).status_code == 403


def test_refusal_comes_before_the_body(guarded: RunningServer) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        "content-length: 1000000\r\nexpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())

        first = connection.recv(4096)

    assert first.startswith(b"HTTP/1.1 401 ")  # and no "100 Continue"


def test_adapter_outside_the_globs_looks_like_one_that_does_not_exist(http: httpx.Client) -> None:
    answers = []
    for name in ("shout", "shou?"):  # one exists
        for path, extra in (("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            response = http.post(path, json={"model": name, **extra}, headers=bearer("red"))
            answers.append((response.status_code, response.text.replace(name, "NAME")))
        response = http.get(f"/v1/lora_adapters/{name}".replace("?", "%3F"), headers=bearer("red"))
        answers.append((response.status_code, response.text.replace(name, "NAME")))
        response = http.get(f"/v1/models/{name}".replace("?", "%3F"), headers=bearer("red"))
        answers.append((response.status_code, response.text.replace(name, "NAME")))

    assert {status for status, _ in answers} == {404}
    assert answers[:4] == answers[4:]
    body = {"model": "red/base", "prompt": "a"}
    assert http.post("/v1/completions", json=body, headers=bearer("red")).json()["choices"][0]["text"] == "A"
    assert http.post("/v1/completions", json={"prompt": "a"}, headers=bearer("red")).status_code == 200


def test_lists_show_what_the_key_may_use(http: httpx.Client) -> None:
    assert ids(http.get("/v1/models", headers=bearer("boss"))) == ["tiny", "red/base", "shout"]
    assert ids(http.get("/v1/models", headers=bearer("red"))) == ["tiny", "red/base"]
    rows = http.get("/v1/lora_adapters", headers=bearer("red")).json()["data"]
    assert [row["name"] for row in rows] == ["red/base"]
    assert list(http.get("/v1/loras", headers=bearer("red")).json()["loras"]) == ["red/base"]


def test_what_is_missing_is_named_to_those_who_may_know_it(http: httpx.Client) -> None:
    answers = [http.get("/ready", headers=headers) for headers in ({}, bearer("red"), bearer("boss"))]

    assert {answer.status_code for answer in answers} == {503}
    outside, other, boss = (answer.json()["reasons"] for answer in answers)
    assert outside == other == ["1 pinned adapters are not loaded"]
    assert boss[0].startswith("pinned adapter 'wanted': ")
    rows = [http.get("/v1/lora_adapters", headers=bearer(key)).json() for key in ("red", "boss")]
    assert rows[0]["desired"] is None
    assert rows[1]["desired"]["drift"][0]["name"] == "wanted"


CHANGES = [
    ("PUT", "/v1/lora_adapters/{name}", {"source": "{source}"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "{name}", "lora_path": "{source}"}),
    ("POST", "/v1/loras", {"lora_name": "{name}", "source": {"uri": "file://{source}"}}),
    ("POST", "/adapters", {"name": "{name}", "src": "{source}"}),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_changes_need_the_name_and_the_source(
    http: httpx.Client, sources: Path, method: str, path: str, body: dict[str, Any]
) -> None:
    def change(name: str, source: str) -> httpx.Response:
        text = json.dumps(body).replace("{name}", name).replace("{source}", source)
        headers = {**bearer("red"), "content-type": "application/json"}
        return http.request(method, path.replace("{name}", name), content=text, headers=headers)

    own, other = str(sources / "red" / "one"), str(sources / "blue" / "one")

    for name, source in (("blue/x", own), ("red/x", other), ("red/x", f"{sources}/red/../blue/one")):
        response = change(name, source)
        assert response.status_code in (400, 403), response.text
        assert response.status_code == 403 or ".." in source
    assert change("red/x", own).status_code in (200, 201)
    assert http.delete("/v1/lora_adapters/red/x", headers=bearer("red")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/lora_adapters/{}", "/v1/loras/{}", "/adapters/{}"])
@pytest.mark.parametrize("name", ["shout", "nobody"])
def test_removal_outside_the_globs_is_refused_whether_the_name_exists_or_not(
    http: httpx.Client, path: str, name: str
) -> None:
    response = http.delete(path.format(name), headers=bearer("red"))

    assert response.status_code == 403
    assert error_of(response)["code"] == "insufficient_permissions"


def test_upload_needs_the_source_upload(http: httpx.Client, sources: Path) -> None:
    headers = {**bearer("red"), "content-type": "application/x-safetensors", "x-loramux-adapter-config": "{}"}

    response = http.put("/v1/lora_adapters/red/up", content=b"x" * 100, headers=headers)

    assert response.status_code == 403
    assert "upload" in error_of(response)["message"]


def test_events_are_those_of_the_keys_adapters(guarded: RunningServer, sources: Path) -> None:
    source = {"source": str(sources / "blue" / "one")}
    with (
        guarded.client() as http,
        guarded.client() as other,
        http.stream("GET", "/v1/lora_adapters/events", headers=bearer("red")) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == ": connected"
        for name in ("blue/secret", "red/seen"):
            other.put(f"/v1/lora_adapters/{name}", json=source, headers=bearer("boss")).raise_for_status()

        first = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))

        for name in ("blue/secret", "red/seen"):
            other.delete(f"/v1/lora_adapters/{name}", headers=bearer("boss")).raise_for_status()
    assert first["name"] == "red/seen"


def test_callers_with_several_keys_never_share_a_salt(http: httpx.Client) -> None:
    def salt(key: str, **fields: str) -> str:
        body = {"prompt": "!salt", **fields}
        text: str = http.post("/v1/completions", json=body, headers=bearer(key)).json()["choices"][0]["text"]
        return text

    plain = http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "!salt"}]},
        headers=bearer("user"),
    ).json()["choices"][0]["message"]["content"]

    assert len({salt("user"), salt("boss"), salt("user", cache_salt="x"), salt("boss", cache_salt="x")}) == 4
    assert salt("user") == plain == repr("id:user\x1f")


def test_limit_of_a_key_is_its_own(http: httpx.Client) -> None:
    slow = {"prompt": "!slow", "max_tokens": 400, "ignore_eos": True, "stream": True}

    def ask(key: str) -> httpx.Response:
        return http.post("/v1/completions", json={"prompt": "a"}, headers=bearer(key))

    with http.stream("POST", "/v1/completions", json=slow, headers=bearer("narrow")) as response:
        lines = response.iter_lines()  # held: httpx closes the stream of an iterator that is collected
        next(lines)
        refused, other = ask("narrow"), ask("user")

    assert (refused.status_code, other.status_code) == (429, 200)
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    assert any(ask("narrow").status_code == 200 for _ in range(2000))


def test_server_without_keys_passes_the_requests_salt_on(fake_server: RunningServer) -> None:
    with fake_server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "!salt", "cache_salt": "mine"}).json()

    assert answer["choices"][0]["text"] == "'mine'"


def test_hangup_reads_the_keys_again(text_model: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.json", key_entry("old", *ALL))
    audit = tmp_path / "audit.jsonl"
    arguments = (str(text_model), f"--api-keys-file={keys}", f"--audit-log={audit}", "--host=127.0.0.1")
    with running_server(*arguments, command=COMMAND) as server, server.client() as http:
        assert http.get("/v1/models", headers=bearer("old")).status_code == 200

        keys.write_text("keys: []")
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("the keys stay as they are")
        assert http.get("/v1/models", headers=bearer("old")).status_code == 200

        write_keys(keys, key_entry("new", *ALL))
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("--api-keys-file: 1 keys")
        assert http.get("/v1/models", headers=bearer("old")).status_code == 401
        assert http.get("/v1/models", headers=bearer("new")).status_code == 200
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    reloads = [(line["result"], line["num_keys"]) for line in lines if line["action"] == "keys.reload"]
    assert reloads == [("error", 1), ("ok", 1)]


def test_hangup_during_the_start_counts(text_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(text_model, tmp_path / "model"))
    (model / "hold").touch()
    keys = write_keys(tmp_path / "keys.yaml", key_entry("old", "inference"))
    server = RunningServer([str(model), f"--api-keys-file={keys}"], command=COMMAND)
    server.wait_line("loading model")

    write_keys(keys, key_entry("new", "inference"))
    server.process.send_signal(signal.SIGHUP)
    (model / "hold").unlink()
    server.wait_ready()

    with server.client() as http:
        statuses = [http.get("/v1/models", headers=bearer(key)).status_code for key in ("old", "new")]
    assert server.stop() == 0
    assert statuses == [401, 200]


def test_wrong_keys_file_stops_the_start(text_model: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.json", {**key_entry("a", "inference"), "adaptors": []})
    server = RunningServer([str(text_model), f"--api-keys-file={keys}"], command=COMMAND)

    assert server.wait_ended() != 0
    assert "did you mean 'adapters'" in server.stderr
    assert "Traceback" not in server.stderr
