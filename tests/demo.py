"""The demo model for tests; fetched once into the cache folder."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def demo_model_folder() -> Path:
    """Its folder."""
    script = Path(__file__).parents[1] / "scripts" / "demo-model"
    return Path(subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
