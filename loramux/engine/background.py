"""Threads beside those that compute or answer: their cores, their priority, and how one waits for them."""

from __future__ import annotations

import contextlib
import os
import select
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


def wait_readable(timeout_s: float, *descriptors: int) -> None:
    """Sleep until one of them is readable.

    Any will do: `select.select` refuses those from 1,024 on, which a process around the engine may have.
    """
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    poller.poll(timeout_s * 1000)
