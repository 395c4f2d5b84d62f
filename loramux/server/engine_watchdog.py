"""Tells an engine that hangs from one that computes.

A step of a large model on a CPU may take minutes, in which the engine says nothing. But it computes:
its process uses processor time. One that neither speaks nor computes is stopped, waits for a lock that
nobody gives back, or for a device that does not answer. One that computes for ever is caught later.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_LOOKS: Final = 4  # in one time-out
_LONGEST_INTERVAL_S: Final = 1.0
_COMPUTES: Final = 0.01  # share of a core; an idle process's threads use less
_LOOP_TIMES: Final = 20.0  # silence while computing, in time-outs: longer than any step


class Watchdog:
    """Looks at one engine again and again.

    Only time between two looks that were about `interval_s` apart counts, so that a server that was
    itself stopped, or whose event loop was held up, does not blame the engine.

    Args:
        timeout_s: silence without computing that is a hang; 0 = there is none.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.interval_s = min(timeout_s / _LOOKS or _LONGEST_INTERVAL_S, _LONGEST_INTERVAL_S)
        self._last_look_s: float | None = None
        self._last_frame_s = 0.0
        self._last_cpu_s: float | None = None
        self._silent_s = 0.0
        self._frozen_s = 0.0

    def look(self, last_frame_s: float, cpu_s: float | None, now_s: float) -> str | None:
        """Why the engine hangs, None if it does not.

        Args:
            last_frame_s: when it last said anything.
            cpu_s: processor time that its process has used so far; None if that is not known.
            now_s: on the same clock as `last_frame_s`.
        """
        passed_s = now_s - (now_s if self._last_look_s is None else self._last_look_s)
        counted_s = min(passed_s, 2 * self.interval_s)
        computes = (
            cpu_s is None or self._last_cpu_s is None or cpu_s - self._last_cpu_s >= _COMPUTES * passed_s
        )
        speaks = last_frame_s != self._last_frame_s
        self._last_look_s, self._last_frame_s, self._last_cpu_s = now_s, last_frame_s, cpu_s
        self._silent_s = 0.0 if speaks else self._silent_s + counted_s
        self._frozen_s = 0.0 if speaks or computes else self._frozen_s + counted_s
        if not self._timeout_s:
            return None
        if self._frozen_s >= self._timeout_s:
            return f"it has neither said nor computed anything for {self._frozen_s:.1f} s"
        if self._silent_s >= _LOOP_TIMES * self._timeout_s:
            return f"it has said nothing for {self._silent_s:.0f} s"
        return None


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process has used, None where the system does not tell (only Linux does)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # after the command's name, which may hold anything
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
