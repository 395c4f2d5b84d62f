"""Set before torch is imported by any test: compute threads that sleep while they wait."""

from __future__ import annotations

import os

# Server, engine and tests share the cores; spinning threads of one stall the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
