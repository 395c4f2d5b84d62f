"""The timers of benchmarks/step_profile.py: own time by phase, and nothing left behind."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "phase_timer.py"


class Work:
    """Something with a call inside a call."""

    def outer(self) -> str:
        """Some time of its own, some in `inner`."""
        time.sleep(0.01)
        return self.inner()

    def inner(self) -> str:
        """Longer than the rest of `outer`."""
        time.sleep(0.03)
        return "done"

    def fails(self) -> None:
        """Raises."""
        raise ValueError("as it should")


@pytest.fixture(scope="module")
def phase_timer() -> ModuleType:
    """The script's module; benchmarks are no package."""
    spec = importlib.util.spec_from_file_location("phase_timer", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_phase_is_charged_without_the_phases_inside_it(phase_timer: ModuleType) -> None:
    timer = phase_timer.PhaseTimer()
    timer.time(Work, "outer", "outer")
    timer.time(Work, "inner", lambda args: type(args[0]).__name__)

    began = time.perf_counter()
    with timer:
        answer = Work().outer()
    whole = time.perf_counter() - began
    phases = timer.take()

    assert answer == "done"
    assert phases["outer"] >= 0.01
    assert phases["Work"] >= 0.03
    assert sum(phases.values()) <= whole
    assert timer.take() == {}


def test_the_timers_are_gone_afterwards_even_after_an_error(phase_timer: ModuleType) -> None:
    timer = phase_timer.PhaseTimer()
    before = Work.__dict__["fails"]
    timer.time(Work, "fails", "fails")

    with timer, pytest.raises(ValueError, match="as it should"):
        Work().fails()

    assert Work.__dict__["fails"] is before
    assert list(timer.take()) == ["fails"]
