"""A TCP relay in front of a real HTTP server that cuts, stalls or replaces its answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit


class BrokenRelay:
    """Passes everything through, except for what is switched on."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.received = b""  # every byte that clients sent
        self.answer: tuple[int, bytes] | None = None  # given to every request instead of the target's
        self.cut_bodies_of = b""  # requests that begin so get only the first bytes of their answer's body
        self.cut_after_bytes = 0
        self.num_cuts = 0
        self.stalls = False  # ... and the connection stays open, silent
        self.stalled = threading.Event()  # set when it is
        self.before: tuple[bytes, Callable[[], None]] | None = None  # called once, before such a request
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """Take connections until closed."""
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Stop, and wait for every connection."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join()

    def _serve(self, client: socket.socket) -> None:
        """One request a connection: the answer says so."""
        with client, contextlib.suppress(OSError):
            request = _read_head(client)
            self.received += request
            if not request:
                return
            if self.answer is not None:
                status, body = self.answer
                client.sendall(
                    b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
                )
                client.sendall(b"" if request.startswith(b"HEAD") else body)
                return
            if self.before is not None and request.startswith(self.before[0]):
                (_, call), self.before = self.before, None
                call()
            self._pass(client, request)

    def _pass(self, client: socket.socket, request: bytes) -> None:
        assert self._target.hostname is not None
        with socket.create_connection((self._target.hostname, self._target.port or 80)) as server:
            server.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            answer = b""
            while data := server.recv(65536):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        head = b"\r\n".join(
            line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")
        )
        client.sendall(head + b"\r\nConnection: close\r\n\r\n")
        if self.num_cuts > 0 and self.cut_bodies_of and request.startswith(self.cut_bodies_of):
            self.num_cuts -= 1
            client.sendall(body[: self.cut_after_bytes])
            if self.stalls:
                self.stalled.set()
                self._closing.wait(30)
        else:
            client.sendall(body)


@contextlib.contextmanager
def running_relay(target: str) -> Iterator[BrokenRelay]:
    """A relay on a free port, stopped at the end."""
    relay = BrokenRelay(target)
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield relay
    finally:
        relay.close()
        thread.join()


def _read_head(client: socket.socket) -> bytes:
    """A request without a body, as far as its empty line."""
    request = b""
    while b"\r\n\r\n" not in request:
        data = client.recv(65536)
        if not data:
            return b""
        request += data
    return request
