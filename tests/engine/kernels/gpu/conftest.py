"""Where no GPU is, Triton's kernels run under its interpreter: set before a kernel is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
