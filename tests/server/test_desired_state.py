"""The adapters file and the journal, as files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loramux.engine.errors import AdapterUnavailable, InvalidConfig
from loramux.server.desired_state import DesiredAdapter, read_desired
from loramux.server.journal import Journal, JournalEntry

GOOD = """
adapters:
  - name: sql
    source: hf://org/sql-lora@main
    pinned: true
  - {name: "org/x y", source: /adapters/x}
"""


def test_entries_are_read(tmp_path: Path) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(GOOD)

    assert read_desired(file, ["base"]) == [
        DesiredAdapter(name="sql", source="hf://org/sql-lora@main", pinned=True),
        DesiredAdapter(name="org/x y", source="/adapters/x"),
    ]
    file.write_text("")
    assert read_desired(file, ["base"]) == []


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("adapters: [", "adapters.yaml"),
        ("adapters: 5", "array"),
        ("- a", "object"),
        ("adapters: [{name: a}]", "source"),
        ("adapters: [{name: a, source: /a, pined: true}]", "pined"),
        ("adapters: [{name: events, source: /a}]", "'events' is reserved"),
        ("adapters: [{name: base, source: /a}]", "conflicts with a served base model"),
        ("adapters: [{name: a, source: /a}, {name: a, source: /b}]", "stands there twice"),
        ("adapters: [{name: a, source: 'ftp://x'}]", "unknown scheme"),
        ("adapters: [{name: a, source: /a, digest: 5}]", "digest"),
        ("\x00", "adapters.yaml"),
    ],
)
def test_a_wrong_file_is_refused_and_says_why(tmp_path: Path, text: str, fragment: str) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(text)

    with pytest.raises(InvalidConfig, match="--adapters-file") as caught:
        read_desired(file, ["base"])
    assert fragment in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="none"):
        read_desired(tmp_path / "none", [])


def entry(name: str, version: int = 1) -> JournalEntry:
    return JournalEntry(name=name, source=f"hf://org/{name}", digest="0" * 64, version=version)


def test_the_journal_is_read_back(tmp_path: Path) -> None:
    async def write() -> None:
        journal = Journal.open(tmp_path / "state")
        await asyncio.gather(*(journal.record(entry(f"a{number}")) for number in range(50)))
        await journal.record(entry("a1", version=2))
        await journal.forget("a2")
        await journal.forget("static", remember_removal=True)
        journal.close()

    asyncio.run(write())
    journal = Journal.open(tmp_path / "state")

    assert len(journal.entries) == 49
    assert journal.entries["a1"].version == 2
    assert journal.removed == {"static"}
    journal.close()


def test_two_servers_cannot_share_a_journal(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)

    with pytest.raises(InvalidConfig, match="in use by another server"):
        Journal.open(tmp_path)

    journal.close()
    Journal.open(tmp_path).close()


@pytest.mark.parametrize("text", ["", "{", '{"adapters": 5}', '{"format": 99}'])
def test_a_journal_that_cannot_be_read_is_never_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapters.json").write_text(text)

    with pytest.raises(InvalidConfig, match=str(tmp_path)):
        Journal.open(tmp_path)

    assert (tmp_path / "adapters.json").read_text() == text


def test_what_a_crash_cut_off_is_removed_and_the_journal_is_the_old_one(tmp_path: Path) -> None:
    async def write() -> None:
        journal = Journal.open(tmp_path)
        await journal.record(entry("a"))
        journal.close()

    asyncio.run(write())
    (tmp_path / "adapters.json.0123").write_text('{"adapters": [')

    journal = Journal.open(tmp_path)

    assert list(journal.entries) == ["a"]
    assert not (tmp_path / "adapters.json.0123").exists()
    journal.close()


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    async def write() -> None:
        journal = Journal.open(tmp_path / "state")
        (tmp_path / "state").rename(tmp_path / "elsewhere")
        with pytest.raises(AdapterUnavailable, match="--state-dir"):
            await journal.record(entry("a"))
        journal.close()

    asyncio.run(write())
