"""Work that may take its time: threads that leave the processor to whoever answers requests."""

from __future__ import annotations

import contextlib
import os
import threading

NICENESS = 10  # about a tenth of a busy core's time; all of an idle one


def step_back() -> None:
    """Lower the priority of the calling thread, where the system has priorities for threads (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
