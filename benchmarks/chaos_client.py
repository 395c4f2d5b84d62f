"""One request of the chaos run, and the verdict on how it ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

BASE = "base"  # stands for the digest of "no adapter"


@dataclass(frozen=True)
class Ask:
    """What is asked: a prompt number, of a model, streamed or not."""

    model: str
    prompt: int
    stream: bool


@dataclass(frozen=True)
class Verdict:
    """How a request ended.

    kind: `result`, `error` (one clear error), `CUT` (neither result nor error), `HUNG`, or `WRONG` (text that
    the weights named in the answer's header do not produce).
    """

    kind: str
    detail: str = ""


References = Mapping[tuple[str, int], str]  # (digest, prompt) -> greedy text


class ChaosClient:
    """Asks and judges.

    Args:
        http: to the server.
        prompts: the prompts.
        references: filled before the first `ask`.
        max_tokens: of every answer.
        hang_s: a request that has not ended after this hangs.
    """

    def __init__(
        self, http: httpx.AsyncClient, prompts: list[str], *, max_tokens: int, hang_s: float
    ) -> None:
        self.http = http
        self.prompts = prompts
        self.references: References = {}
        self._max_tokens = max_tokens
        self._hang_s = hang_s

    def body(self, ask: Ask) -> dict[str, Any]:
        """The request's JSON."""
        return {
            "model": ask.model,
            "prompt": self.prompts[ask.prompt],
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": ask.stream,
        }

    async def ask(self, ask: Ask) -> Verdict:
        """Send one request and wait for its end."""
        try:
            async with asyncio.timeout(self._hang_s):
                return await (self._stream(ask) if ask.stream else self._whole(ask))
        except TimeoutError:
            return Verdict("HUNG", f"no end after {self._hang_s:g} s")
        except httpx.TransportError as error:
            return Verdict("CUT", repr(error))

    async def _whole(self, ask: Ask) -> Verdict:
        response = await self.http.post("/v1/completions", json=self.body(ask))
        if response.status_code != 200:
            return clear_error(response.status_code, response.text)
        text = response.json()["choices"][0]["text"]
        return self._judge(ask, digest_of(response), text, is_whole=True)

    async def _stream(self, ask: Ask) -> Verdict:
        text, error, is_done = "", None, False
        async with self.http.stream("POST", "/v1/completions", json=self.body(ask)) as response:
            if response.status_code != 200:
                return clear_error(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                data = line[6:]
                if error is not None or is_done:
                    return Verdict("CUT", f"something after the end: {data[:200]}")
                if data == "[DONE]":
                    is_done = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    error = event["error"]["code"]
                elif event["choices"]:
                    text += event["choices"][0]["text"]
        verdict = self._judge(ask, digest_of(response), text, is_whole=is_done)
        if verdict.kind == "WRONG" or is_done:
            return verdict
        return (
            Verdict("error", f"event {error}") if error else Verdict("CUT", "the stream ended with neither")
        )

    def _judge(self, ask: Ask, digest: str, text: str, *, is_whole: bool) -> Verdict:
        """Compare with what these weights said when nothing else ran; before an error, only the beginning."""
        if (ask.model == BASE) != (digest == BASE):
            return Verdict("WRONG", f"{ask.model} was answered by {digest}")
        expected = self.references[digest, ask.prompt]
        if text == expected or (not is_whole and expected.startswith(text)):
            return Verdict("result")
        return Verdict("WRONG", f"{ask.model}, {digest[:12]}, prompt {ask.prompt}: {text!r} != {expected!r}")


def digest_of(response: httpx.Response) -> str:
    """Which weights answered, as the answer says."""
    header = response.headers.get("x-loramux-adapter")
    return BASE if header is None else str(header).rpartition("sha256:")[2]


def clear_error(status: int, text: str) -> Verdict:
    """An error is clear if it has a code in the API's shape."""
    try:
        return Verdict("error", f"{status} {json.loads(text)['error']['code']}")
    except (ValueError, KeyError, TypeError):
        return Verdict("CUT", f"{status} without an error object: {text[:200]}")
