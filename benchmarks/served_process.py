"""A `loramux serve` process under measurement: start, memory, end. Linux only (/proc)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

_READY = re.compile(r"ready on (http://\S+)")
_START_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 30


class ServedProcess:
    """Starts the server on a free port; a context manager that ends it.

    `url` is its address, `ready_s` the seconds from starting the process to its ready line.
    """

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "loramux", "serve", *arguments, "--port", "0"]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._log: deque[str] = deque(maxlen=40)
        self._is_ready = threading.Event()
        self.url = ""
        threading.Thread(target=self._read_log, daemon=True).start()
        self._is_ready.wait(_START_TIMEOUT_S)
        self.ready_s = time.perf_counter() - began
        if not self.url:
            self._process.kill()
            raise SystemExit("the server did not start:\n" + "".join(self._log))

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)
            if not self.url and (match := _READY.search(line)):
                self.url = match.group(1)
                self._is_ready.set()
        self._is_ready.set()  # it ended

    def memory_mib(self) -> dict[str, float]:
        """Resident memory of the server and of its children (the engine), now and at most."""
        pids = [self._process.pid, *children_of(self._process.pid)]
        fields = [status_of(pid) for pid in pids]
        return {
            "rss": sum(f["VmRSS"] for f in fields) / 1024,
            "peak_rss": sum(f["VmHWM"] for f in fields) / 1024,
        }

    def __enter__(self) -> ServedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGINT)  # what Ctrl-C sends
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            print(f"the server did not end within {_STOP_TIMEOUT_S} s and was killed", file=sys.stderr)
        if error is not None:
            print("the server's last words:\n" + "".join(self._log), file=sys.stderr)


def children_of(pid: int) -> list[int]:
    """All processes below `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children_of(int(child))]
    return found


def status_of(pid: int) -> dict[str, int]:
    """The kB fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
