"""An nginx in front of a server, as operators put it there: mostly default settings."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

_PROMPT = list(
    b"!slow as a glacier"
)  # ids for a model; the tests' stand-in takes its time for the first word
_CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log stderr error;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream server {{ server {server}; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://server; proxy_http_version 1.1; proxy_read_timeout 600s; }}
  }}
}}
"""


def find_nginx(folder: Path) -> str:
    """An installed nginx, or Debian's package unpacked into a folder (nothing is installed)."""
    found = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if found:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "root" / "usr" / "sbin" / "nginx"
    if not program.exists():
        subprocess.run(["apt-get", "download", "nginx"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for package in folder.glob("nginx_*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    return str(program)


class Nginx:
    """A context manager; `url` is where clients go.

    Args:
        program: the nginx to run.
        server_url: where it passes requests to.
    """

    def __init__(self, program: str, server_url: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(prefix="nginx-")
        config = Path(self._folder.name) / "nginx.conf"
        server = urlsplit(server_url).netloc
        config.write_text(_CONFIG.format(folder=self._folder.name, server=server, port=port))
        self._process = subprocess.Popen([program, "-p", self._folder.name, "-c", str(config)])

    def __enter__(self) -> Nginx:
        deadline = time.monotonic() + 10
        while True:
            try:
                with urlopen(f"{self.url}/live", timeout=5):
                    return self
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise SystemExit("nginx did not start") from None
                time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)
        self._folder.cleanup()


async def check_streaming(url: str, server_url: str, model: str, max_tokens: int) -> dict[str, Any]:
    """Does a stream arrive piece by piece, and does a client that leaves end it in the engine?"""
    pieces = await _arrivals(url, model, max_tokens, stop_after=None)
    await _arrivals(url, model, 400, stop_after=2)
    began = time.monotonic()
    while (running := await asyncio.to_thread(_num_running, server_url)) and time.monotonic() - began < 10:
        await asyncio.sleep(0.02)
    return {
        "pieces": len(pieces),
        "first_piece_s": round(pieces[0], 3),
        "last_piece_s": round(pieces[-1], 3),
        "flows": len(pieces) > max_tokens // 2 and pieces[0] < pieces[-1] / 2,
        "cancel_reaches_engine_s": None if running else round(time.monotonic() - began, 3),
    }


async def _arrivals(url: str, model: str, max_tokens: int, *, stop_after: int | None) -> list[float]:
    """Seconds after the request at which pieces of a stream came."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    fields = {"model": model, "prompt": _PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    )
    began = time.monotonic()
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    times: list[float] = []
    while data := await reader.read(65536):
        times += [time.monotonic() - began] * data.count(b'data: {"id"')
        if stop_after is not None and len(times) >= stop_after:
            break
    writer.close()
    return times


def _num_running(url: str) -> int:
    with urlopen(f"{url}/load", timeout=10) as answer:
        return int(json.load(answer)["num_running"])
