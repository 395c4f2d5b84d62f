"""Keys and their file: what an entry may say, how a key is found, what a reload does."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest

from loramux.engine.errors import InvalidConfig
from loramux.server.access import key_command
from loramux.server.access.caller import ANYONE, NOBODY
from loramux.server.access.keys import KeyRing, read_keys
from tests.server.key_files import key_entry, key_of, write_keys

GOOD = key_entry("team-a", "inference")


def test_file_may_be_yaml(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"keys:\n  - id: ci\n    sha256: sha256:{'AB' * 32}\n    scopes: [adapters:write]\n"
        "    sources: ['hf://team/*']\n    limits: {max_requests: 3}\n"
    )

    (entry,) = read_keys(path)

    assert (entry.id, entry.sha256, entry.scopes) == ("ci", "ab" * 32, ("adapters:write",))
    caller = entry.caller(is_only_key=True)
    assert (caller.max_requests, caller.max_tokens) == (3, None)
    assert caller.may_load("hf://team/sql@main")
    assert not caller.may_load("hf://other/sql")


@pytest.mark.parametrize(
    ("entry", "fragments"),
    [
        ({**GOOD, "adaptors": ["x"]}, ["unknown field 'adaptors'", "did you mean 'adapters'"]),
        ({**GOOD, "key": "lmx-plain"}, ["'key'", "sha256 instead"]),
        ({**GOOD, "scopes": ["inferences"]}, ["team-a", "'inferences'", "did you mean 'inference'"]),
        ({**GOOD, "scopes": []}, ["at least one scope"]),
        ({**GOOD, "sha256": "lmx-plain"}, ["64 hex digits"]),
        ({**GOOD, "id": "api-key-1"}, ["id must be"]),
        ({**GOOD, "id": "a\nb"}, ["id must be"]),
        ({**GOOD, "limits": {"max_request": 1}}, ["unknown field 'max_request'", "'max_requests'"]),
        ({**GOOD, "limits": {"max_requests": 0}}, ["max_requests must be at least 1"]),
        ({**GOOD, "limits": {"max_tokens": "many"}}, ["int"]),
        ({**GOOD, "adapters": "*"}, ["array"]),
        ({"id": "x", "sha256": "a" * 64}, ["scopes"]),
        ("text", ["must be a mapping"]),
    ],
)
def test_wrong_entry_is_refused_by_name_and_its_values_are_not_shown(
    tmp_path: Path, entry: Any, fragments: list[str]
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read_keys(write_keys(tmp_path / "keys", entry))

    assert caught.value.message.startswith(f"--api-keys-file {tmp_path / 'keys'}")
    assert "lmx-plain" not in caught.value.message
    for fragment in fragments:
        assert fragment in caught.value.message


@pytest.mark.parametrize(
    "content", ["", "keys: []", "[1]", "keys: {a: 1}", "a: [", "keys: [1]\nsecret: lmx-plain"]
)
def test_file_without_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)

    with pytest.raises(InvalidConfig) as caught:
        read_keys(path)

    assert "lmx-plain" not in caught.value.message


def test_ids_and_keys_stand_there_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="twice"):
        read_keys(write_keys(tmp_path / "a", GOOD, key_entry("team-a", "admin")))
    with pytest.raises(InvalidConfig, match="'team-a' and 'other' are the same key"):
        read_keys(write_keys(tmp_path / "b", GOOD, {**GOOD, "id": "other"}))
    with pytest.raises(InvalidConfig, match="'api-key-1' and 'team-a' are the same key"):
        KeyRing([key_of("team-a")], read_keys(write_keys(tmp_path / "c", GOOD)))


def test_file_that_everybody_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_keys(tmp_path / "keys", GOOD)
    path.chmod(0o644)

    read_keys(path)

    assert "chmod 600" in caplog.text


def test_key_is_found_among_all_of_them(tmp_path: Path) -> None:
    entries = read_keys(write_keys(tmp_path / "keys", GOOD, key_entry("b", "admin", cache_salt="tenant")))
    ring = KeyRing(["plain-1", "plain-2"], entries)

    callers = [ring.find(key.encode()) for key in ("plain-1", "plain-2", key_of("team-a"), key_of("b"))]

    assert [caller and caller.key_id for caller in callers] == ["api-key-1", "api-key-2", "team-a", "b"]
    assert callers[2] is not None
    assert callers[2].scopes == {"inference"}
    salts = [caller.cache_salt for caller in callers if caller]
    assert salts == ["id:api-key-1", "id:api-key-2", "id:team-a", "salt:tenant"]
    for wrong in (b"", b"plain", b"plain-1 ", b"PLAIN-1", b"\xff\xfe", key_of("c").encode()):
        assert ring.find(wrong) is None


def test_only_key_of_a_server_has_no_salt(tmp_path: Path) -> None:
    alone = KeyRing(["plain"], []).find(b"plain")

    assert alone is not None
    assert alone.salted("of the request") == "of the request"
    assert ANYONE.salted("") == ""


def test_salts_of_key_and_request_cannot_be_mixed_up(tmp_path: Path) -> None:
    one, two = KeyRing(["a", "b"], []).find(b"a"), KeyRing(["a", "b"], []).find(b"b")

    assert one is not None
    assert two is not None
    assert len({one.salted("x"), two.salted("x"), one.salted(""), two.salted(""), NOBODY.salted("x")}) == 5


def test_without_keys_everybody_is_anyone() -> None:
    assert KeyRing([], []).find(b"whatever") is ANYONE


def test_keys_are_compared_in_constant_time_without_an_early_end() -> None:
    """The comparison itself cannot be timed well enough here, so its form is checked."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(KeyRing.find)))
    (loop,) = (node for node in ast.walk(tree) if isinstance(node, ast.For))
    inside = list(ast.walk(loop))

    assert ast.unparse(loop.iter) == "self._callers"
    assert not any(isinstance(node, ast.Return | ast.Break | ast.Continue | ast.Raise) for node in inside)
    calls = [ast.unparse(node.func) for node in inside if isinstance(node, ast.Call)]
    assert calls == ["hmac.compare_digest"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_reload_takes_new_keys_and_keeps_the_old_ones_when_the_file_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_keys(tmp_path / "keys", GOOD)
    ring = KeyRing([], read_keys(path), path)
    write_keys(path, key_entry("new", "admin"))

    await ring.reload()

    assert ring.find(key_of("team-a").encode()) is None
    assert ring.find(key_of("new").encode()) is not None
    for wrong in ("keys: []", "keys:\n  - {id: x}", "{"):
        path.write_text(wrong)
        with caplog.at_level(logging.ERROR):
            await ring.reload()
        assert ring.find(key_of("new").encode()) is not None
        assert "the keys stay as they are" in caplog.text
        caplog.clear()
    path.unlink()
    await ring.reload()
    assert ring.find(key_of("new").encode()) is not None


def test_command_makes_a_key_and_the_entry_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = key_command.main(["new", "--id", "team-a", "--scopes", "inference", "admin", "--adapters", "a/*"])

    key, _, entry = capsys.readouterr().out.partition("\n")
    path = tmp_path / "keys"
    path.write_text(f"keys:\n{entry}")
    caller = KeyRing([], read_keys(path)).find(key.encode())
    assert code == 0
    assert caller is not None
    assert (caller.key_id, caller.scopes, caller.adapters) == (
        "team-a",
        frozenset({"inference", "admin"}),
        ("a/*",),
    )
    assert len(key) >= 43


def test_command_refuses_an_entry_that_the_server_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert key_command.main(["new", "--id", "a b"]) == 2
    assert "id must be" in capsys.readouterr().err


def test_command_hashes_a_key_that_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("short-key\n"))

    assert key_command.main(["hash", "--id", "mine"]) == 0

    output = capsys.readouterr()
    assert hashlib.sha256(b"short-key").hexdigest() in output.out
    assert "short-key" not in output.out + output.err
    assert "can be guessed" in output.err
