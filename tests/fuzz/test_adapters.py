from __future__ import annotations

from pathlib import Path

from tests.fuzz.adapters import Fuzzer


def test_mutated_adapters_are_refused_and_nothing_else(tmp_path: Path) -> None:
    fuzzer = Fuzzer(seed=0, root=tmp_path)

    for _ in range(400):
        fuzzer.one()

    assert fuzzer.outcomes["AdapterIncompatible"] > 200
