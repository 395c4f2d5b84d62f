"""Set before torch or Triton is imported by any test.

Compute threads sleep while they wait: server, engine and tests share the cores, and spinning threads of one
stall the others. Where no GPU is, Triton's kernels run under its interpreter.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
