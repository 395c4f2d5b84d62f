"""A distribution that is being counted: what `EngineStats` reports of steps and of adapters on the move."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

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
