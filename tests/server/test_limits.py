"""The limits page, the flags behind it, and bodies that are too deep or hold too much."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import pytest

from loramux.engine.config import EngineConfig
from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.server import flags
from loramux.server.admission_config import AdmissionConfig, ConnectionConfig, flag_name
from loramux.server.config import read_config
from loramux.server.errors import ERRORS
from loramux.server.json_shape import check_shape
from loramux.server.limits import Limits, check_field_sizes
from tests.running_server import ROOT


class Row(NamedTuple):
    """One limit on the page."""

    flag: str
    default: str
    status: str
    code: str


_ROW: Final = re.compile(r"^\|[^|]+\| `(--[a-z0-9-]+)` \| (\S+) \| (\S+) \| (\S+) \|$", re.MULTILINE)


def rows() -> list[Row]:
    """The page's tables."""
    page = (ROOT / "docs" / "limits.md").read_text()
    return [Row(flag, default, status, code.strip("`")) for flag, default, status, code in _ROW.findall(page)]


def defaults() -> dict[str, int | float]:
    """Flag -> default of everything that is a limit."""
    found: dict[str, int | float] = {}
    for spec in fields(Limits):
        assert spec.default is not MISSING
        found[f"--max-{spec.name.replace('_', '-')}"] = spec.default
    for cls in (AdmissionConfig, ConnectionConfig):
        for spec in fields(cls):
            assert spec.default is not MISSING
            found[flag_name(spec.name)] = spec.default
    found["--grammar-compile-timeout"] = EngineConfig(model="x").grammar_compile_timeout_s
    return found


def test_page_lists_every_limit_once_with_its_default() -> None:
    listed = [(row.flag, row.default) for row in rows()]

    assert sorted(listed) == sorted((flag, str(default)) for flag, default in defaults().items())


def test_every_status_on_the_page_is_one_that_the_server_gives() -> None:
    given = {(str(entry.status), entry.code) for entry in ERRORS.values()} | {("–", "–")}

    assert {(row.status, row.code) for row in rows()} <= given


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.flag)
def test_flag_of_every_limit_sets_it(row: Row, tmp_path: Path) -> None:
    config = read_config([str(tmp_path), f"{row.flag}=7"], {})

    field = row.flag.removeprefix("--").replace("-", "_")
    server = config.server
    places = (server.limits, server.admission, server.connections, config.engine)
    names = (field, f"{field}_s", field.removeprefix("max_"))
    found = [getattr(place, name) for place in places for name in names if hasattr(place, name)]
    assert found == [7]
    assert row.flag.removeprefix("--") in {flag.name for flag in flags.all_flags().values()}


@pytest.mark.parametrize(
    "word",
    [
        *("--max-num-queued-reqs=0", "--max-queue-wait=-1", "--max-key-requests=-1", "--max-n=-1"),
        *("--max-connections=0", "--stream-write-timeout=0", "--request-read-timeout=nan"),
        *("--request-header-timeout=inf",),
    ],
)
def test_limit_that_makes_no_sense_stops_the_start(word: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=word.partition("=")[0]):
        read_config([str(tmp_path), word], {})


def test_names_of_vllm_set_the_header_limits(tmp_path: Path) -> None:
    words = ["--h11-max-incomplete-event-size=9000", "--h11-max-header-count", "9"]
    config = read_config([str(tmp_path), *words], {})

    assert config.warnings == ()
    assert config.server.connections.max_header_bytes == 9000
    assert config.server.connections.max_header_count == 9


LIMITS: Final = Limits(json_depth=4, json_values=1000)


@pytest.mark.parametrize(
    "value",
    [
        [[[[1]]]],
        {"a": [{"b": []}]},
        {"text": "[[[[[[[[{{{{{{"},
        {"text": '"[[[[[[[[{{{{{{\\"'},
        {"text": "\\" * 9 + "[" * 9},
        {"text": "," * 5000},
        {"text": '"' * 5000},
        list(range(900)),
        ["a"] * 200,
        [[]] * 50,
    ],
    ids=range(10),
)
def test_body_below_the_limits_of_shape_passes(value: object) -> None:
    check_shape(msgspec.json.encode(value), LIMITS)
    check_shape(msgspec.json.format(msgspec.json.encode(value), indent=2), LIMITS)


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        ([[[[[1]]]]], "--max-json-depth"),
        ({"a": {"b": {"c": {"d": {}}}}}, "--max-json-depth"),
        ([1, {"a": [2, {"b": [3]}]}], "--max-json-depth"),
        (["[", "[[", [[[["}"]]]]], "--max-json-depth"),
        ([1] * 1100, "--max-json-values"),
        (["a"] * 300, "--max-json-values"),
        ([[]] * 70, "--max-json-values"),
        ({str(i): i for i in range(300)}, "--max-json-values"),
        ({"text": '\\"' * 10, "a": [1] * 1100}, "--max-json-values"),
    ],
    ids=range(9),
)
def test_body_over_a_limit_of_shape_is_refused(value: object, flag: str) -> None:
    for text in (msgspec.json.encode(value), msgspec.json.format(msgspec.json.encode(value), indent=2)):
        with pytest.raises(InvalidRequest, match=flag):
            check_shape(text, LIMITS)


@pytest.mark.parametrize("text", [b"]]]]]]", b"[[[[[[[", b'"', b'{"a": "', b'\\"\\', b"[}[}[}[}[}[}", b""])
def test_text_that_is_no_json_is_left_to_the_parser(text: bytes) -> None:
    check_shape(text, LIMITS)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop": ["a"] * 5}, "stop"),
        ({"messages": [{}] * 2049}, "messages"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"prompt": [1] * ((1 << 20) + 1)}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": [[1]] * 1025}, "prompt"),
    ],
    ids=range(6),
)
def test_long_lists_are_refused_before_their_items_are_looked_at(body: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_field_sizes(body, Limits())

    assert caught.value.param == param
