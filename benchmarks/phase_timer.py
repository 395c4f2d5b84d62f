"""Where the time of nested calls goes: timers put around functions from outside, and taken off again."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any

PhaseOf = Callable[[tuple[Any, ...]], str]


class PhaseTimer:
    """Own time by phase: a call's time less that of the timed calls inside it.

    A context manager; timers are in place only within it, so that the same process can also be measured
    without them. One thread.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._wanted: list[tuple[Any, str, str | PhaseOf]] = []
        self._originals: list[tuple[Any, str, Any]] = []
        self._inner: list[float] = []  # time of the timed calls inside each open one

    def time(self, owner: Any, name: str, phase: str | PhaseOf) -> None:
        """Time attribute `name` of a class or module as `phase`, or what `phase` makes of its arguments."""
        self._wanted.append((owner, name, phase))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken

    def __enter__(self) -> PhaseTimer:
        for owner, name, phase in self._wanted:
            original = getattr(owner, name)
            self._originals.append((owner, name, original))
            setattr(owner, name, self._timed(original, phase))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def _timed(self, original: Callable[..., Any], phase: str | PhaseOf) -> Callable[..., Any]:
        inner, seconds, clock = self._inner, self.seconds, time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            began = clock()
            try:
                return original(*args, **kwargs)
            finally:
                took = clock() - began
                seconds[phase if isinstance(phase, str) else phase(args)] += took - inner.pop()
                if inner:
                    inner[-1] += took

        return timed
