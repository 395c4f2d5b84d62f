"""A peer's process under measurement: start, pause, memory, end. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from served_process import children_of, status_of

_START_TIMEOUT_S = 900.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.02


class PeerError(Exception):
    """A peer did not start, ended, or answered wrongly; the message says how."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PeerProcess:
    """A process and its children: stopped while it is not measured, so that it takes no time from another.

    Args:
        name: of its log file.
        command: what to start.
        env: added to this process's environment; a value of None takes the variable away.
        log: where its output goes.
        piped: connect stdin and stdout instead (engines without HTTP).
    """

    def __init__(
        self, name: str, command: list[str], env: dict[str, str | None], log: Path, *, piped: bool = False
    ) -> None:
        self.name = name
        self._log = log
        merged = {key: value for key, value in (os.environ | env).items() if value is not None}
        self.began_s = time.perf_counter()
        pipe = subprocess.PIPE if piped else None
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe or sink,
                stderr=sink,
                text=True,
                env=merged,
                start_new_session=True,
            )

    def until(self, is_ready: Callable[[], bool]) -> float:
        """Ask until it is ready; returns the seconds since the start.

        Raises:
            PeerError: it ended, or took too long.
        """
        while not is_ready():
            if self.process.poll() is not None:
                raise PeerError(f"{self.name} ended with {self.process.returncode}: {self.last_words()}")
            if time.perf_counter() - self.began_s > _START_TIMEOUT_S:
                raise PeerError(
                    f"{self.name} was not ready after {_START_TIMEOUT_S:.0f} s: {self.last_words()}"
                )
            time.sleep(_POLL_S)
        return time.perf_counter() - self.began_s

    def last_words(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-1500:]

    def pause(self) -> None:
        """Stop all its processes."""
        _signal(self._pids(), signal.SIGSTOP)

    def resume(self) -> None:
        """Let all its processes run again."""
        _signal(self._pids(), signal.SIGCONT)

    def memory_mib(self) -> dict[str, float]:
        """Memory of all its processes: resident, at most resident, and with shared pages counted once."""
        pids = self._pids()
        fields = [status_of(pid) for pid in pids]
        return {
            "rss": sum(f.get("VmRSS", 0) for f in fields) / 1024,
            "peak_rss": sum(f.get("VmHWM", 0) for f in fields) / 1024,
            "pss": sum(map(_proportional_kib, pids)) / 1024,
        }

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used so far."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def idle_cpu(self, seconds: float = 1.0) -> float:
        """Share of one core that it takes when nobody asks for anything."""
        before, began = self.cpu_s(), time.perf_counter()
        time.sleep(seconds)
        return (self.cpu_s() - before) / (time.perf_counter() - began)

    def stop(self) -> None:
        """End it as Ctrl-C does, then by force, with whatever it leaves behind."""
        self.resume()
        pids = self._pids()
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_TIMEOUT_S)
        _signal(pids, signal.SIGKILL)
        self.process.wait()

    def _pids(self) -> list[int]:
        if self.process.poll() is not None:
            return []
        return [self.process.pid, *children_of(self.process.pid)]


def _signal(pids: list[int], number: int) -> None:
    """Send a signal to those that still live."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _proportional_kib(pid: int) -> int:
    """The Pss of /proc/PID/smaps_rollup; 0 when it may not be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
