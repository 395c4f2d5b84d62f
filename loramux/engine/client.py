"""The async door to the engine process: start it, talk to it, notice at once when it is gone.

The server holds one `EngineClient`. It owns the child process and a ZeroMQ pair socket; one task
reads frames and hands every message to the stream or call that waits for it. All methods belong to
the event loop that called `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from loramux.engine import messages
from loramux.engine.config import EngineConfig
from loramux.engine.errors import EngineDead, LoramuxError, from_wire
from loramux.engine.messages import FromEngine, ToEngine
from loramux.engine.types import AdapterSpec, EngineInfo, EngineStats, Request, SequenceOutput

logger = logging.getLogger(__name__)

# The server, the engine's Python and its compute threads share the cores: threads that spin while
# they wait turn a 0.6 ms linear into 4-12 ms when a neighbour is busy. Set before torch is imported.
_CHILD_ENV = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
_STOP_TIMEOUT_S = 5.0

_Stream = asyncio.Queue[SequenceOutput | LoramuxError]


class EngineClient:
    """One engine process, as the server sees it."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.last_heartbeat_s = time.monotonic()  # when the engine last said anything
        self._info: EngineInfo | None = None
        self._dead: EngineDead | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._context: zmq.asyncio.Context | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, asyncio.Future[messages.Reply]] = {}
        self._call_ids = itertools.count(1)
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._died = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        """What the engine told about itself; only after `start`."""
        assert self._info is not None, "start() first"
        return self._info

    @property
    def is_alive(self) -> bool:
        """True from a successful `start` until the process ends."""
        return self._info is not None and self._dead is None

    @property
    def pid(self) -> int | None:
        """The child's process id, None before `start`."""
        return self._process.pid if self._process else None

    async def wait_dead(self) -> None:
        """Return when the engine process is gone, for whatever reason."""
        await self._died.wait()

    async def start(self) -> EngineInfo:
        """Start the process and wait until its model is loaded.

        Raises:
            UnsupportedModel, InvalidConfig: the engine refused to start.
            EngineDead: the process ended while it was starting.
        """
        loop = asyncio.get_running_loop()
        self._folder = tempfile.TemporaryDirectory(prefix="loramux-")
        address = f"ipc://{Path(self._folder.name) / 'engine'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self._ready = loop.create_future()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loramux.engine.process",
            address,
            msgspec.json.encode(self.config).decode(),
            env={**_CHILD_ENV, **os.environ},
            start_new_session=True,  # Ctrl-C reaches the server only, which then stops the engine
        )
        self._tasks = [
            loop.create_task(self._read_frames()),
            loop.create_task(self._watch_process()),
        ]
        self._info = await self._ready
        return self._info

    async def stop(self) -> None:
        """End the process: ask, then kill. Everything in flight fails with `EngineDead`."""
        self._stopping = True
        if self._process and self._process.returncode is None:
            with contextlib.suppress(LoramuxError):
                await self._send([messages.Shutdown()])
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._fail_everything("the engine was stopped")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket:
            self._socket.close()
        if self._context:
            self._context.term()
        if self._folder:
            self._folder.cleanup()

    async def generate(self, request: Request) -> AsyncIterator[SequenceOutput]:
        """Stream one sequence; the last output has a `finish_reason`.

        Closing the iterator early (or cancelling the task that reads it) aborts the sequence in
        the engine within one step.

        Raises:
            LoramuxError: the engine refused the request.
            EngineDead: the engine process ended.
        """
        stream: _Stream = asyncio.Queue()
        assert request.request_id not in self._streams, f"request id {request.request_id} is in use"
        self._streams[request.request_id] = stream
        finished = False
        try:
            await self._send([messages.AddRequest(request)])
            while not finished:
                item = await stream.get()
                if isinstance(item, LoramuxError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            self._streams.pop(request.request_id, None)
            if not finished and self.is_alive:
                self._send_soon([messages.Abort([request.request_id])])

    async def load_adapter(self, spec: AdapterSpec) -> None:
        """Read an adapter into the engine; returns when requests may use its digest.

        Raises:
            AdapterIncompatible, AdapterNotFound: its files are not what the inspection saw.
            EngineDead: the engine process ended.
        """
        call_id = next(self._call_ids)
        await self._call(call_id, messages.LoadAdapter(call_id, spec))

    async def unload_adapter(self, digest: str) -> None:
        """Forget an adapter; returns when its last sequence has ended and its memory is free."""
        call_id = next(self._call_ids)
        await self._call(call_id, messages.UnloadAdapter(call_id, digest))

    async def stats(self) -> EngineStats:
        """A snapshot of the engine's load, taken between two steps."""
        call_id = next(self._call_ids)
        reply = await self._call(call_id, messages.GetStats(call_id))
        assert reply.stats is not None
        return reply.stats

    async def _call(self, call_id: int, message: ToEngine) -> messages.Reply:
        future: asyncio.Future[messages.Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            await self._send([message])
            reply = await future
        finally:
            self._calls.pop(call_id, None)
        if reply.error is not None:
            raise from_wire(reply.error, reply.message, reply.param)
        return reply

    async def _send(self, batch: list[ToEngine]) -> None:
        if self._dead is not None:
            raise self._dead
        assert self._socket is not None, "start() first"
        await self._socket.send(messages.encode(batch))

    def _send_soon(self, batch: list[ToEngine]) -> None:
        """Send without waiting; for `finally` blocks of a cancelled task (the queue is unbounded)."""
        assert self._socket is not None
        self._socket.send(messages.encode(batch))

    async def _read_frames(self) -> None:
        assert self._socket is not None
        while True:
            frame = await self._socket.recv()
            self.last_heartbeat_s = time.monotonic()
            for message in messages.decode_from_engine(frame):
                self._dispatch(message)

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case messages.Outputs(outputs):
                for output in outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:  # else: aborted while the output was on its way
                        stream.put_nowait(output)
            case messages.RequestFailed(request_id, error, text, param):
                stream = self._streams.get(request_id)
                if stream is not None:
                    stream.put_nowait(from_wire(error, text, param))
            case messages.Reply():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case messages.Ready(info):
                assert self._ready is not None
                self._ready.set_result(info)
            case messages.StartFailed(error, text, param):
                assert self._ready is not None
                self._ready.set_exception(from_wire(error, text, param))
            case messages.Heartbeat():
                pass

    async def _watch_process(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        if not self._stopping:
            await asyncio.sleep(0)  # let a last frame (StartFailed) be read first
            logger.error("the engine process ended", extra={"exit": _describe_exit(code)})
        self._fail_everything(f"the engine process ended ({_describe_exit(code)})")

    def _fail_everything(self, why: str) -> None:
        self._dead = self._dead or EngineDead(why)
        self._died.set()
        for stream in self._streams.values():
            stream.put_nowait(self._dead)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._dead)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(self._dead)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"
