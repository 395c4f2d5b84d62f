"""The async door to the engine process: start it, talk to it, notice at once when it is gone.

An `EngineClient` is one process, from its start to its end; the server's `EngineKeeper` replaces it by
another one when it dies. It owns the child process and a ZeroMQ pair socket; one task
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
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import zmq
import zmq.asyncio

from loramux.engine import messages
from loramux.engine.busy import BusyFlag
from loramux.engine.config import EngineConfig
from loramux.engine.errors import EngineDead, LoramuxError, from_wire
from loramux.engine.messages import FromEngine, ToEngine
from loramux.engine.types import (
    AdapterSpec,
    EngineInfo,
    EngineStats,
    FreedMemory,
    Request,
    SequenceOutput,
)

logger = logging.getLogger(__name__)

# Set before the engine's libraries are loaded; the operator's own values win.
# - The server, the engine's Python and its compute threads share the cores. Threads that spin for long turn
#   a 0.6 ms linear into 4-12 ms when a neighbour is busy; threads that never spin lose 30 to 50 us of waking
#   at each of some 200 products a step. So they spin, but less than a millisecond.
# - Weights on huge pages: fewer translation misses, 7 % (32 rows) to 12 % (1 row) of a step.
_CHILD_ENV = {
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "30000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_STOP_TIMEOUT_S = 5.0
_STOPPED = "the engine was stopped"
_LAST_FRAME_TIMEOUT_S = 0.5  # for the reason that a process sent just before it ended

_Stream = asyncio.Queue[SequenceOutput | LoramuxError]

ENGINE_COMMAND = (sys.executable, "-m", "loramux.engine")


class EngineClient:
    """One engine process, as the server sees it.

    Args:
        config: what the process is started with.
        command: the program that is the engine; it gets the socket's address and the config as JSON.
        on_stats: called with every snapshot of the engine, about once a second.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        on_stats: Callable[[EngineStats], None] = lambda _: None,
    ) -> None:
        self.config = config
        self._command = command
        self.last_heartbeat_s = time.monotonic()  # when the engine last said anything
        self.num_finished = 0  # sequences that ran to their end
        self._on_stats = on_stats
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
            *self._command,
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

    def abandon(self, why: str) -> None:
        """Kill the process, now; everything in flight fails with `EngineDead` and this reason."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._fail_everything(why)

    async def stop(self) -> None:
        """End the process: ask, then kill. Everything in flight fails with `EngineDead`."""
        self._stopping = True
        if self._process and self._process.returncode is None:
            if self._info is not None:  # else: it reads no message before its model is loaded
                with contextlib.suppress(LoramuxError):
                    self._send([messages.Shutdown()])
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            self.abandon(_STOPPED)
            await self._process.wait()
        self._fail_everything(_STOPPED)
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
        async with self.open([request]) as sequences:
            async for output in sequences:
                yield output

    def open(self, requests: Sequence[Request]) -> SequenceStream:
        """Start several sequences together; their outputs come in one iterator, interleaved."""
        return SequenceStream(self, requests)

    async def load_adapter(self, spec: AdapterSpec, *, pinned: bool = False) -> None:
        """Read an adapter into the engine; returns when requests may use its digest.

        Raises:
            AdapterIncompatible, AdapterNotFound: its files are not what the inspection saw.
            EngineDead: the engine process ended.
        """
        call_id = next(self._call_ids)
        await self._call(call_id, messages.LoadAdapter(call_id, spec, pinned))

    async def unload_adapter(self, digest: str) -> FreedMemory:
        """Refuse new requests for an adapter at once; returns when its last sequence has ended.

        Raises:
            AdapterNotFound: the engine does not have it.
            EngineDead: the engine process ended.
        """
        call_id = next(self._call_ids)
        reply = await self._call(call_id, messages.UnloadAdapter(call_id, digest))
        assert reply.freed is not None
        return reply.freed

    def restore_adapters(self, specs: Sequence[AdapterSpec]) -> None:
        """Tell the engine of adapters that the one before it had loaded: requests may use them at once.

        Raises:
            EngineDead: the engine process ended.
        """
        self._send([messages.RestoreAdapters(list(specs))])

    async def stats(self) -> EngineStats:
        """A snapshot of the engine's load, taken between two steps."""
        call_id = next(self._call_ids)
        reply = await self._call(call_id, messages.GetStats(call_id))
        assert reply.stats is not None
        self._on_stats(reply.stats)
        return reply.stats

    async def _call(self, call_id: int, message: ToEngine) -> messages.Reply:
        future: asyncio.Future[messages.Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._send([message])
            reply = await future
        finally:
            self._calls.pop(call_id, None)
        if reply.error is not None:
            raise from_wire(reply.error, reply.message, reply.param)
        return reply

    def _send(self, batch: list[ToEngine]) -> None:
        """Queue a frame without waiting: a pair socket whose peer has gone would wait for ever.

        Raises:
            EngineDead: the process is known to be gone; if it goes later, the waiting streams and
                calls hear of it.
        """
        if self._dead is not None:
            raise EngineDead(self._dead.message)
        assert self._socket is not None, "start() first"
        self._socket.send(messages.encode(batch))  # a future that nobody needs

    async def _read_frames(self) -> None:
        assert self._socket is not None
        assert self._folder is not None
        busy = BusyFlag(Path(self._folder.name))
        try:
            while True:
                frame = await self._socket.recv()
                self.last_heartbeat_s = time.monotonic()
                for message in messages.decode_from_engine(frame):
                    self._dispatch(message)
                await busy.lower_when_written()  # nor do queued frames hold up the loop: recv would not yield
        except Exception:  # without a reader everybody would wait for ever
            logger.exception("the engine's messages cannot be read")
            self.abandon("the engine sent what cannot be read")
        finally:
            busy.close()

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
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)
            case messages.StartFailed(error, text, param):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_exception(from_wire(error, text, param))
            case messages.Heartbeat(stats):
                if stats is not None:
                    self._on_stats(stats)

    async def _watch_process(self) -> None:
        assert self._process is not None
        assert self._ready is not None
        code = await self._process.wait()
        if not self._ready.done():  # let a last frame (StartFailed) be read first
            await asyncio.wait([self._ready], timeout=_LAST_FRAME_TIMEOUT_S)
        if self.is_alive and not self._stopping:
            logger.error("the engine process ended", extra={"exit": _describe_exit(code)})
        self._fail_everything(
            _STOPPED if self._stopping else f"the engine process ended ({_describe_exit(code)})"
        )

    def _fail_everything(self, why: str) -> None:
        self._dead = self._dead or EngineDead(why)
        self._died.set()
        for stream in set(self._streams.values()):
            stream.put_nowait(EngineDead(why))  # one each: a raised exception keeps its traceback
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDead(why))
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(self._dead)


class SequenceStream:
    """The outputs of sequences that were started together: an async context manager and iterator.

    Leaving the context aborts in the engine, within one step, whatever still runs.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._requests = requests
        self._queue: _Stream = asyncio.Queue()
        self._running: set[str] = set()

    async def __aenter__(self) -> Self:
        """Send the requests, in one frame."""
        for request in self._requests:
            assert request.request_id not in self._client._streams, f"{request.request_id} is in use"
        self._running = {request.request_id for request in self._requests}
        self._client._streams.update(dict.fromkeys(self._running, self._queue))
        try:
            self._client._send([messages.AddRequest(request) for request in self._requests])
        except BaseException:
            self.abort(*self._running)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what has not ended."""
        self.abort(*self._running)

    def __aiter__(self) -> Self:
        """The stream is its own iterator."""
        return self

    async def __anext__(self) -> SequenceOutput:
        """The next output of any sequence.

        Raises:
            StopAsyncIteration: every sequence has ended.
            LoramuxError: the engine refused one of them, or is gone.
        """
        while self._running:
            item = await self._queue.get()
            if isinstance(item, LoramuxError):
                raise item
            if item.request_id in self._running:  # else: aborted while it was on its way
                if item.finish_reason is not None:
                    self._client.num_finished += 1
                    self._forget(item.request_id)
                return item
        raise StopAsyncIteration

    def abort(self, *request_ids: str) -> None:
        """Stop these sequences; nothing more of them is returned."""
        running = self._running.intersection(request_ids)
        for request_id in running:
            self._forget(request_id)
        if running and self._client.is_alive:
            self._client._send([messages.Abort(sorted(running))])

    def fail(self, error: LoramuxError) -> None:
        """Make the iterator raise this, after the outputs that are here already."""
        self._queue.put_nowait(error)

    def _forget(self, request_id: str) -> None:
        self._running.discard(request_id)
        self._client._streams.pop(request_id, None)


def _describe_exit(code: int) -> str:
    if code == messages.EXIT_RANK_LOST:
        return "another process of the tensor-parallel engine ended"
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"
