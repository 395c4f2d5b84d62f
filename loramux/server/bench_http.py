"""The wire side of `loramux bench`: one streamed HTTP request with next to no work a token.

A general HTTP client costs about 75 µs of Python for every event that arrives, which caps a run at some
13,000 tokens a second and, on a small machine, takes that time from the server. Here httptools' C parser
undoes the framing and the event reader looks for a few byte patterns: about 10 µs.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.parse import urlsplit

import httptools

from loramux.engine.errors import InvalidConfig
from loramux.server.bench_figures import Sample

_ERROR_BODY_LIMIT = 300  # bytes of an error answer that are kept


class EventReader:
    """Notes when the token events of one stream arrive, without parsing them."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._tail = b""
        self._usage: bytes | None = None
        self._is_done = False

    def feed(self, chunk: bytes, now: float) -> None:
        """Take the bytes that arrived at `now`; they may end anywhere."""
        *lines, self._tail = (self._tail + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line, now)

    def _take(self, line: bytes, now: float) -> None:
        # In JSON text every quote is escaped, so these patterns cannot come from generated text.
        if b'"choices":[{' in line or b'"choices": [{' in line:
            self._sample.arrivals.append(now)
        elif line[5:].strip() == b"[DONE]":
            self._is_done = True
        elif line[5:20].lstrip().startswith(b'{"error"'):
            self._sample.error = line[5:].strip().decode(errors="replace")
        if b'"usage":{' in line or b'"usage": {' in line:
            self._usage = line

    def close(self) -> None:
        """Read the token counts from the last usage; without one, an event counts as a token."""
        usage: dict[str, Any] = json.loads(self._usage[5:])["usage"] if self._usage else {}
        self._sample.prompt_tokens = usage.get("prompt_tokens", 0)
        self._sample.completion_tokens = usage.get("completion_tokens", len(self._sample.arrivals))
        if self._sample.error is None and not (self._is_done and self._sample.arrivals):
            what = "[DONE]" if self._sample.arrivals else "a token"
            self._sample.error = f"the stream ended without {what}"


class _Exchange(asyncio.Protocol):
    """One answer on a connection of its own. The parser calls the `on_` methods."""

    def __init__(self, sample: Sample, reader: EventReader) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sample = sample
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._error_body = b""
        self._now = 0.0

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._end(f"not an HTTP answer: {exc}")

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() == 200:
            self._reader.feed(body, self._now)
        else:
            self._error_body += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        text = self._error_body[:_ERROR_BODY_LIMIT].decode(errors="replace")
        self._end(None if status == 200 else f"HTTP {status}: {text}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was lost: {exc}" if exc else None)

    def _end(self, error: str | None) -> None:
        if not self.ended.done():
            self._sample.error = self._sample.error or error
            self.ended.set_result(None)


class Endpoint:
    """Where requests go: an address and the headers that all of them carry.

    Raises:
        InvalidConfig: the URL has no http(s) scheme or no host.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidConfig(
                f"--base-url must look like http://HOST:PORT, got {url!r}", param="--base-url"
            )
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._timeout_s = timeout_s
        lines = [f"host: {parts.netloc}", "content-type: application/json", "connection: close"]
        lines += [f"authorization: Bearer {api_key}"] if api_key else []
        self._prefix = parts.path.rstrip("/")
        self._headers = "\r\n".join(lines)

    async def post(self, path: str, body: dict[str, Any]) -> Sample:
        """Send one request and read its stream to the end; a failure is in `Sample.error`.

        The clock starts when the connection stands, as it does for a client that keeps its connections.
        """
        sample = Sample(model=body["model"])
        reader = EventReader(sample)
        content = json.dumps(body).encode()
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._headers}\r\n"
        request = f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
        sample.sent_at = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                transport, exchange = await asyncio.get_running_loop().create_connection(
                    lambda: _Exchange(sample, reader), self._host, self._port, ssl=self._tls or None
                )
                try:
                    sample.sent_at = time.perf_counter()
                    transport.write(request)
                    await exchange.ended
                finally:
                    transport.abort()
        except (OSError, TimeoutError) as exc:
            sample.error = f"{type(exc).__name__}: {exc}"
        sample.ended_at = time.perf_counter()
        reader.close()
        return sample
