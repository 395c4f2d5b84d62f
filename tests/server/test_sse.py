"""Streams that begin late, fail late, or are ended by the process: never cut without an error event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Message

from loramux.engine.errors import EngineDead
from loramux.server.errors import AdapterLoading
from loramux.server.sse import DONE, EventStream, event, late_answer


class Wire:
    """The ASGI channel of one request whose client stays."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.body = b""
        self.is_ended = False
        self.began = asyncio.Event()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert self.status is None, "the headers go out once"
            self.status = message["status"]
            return
        self.body += message["body"]
        self.is_ended = not message["more_body"]
        self.began.set()

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("nothing ever comes")

    async def take(self, answer: Response) -> None:
        await answer({"type": "http"}, self.receive, self.send)

    def last_error(self) -> dict[str, Any]:
        last = self.body.decode().strip().split("\n\n")[-1]
        error: dict[str, Any] = json.loads(last.removeprefix("data: "))["error"]
        return error


async def two_events(*, error: Exception | None = None) -> AsyncGenerator[bytes, None]:
    yield event(b"1")
    if error is not None:
        raise error
    yield DONE


async def one_event_and_silence() -> AsyncGenerator[bytes, None]:
    yield event(b"1")
    await asyncio.Event().wait()


def stream(events: AsyncGenerator[bytes, None]) -> EventStream:
    return EventStream(events, headers={}, keep_alive_s=5.0)


async def made(answer: Response, *, after: asyncio.Event | None = None) -> Response:
    if after is not None:
        await after.wait()
    return answer


async def failed(error: Exception, *, after: asyncio.Event | None = None) -> Response:
    if after is not None:
        await after.wait()
    raise error


def test_answer_that_is_quick_is_not_touched() -> None:
    async def scenario() -> None:
        answer = Response(b"x", 404)

        assert await late_answer(made(answer), keep_alive_s=5.0) is answer

    asyncio.run(scenario())


def test_error_that_is_quick_stays_an_error() -> None:
    async def scenario() -> None:
        with pytest.raises(AdapterLoading):
            await late_answer(failed(AdapterLoading("still loading")), keep_alive_s=5.0)

    asyncio.run(scenario())


def test_late_stream_follows_its_comments_with_one_set_of_headers() -> None:
    async def scenario() -> Wire:
        wire, ready = Wire(), asyncio.Event()
        answer = await late_answer(made(stream(two_events()), after=ready), keep_alive_s=0.01)
        taking = asyncio.create_task(wire.take(answer))
        await wire.began.wait()
        ready.set()
        await taking
        return wire

    wire = asyncio.run(scenario())

    assert wire.status == 200
    assert wire.body.startswith(b": keep-alive\n\n")
    assert wire.body.endswith(event(b"1") + DONE)
    assert wire.is_ended


@pytest.mark.parametrize(
    ("error", "code"),
    [(AdapterLoading("still loading"), "adapter_loading"), (RuntimeError("secret"), "internal_error")],
)
def test_late_error_is_an_event(error: Exception, code: str) -> None:
    async def scenario() -> Wire:
        wire, ready = Wire(), asyncio.Event()
        answer = await late_answer(failed(error, after=ready), keep_alive_s=0.01)
        taking = asyncio.create_task(wire.take(answer))
        await wire.began.wait()
        ready.set()
        await taking
        return wire

    wire = asyncio.run(scenario())

    assert wire.last_error()["code"] == code
    assert "secret" not in wire.body.decode()
    assert wire.is_ended


def test_error_in_a_stream_is_its_last_event() -> None:
    async def scenario() -> Wire:
        wire = Wire()
        await wire.take(stream(two_events(error=EngineDead("gone"))))
        return wire

    wire = asyncio.run(scenario())

    assert wire.last_error()["code"] == "engine_unavailable"
    assert DONE not in wire.body


@pytest.mark.parametrize("is_late", [False, True])
def test_stream_that_the_process_ends_says_so(is_late: bool) -> None:
    async def scenario() -> Wire:
        wire = Wire()
        answer: Response = stream(one_event_and_silence())
        if is_late:
            answer = await late_answer(made(answer, after=asyncio.Event()), keep_alive_s=0.01)
        taking = asyncio.create_task(wire.take(answer))
        await wire.began.wait()
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        return wire

    wire = asyncio.run(scenario())

    assert wire.last_error()["code"] == "draining"
    assert "shutting down" in wire.last_error()["message"]


def test_caller_who_gives_up_waiting_ends_the_work() -> None:
    async def scenario() -> bool:
        is_ended = False

        async def work() -> Response:
            nonlocal is_ended
            try:
                await asyncio.Event().wait()
            finally:
                is_ended = True
            return Response()

        waiting = asyncio.create_task(late_answer(work(), keep_alive_s=60.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return is_ended

    assert asyncio.run(scenario())
