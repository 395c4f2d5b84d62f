"""The audit log: one line for each change and each refusal, whatever happens to the file."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux.engine.errors import InvalidConfig
from loramux.server.access.audit import Actor, AuditLog, set_actor
from loramux.server.adapter_orders import AdapterChange
from loramux.server.errors import AuthFailed
from tests.adapter_files import CONFIG_FILE, WEIGHTS_FILE, llama_sites, write_adapter
from tests.running_server import running_server
from tests.server.fake_serve import COMMAND
from tests.server.key_files import bearer, key_entry, key_of, write_keys


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(name: str, **fields: Any) -> AdapterChange:
    return AdapterChange(action="load", name=name, origin="api", duration_s=0.5, **fields)


def test_every_change_and_every_refusal_is_a_line(text_model: Path, tmp_path: Path) -> None:
    path, source = tmp_path / "audit.jsonl", tmp_path / "sources"
    for number in (1, 2):
        write_adapter(source / f"v{number}", llama_sites(), seed=number)
    keys = write_keys(
        tmp_path / "keys.json",
        key_entry("boss", "inference", "adapters:read", "adapters:write"),
        key_entry("user", "inference", adapters=["none"]),
    )
    with (
        running_server(
            *(str(text_model), "--served-model-name=tiny", "--enable-lora", "--allow-runtime-lora-updating"),
            *(f"--lora-modules=first={source / 'v1'}", f"--allowed-local-path={source}"),
            *(f"--audit-log={path}", f"--api-keys-file={keys}", "--host=127.0.0.1"),
            command=COMMAND,
        ) as server,
        server.client() as http,
    ):
        ask(http, source)

    lines = read(path)
    shown = [
        (line["action"], line.get("key_id"), line.get("name"), line["result"], line.get("code"))
        for line in lines
    ]
    assert shown == [
        ("adapter.load", None, "first", "ok", None),
        ("adapter.load", "boss", "a b", "ok", None),
        ("adapter.reload", "boss", "a b", "ok", None),
        ("adapter.pin", "boss", "a b", "ok", None),
        ("adapter.load", "boss", "bad", "error", "adapter_not_found"),
        ("adapter.unload", "boss", "a b", "ok", None),
        ("adapter.unload", "boss", "a b", "error", "adapter_not_found"),
        ("adapter.load", "boss", "up", "ok", None),
        ("denied", None, None, "denied", "invalid_api_key"),
        ("denied", "user", None, "denied", "insufficient_permissions"),
        ("denied", "user", "first", "denied", "model_not_found"),
    ]
    first, loaded, reloaded, *_ = lines
    assert (first["origin"], loaded["origin"]) == ("flag", "api")
    assert loaded["request_id"] == "audit-1"
    assert loaded["client"] == "127.0.0.1"
    assert loaded["source"] == "v1"
    assert loaded["version_after"] == 1
    assert (reloaded["version_before"], reloaded["version_after"]) == (1, 2)
    assert len(reloaded["digest"]) == 64
    assert reloaded["bytes"] > 0
    assert 0 < reloaded["duration_s"] < 60
    assert lines[7]["source"] == "upload"
    assert lines[8]["path"] == "/v1/models"
    assert lines[8]["client"] == "192.0.2.7"  # as a proxy on this machine says
    text = path.read_text()
    assert not any(secret in text for secret in (key_of("boss"), key_of("user"), "guess", "sesame"))
    assert path.stat().st_mode & 0o077 == 0


def ask(http: httpx.Client, source: Path) -> None:
    """What the lines above tell of."""
    boss, user = bearer("boss"), bearer("user")
    place = "/v1/lora_adapters/a%20b"
    body = {"source": str(source / "v1")}
    http.put(place, json=body, headers={**boss, "x-request-id": "audit-1"}).raise_for_status()
    http.put(place, json={"source": str(source / "v2"), "load_inplace": True}, headers=boss)
    http.put(place, json={"source": str(source / "v2"), "pinned": True}, headers=boss).raise_for_status()
    assert http.put("/v1/lora_adapters/bad", json={"source": str(source / "no")}, headers=boss).is_error
    http.delete(place, headers=boss).raise_for_status()
    assert http.delete(place, headers=boss).status_code == 404
    config = {"x-loramux-adapter-config": (source / "v1" / CONFIG_FILE).read_text()}
    upload = {**boss, **config, "content-type": "application/x-safetensors"}
    weights = (source / "v1" / WEIGHTS_FILE).read_bytes()
    http.put("/v1/lora_adapters/up", content=weights, headers=upload).raise_for_status()
    guess = {"authorization": "Bearer guess", "x-forwarded-for": "192.0.2.7"}
    assert http.get("/v1/models?key=guess", headers=guess).status_code == 401
    assert http.get("/v1/lora_adapters", headers=user).status_code == 403
    prompt = {"model": "first", "prompt": "sesame"}
    assert http.post("/v1/completions", json=prompt, headers=user).status_code == 404


def test_refusal_of_changes_that_the_operator_did_not_allow_is_a_line(
    text_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    arguments = (str(text_model), "--enable-lora", f"--audit-log={path}", "--forwarded-allow-ips=192.0.2.1")
    liar = {"x-forwarded-for": "192.0.2.7"}
    with running_server(*arguments, command=COMMAND) as server, server.client() as http:
        assert http.delete("/v1/lora_adapters/x", headers=liar).status_code == 404

    (line,) = read(path)
    assert (line["action"], line["code"]) == ("denied", "runtime_lora_updates_disabled")
    assert (line["method"], line["path"]) == ("DELETE", "/v1/lora_adapters/x")
    assert line["client"] == "127.0.0.1"  # which is no proxy that we believe


def test_log_that_was_rotated_away_is_opened_again(tmp_path: Path) -> None:
    path, rotated = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = AuditLog(path)
    for number in range(3):
        log.changed(change(f"a{number}"))
        log.flush()
        if number == 0:
            os.rename(path, rotated)
        elif number == 1:
            path.unlink()
    log.close()

    assert [line["name"] for line in read(rotated)] == ["a0"]
    assert [line["name"] for line in read(path)] == ["a2"]


def test_log_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in range(2):
        log = AuditLog(path)
        log.changed(change(f"a{number}"))
        log.close()

    assert [line["name"] for line in read(path)] == ["a0", "a1"]


def test_names_cannot_break_lines_or_terminals(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.changed(change('a\n{"action": "forged"}\x1b[2J\u202e' + "x" * 10_000))
    log.close()

    (line,) = read(path)
    assert line["name"].startswith('a\\n{"action": "forged"}\\x1b[2J\\u202exx')
    assert len(line["name"]) <= 512


def test_flood_of_refusals_is_bounded_and_counted_and_loses_no_change(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    os.mkfifo(path)  # a disk that takes nothing until somebody reads
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(path, max_queued=10)
    set_actor(Actor(key_id="k"))
    num_denied = 5_000
    for _ in range(num_denied):
        log.denied(AuthFailed("no"), method="GET", path="/" + "x" * 400)
    log.changed(change("kept"))
    os.set_blocking(reader, True)
    received: list[bytes] = []
    drain = threading.Thread(target=lambda: received.extend(iter(lambda: os.read(reader, 1 << 16), b"")))
    drain.start()
    log.close()
    drain.join()
    os.close(reader)

    lines = [json.loads(line) for line in b"".join(received).splitlines()]
    num_lost = [line["num_lost"] for line in lines if line["action"] == "lost"]  # told as the disk takes it
    written = [line for line in lines if line["action"] == "denied"]
    assert sum(num_lost) + len(written) == num_denied
    assert all(num > 0 for num in num_lost)
    assert sum(num_lost) > num_denied // 2
    assert lines[-1]["name"] == "kept"


def test_log_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"--audit-log /proc/none/a"):
        AuditLog(Path("/proc/none/a"))


def test_disk_that_fails_is_told_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(Path("/dev/full"))
    for number in range(3):
        log.changed(change(f"a{number}"))
        log.flush()
    log.close()

    assert caplog.text.count("lines are lost") == 1


def test_what_resolvers_and_the_adapters_file_bring_is_a_line_too(text_model: Path, tmp_path: Path) -> None:
    path, resolved, desired = tmp_path / "audit.jsonl", tmp_path / "resolved", tmp_path / "adapters.yaml"
    write_adapter(resolved / "found", llama_sites(), base_model_name_or_path=str(text_model))
    write_adapter(tmp_path / "listed", llama_sites())
    desired.write_text(f"adapters: [{{name: listed, source: {tmp_path / 'listed'}, pinned: true}}]")
    keys = write_keys(
        tmp_path / "keys.json",
        key_entry("boss", "inference"),
        key_entry("other", "inference", adapters=["nothing"]),
    )
    with (
        running_server(
            *(str(text_model), "--served-model-name=tiny", "--enable-lora", "--allow-runtime-lora-updating"),
            *(f"--adapters-file={desired}", f"--allowed-local-path={tmp_path}"),
            *(f"--audit-log={path}", f"--api-keys-file={keys}", "--host=127.0.0.1"),
            command=COMMAND,
            environ={"VLLM_LORA_RESOLVER_CACHE_DIR": str(resolved)},
        ) as server,
        server.client() as http,
    ):
        for key, status in (("other", 404), ("boss", 200), ("other", 404)):
            body = {"model": "found", "prompt": "a"}
            assert http.post("/v1/completions", json=body, headers=bearer(key)).status_code == status
        assert any(http.get("/ready").status_code == 200 for _ in range(2000))  # what the file lists is there
        body = {"model": "unknown", "prompt": "a"}
        assert http.post("/v1/completions", json=body, headers=bearer("boss")).status_code == 404

    lines = [line for line in read(path) if line["action"] != "adapter.load"]
    assert [(line["action"], line["key_id"], line["name"]) for line in lines] == [
        ("denied", "other", "found"),  # and no resolver heard of it
        ("adapter.resolve", "boss", "found"),
        ("denied", "other", "found"),
    ]
    (listed,) = [line for line in read(path) if line["action"] == "adapter.load"]
    assert (listed["name"], listed["origin"], listed["pinned"]) == ("listed", "file", True)
    assert "key_id" not in listed
