"""A real server process for tests: started with flags, stopped with a signal, on a port of its own."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx

ROOT: Final = Path(__file__).parents[1]
SERVE: Final = (sys.executable, "-m", "loramux", "serve")
_READY: Final = re.compile(r"ready on (\S+)")
_START_TIMEOUT_S: Final = 120.0
_NO_ROOTS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # plain HTTP needs none; reading them takes 18 ms


class RunningServer:
    """One process of `loramux serve`, or of something that takes the same flags."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        command: Sequence[str] = SERVE,
        port: int = 0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._store = tempfile.TemporaryDirectory(prefix="loramux-store-")
        self.store = Path(self._store.name)  # where it keeps adapters, unless a flag says otherwise
        own = {name: value for name, value in os.environ.items() if not name.startswith("LORAMUX_")}
        own |= {"OMP_NUM_THREADS": "1", "LORAMUX_ADAPTER_STORE_DIR": str(self.store), **(environ or {})}
        self.process = subprocess.Popen(
            [*command, *arguments, f"--port={port}"],
            cwd=ROOT,
            env=own,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []  # of stderr
        self._grew = threading.Condition()  # there is another line
        self.url = ""
        self._ready: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def stderr(self) -> str:
        """Everything the process has written there."""
        return "".join(self.lines)

    def wait_ready(self) -> None:
        """Block until the server says that it is ready; fails if it ends instead."""
        url = self._ready.get(timeout=_START_TIMEOUT_S)
        assert url is not None, f"the server ended:\n{self.stderr}"
        self.url = url

    def wait_line(self, text: str, timeout_s: float = 30.0) -> None:
        """Block until some line of stderr holds `text`."""
        with self._grew:
            found = self._grew.wait_for(lambda: any(text in line for line in self.lines), timeout_s)
        assert found, f"no line with {text!r}:\n{self.stderr}"

    def wait_ended(self, timeout_s: float = 60.0) -> int:
        """The exit code of a process that ends by itself."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._store.cleanup()
        return code

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """End the process with a signal; returns its exit code."""
        self.process.send_signal(number)
        return self.wait_ended()

    def client(self) -> httpx.Client:
        """A plain HTTP client for this server."""
        return httpx.Client(base_url=self.url, timeout=60.0, verify=_NO_ROOTS)

    def open_post(self, path: str, body: object) -> socket.socket:
        """A connection that has sent a request; closing it is a client that leaves."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        )
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(head.encode() + data)
        return connection

    def engine_pid(self) -> int:
        """The process id of the engine; the server's other children try grammars and templates."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        engines = [pid for pid in children if b"ipc://" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(engines) == 1, engines
        return int(engines[0])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grew:
                self.lines.append(line)
                self._grew.notify_all()
            if match := _READY.search(line):
                self._ready.put(match[1])
        self._ready.put(None)


@contextmanager
def running_server(
    *arguments: str, command: Sequence[str] = SERVE, environ: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server that is ready, and ended (killed if need be) at the end."""
    server = RunningServer(arguments, command=command, environ=environ)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGINT)
        try:
            server.wait_ended(20.0)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.wait_ended()
