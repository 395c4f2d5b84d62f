"""The adapter table: names, and what they stand for."""

from __future__ import annotations

import pytest

from loramux.engine.errors import InvalidRequest, ModelNotFound
from loramux.engine.types import AdapterSpec
from loramux.server.adapter_names import AdapterNameRefused, require_model
from loramux.server.adapters import AdapterTable, answer_headers, fingerprint

SPEC = AdapterSpec(digest="ab" * 32, path="/p", rank=8, nbytes=10, files=[], modules=[])


def table() -> AdapterTable:
    filled = AdapterTable(["base", "alias"])
    filled.publish("b", SPEC, source="b")
    filled.publish("a", SPEC, source="a", base_model_name="alias")
    return filled


def test_lookup_tells_base_adapter_and_nothing_apart() -> None:
    adapters = table()

    assert [adapters.lookup(name) for name in ("base", "alias", None, "")] == [None] * 4
    ref = adapters.lookup("a")
    assert ref is not None
    assert (ref.digest, ref.version, ref.parent) == (SPEC.digest, 1, "alias")
    with pytest.raises(ModelNotFound, match=r"The model `A` does not exist\. Valid aliases: base, alias\."):
        adapters.lookup("A")


def test_adapters_are_listed_by_name() -> None:
    assert [ref.name for ref in table().all()] == ["a", "b"]


@pytest.mark.parametrize("name", ["", "base", "x/../y", "..", "a\tb", "a\x7f", "x" * 257])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(AdapterNameRefused):
        table().publish(name, SPEC, source="x")


@pytest.mark.parametrize("name", ["org/name", "a:b", "with space", "ü", "A", "...", "x" * 256])
def test_unusual_names_are_taken(name: str) -> None:
    adapters = table()

    assert adapters.publish(name, SPEC, source="x") == adapters.lookup(name)


def test_header_names_version_and_digest_in_plain_characters() -> None:
    adapters = table()
    ref = adapters.publish("grün a", SPEC, source="x")

    header = answer_headers(ref)["x-loramux-adapter"]

    assert header == f"gr%C3%BCn%20a@1 sha256:{SPEC.digest}"
    assert header.isascii()
    assert answer_headers(None) == {}
    assert SPEC.digest[:16] in fingerprint(ref)


def test_name_that_no_table_can_hold_is_refused_before_the_lookup() -> None:
    with pytest.raises(InvalidRequest, match="256"):
        require_model("x" * 257)
