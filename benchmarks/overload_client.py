"""Many clients that ask again and again, come back when they are told to, and judge every answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

OK = "ok"
HUNG = "HUNG"
LOST = "LOST"


@dataclass
class Tally:
    """How all requests ended."""

    kinds: Counter[str] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)  # Retry-After of refusals
    latencies_s: list[float] = field(default_factory=list)  # of answers
    tokens: int = 0
    last_answer: dict[str, str] = field(default_factory=dict)  # one example of each kind but OK


@dataclass(frozen=True)
class Load:
    """What each client asks."""

    url: str
    model: str
    prompt_tokens: int
    max_tokens: int
    hang_s: float
    vocabulary: int


class Clients:
    """A number of clients, each with one request at a time.

    Args:
        load: what they ask.
        count: how many there are.
        seed: of their prompts.
    """

    def __init__(self, load: Load, count: int, *, seed: int = 0) -> None:
        self._load = load
        self._count = count
        self._random = random.Random(seed)
        parts = urlsplit(load.url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    async def run(self, seconds: float) -> Tally:
        """Ask for so long; what was asked by then is waited for."""
        tally = Tally()
        ends = time.monotonic() + seconds
        await asyncio.gather(*(self._one_client(number, ends, tally) for number in range(self._count)))
        return tally

    async def _one_client(self, number: int, ends: float, tally: Tally) -> None:
        await asyncio.sleep(self._random.random() * 0.5)
        while time.monotonic() < ends:
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._load.hang_s):
                    kind, wait_s, detail = await self._ask(is_stream=number % 2 == 0)
            except TimeoutError:
                kind, wait_s, detail = HUNG, 0.0, ""
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                kind, wait_s, detail = LOST, 0.5, repr(error)
            tally.kinds[kind] += 1
            if kind == OK:
                tally.tokens += self._load.max_tokens
                tally.latencies_s.append(time.monotonic() - began)
            else:
                tally.last_answer[kind] = detail[:300]
                tally.waits_s.append(wait_s)
                await asyncio.sleep(max(0.0, min(wait_s, ends - time.monotonic())))

    def _request(self, *, is_stream: bool) -> bytes:
        load = self._load
        body = json.dumps(
            {
                "model": load.model,
                "prompt": [self._random.randrange(load.vocabulary) for _ in range(load.prompt_tokens)],
                "max_tokens": load.max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": is_stream,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _ask(self, *, is_stream: bool) -> tuple[str, float, str]:
        """Kind of the answer, seconds until the next try, and the answer's text."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._request(is_stream=is_stream))
            head = await reader.readuntil(b"\r\n\r\n")
            body = await _read_body(reader, head)
        finally:
            writer.close()
        return _judge(head, body, is_stream=is_stream)


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The whole body; IncompleteReadError if the connection ends before it."""
    headers = _headers(head)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    pieces: list[bytes] = []
    while size := int((await reader.readuntil(b"\r\n")).strip() or b"0", 16):
        pieces.append((await reader.readexactly(size + 2))[:-2])
    return b"".join(pieces)


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _judge(head: bytes, body: bytes, *, is_stream: bool) -> tuple[str, float, str]:
    status = int(head.split(b" ", 2)[1])
    text = body.decode("utf-8", "replace")
    if status == 200 and is_stream:
        if text.endswith("data: [DONE]\n\n"):
            return OK, 0.0, ""
        return ("error event", 1.0, text) if 'data: {"error"' in text else (LOST, 1.0, text[-300:])
    if status == 200:
        return OK, 0.0, str(json.loads(text)["id"])
    headers = _headers(head)
    if "retry-after" not in headers:
        return f"{status} without Retry-After", 1.0, text
    code: Any = json.loads(text)["error"]["code"]
    return f"{status} {code}", float(headers["retry-after"]), text
