"""benchmarks/gpu_attention.py works from end to end, and says so where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_attention.py"


def run(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_it_measures_a_tiny_shape_under_the_interpreter(tmp_path: Path) -> None:
    done = run("--shape", "tiny", "--device", "cpu", "--kv", "fp8", "--out", str(tmp_path), interpret="1")

    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "attention-tiny.json").read_text())["cells"]
    assert set(cells) == {"decode B=2 ctx=40", "chunk of 9 behind 20"}
    for cell in cells.values():
        assert min(cell["us"], cell["floor_us"], cell["torch_us"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_that_nothing_was_measured(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), interpret="0")

    assert done.returncode != 0
    assert "no CUDA device here; nothing was measured" in done.stderr
    assert list(tmp_path.iterdir()) == []
