"""Threads beside those that compute or answer: which cores they run on, and how eagerly."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Final

NICENESS: Final = 10  # about a tenth of a busy core's time; all of an idle one
CORES: Final = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()


def step_back() -> None:
    """Lower the priority of the calling thread, where the system has priorities for threads (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def roam() -> None:
    """Let the calling thread run on every core of the process, though the one that started it is bound."""
    if CORES:
        with contextlib.suppress(OSError):  # a core is gone meanwhile
            os.sched_setaffinity(0, CORES)
