"""What `EngineStats` reports beside the scheduler's counts: distributions, and the process's memory."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from loramux.engine.types import Distribution


class Tally:
    """Counts values between ascending bounds.

    Args:
        bounds: one value is counted at the first bound that is not below it, or behind the last one.
    """

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def distribution(self) -> Distribution:
        """The counts so far."""
        return Distribution(self._counts.copy(), self._total)


def resident_bytes() -> int:
    """This process's resident memory; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
