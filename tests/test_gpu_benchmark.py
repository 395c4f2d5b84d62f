"""benchmarks/gpu_engine.py works from end to end, so that no minute on a GPU is lost to it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def goals() -> ModuleType:
    """The script's module; benchmarks are no package."""
    spec = importlib.util.spec_from_file_location("gpu_goals", FOLDER / "gpu_goals.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_engine_part_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    script = [sys.executable, str(FOLDER / "gpu_engine.py"), "--part", "engine-llama", "--shape", "tiny"]

    subprocess.run([*script, "--device", "cpu", "--out", str(tmp_path)], check=True, timeout=120)

    written: dict[str, Any] = json.loads((tmp_path / "engine-llama.json").read_text())
    cells = written["cells"]
    assert cells["decode B=4 4 x r16 ctx=32"]["step_ms"] > 0
    assert cells["decode B=64 64 x r64 ctx=32"] == {"error": "does not fit"}
    assert cells["decode B=4 base ctx=32"]["host_ms"] > 0
    assert cells["prompt T=128 r64"]["floor_ms"] > 0
    assert cells["twice the same: decode B=4 8 x r16 ctx=32"]["same"] == 1.0
    assert "| decode B=4 4 x r16 ctx=32 |" in (tmp_path / "engine-llama.md").read_text()
    assert not written["goals_apply"]


def test_goals_are_reached_missed_or_not_measured(goals: ModuleType) -> None:
    results = {
        goals.decode(32): {"step_ms": 5.0, "tok_s": 6400.0},
        goals.decode(32, "8 x r16"): {"step_ms": 5.2},
        goals.decode(32, "8 x r64"): {"step_ms": 6.0},
    }

    lines = goals.goal_lines(results)

    assert lines[2:] == [
        "| G1 | base decode B=32, tok/s | ≥ 5650 | 6400 | reached |",
        "| G2 | 8 x r16 over base, B=32 | ≤ 1.08 | 1.04 | reached |",
        "| G2 | 8 x r64 over base, B=32 | ≤ 1.19 | 1.2 | missed |",
    ]


def test_every_goal_of_a_gpu_run_has_a_name_of_its_own(goals: ModuleType) -> None:
    assert len({goal.text for goal in goals.GOALS}) == len(goals.GOALS)
    assert {goal.number for goal in goals.GOALS} == {f"G{i}" for i in (1, 2, 3, *range(5, 15))}


def test_the_parts_of_an_adapter_s_way_are_measured(tmp_path: Path) -> None:
    script = [sys.executable, str(FOLDER / "gpu_transfer.py"), "--shape", "tiny", "--device", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}

    subprocess.run([*script, "--out", str(tmp_path)], env=environment, check=True, timeout=120)

    rows = json.loads((tmp_path / "transfer-tiny.json").read_text())["rows"]
    assert [row["rank"] for row in rows] == [8, 16, 64]
    assert all(row[f"{part}_ms"] > 0 for row in rows for part in ("read", "copy", "write", "by_the_host"))
