"""Every kernel compiles for the GPU that it is written for, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.engine.kernels.gpu import compile_cases


def test_every_kernel_compiles_for_sm_90() -> None:
    done = subprocess.run(
        [sys.executable, "-m", compile_cases.__name__],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
