"""The server's life: start the engine, load adapters, serve, stop.

The socket is bound before the model loads, so that a taken port fails at once, but listens only when
requests are welcome. A known error on the way (a bad flag, adapter or model) is one line on stderr and
exit code 1, and so is the end of an engine that cannot be kept running. SIGINT and SIGTERM end the server
with exit code 0, after what runs has come to its end (`drain.py`) or its time-out; a second one at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import uvloop

from loramux.engine import log_format as log_lines
from loramux.engine.client import ENGINE_COMMAND
from loramux.engine.errors import EngineDead, LoramuxError
from loramux.server.config import Config
from loramux.server.engine_keeper import EngineKeeper
from loramux.server.listener import Listener, allow_open_files
from loramux.server.model_folder import find_model_folder
from loramux.server.tls import Tls

if TYPE_CHECKING:
    from loramux.server.front import Front, HttpServer
    from loramux.server.services import Services

logger = logging.getLogger(__name__)

_FORCE_TIMEOUT_S: Final = 2.0  # after the second signal, for everything
_THREADS_TIMEOUT_S: Final = 1.0  # for threads whose results nobody waits for any more
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def run(config: Config, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until a signal comes; returns the exit code.

    Args:
        config: of the whole server.
        engine_command: the program that is the engine.
    """
    _set_up_logging(config.server.log_level, config.observe.log_format)
    for warning in config.warnings:
        _say(f"warning: {warning}")
    if not allow_open_files(config.server.connections.max_connections):
        _say("warning: the limit on open files (ulimit -n) is too low for --max-connections")
    return uvloop.run(_run_to_the_end(_Server(config, engine_command)))


async def _run_to_the_end(server: _Server) -> int:
    """The exit code. Afterwards the loop waits for its threads, but not for one that hangs."""
    code = 0
    try:
        await server.run()
    except LoramuxError as error:
        _say(f"error: {error.message}")
        code = 1
    _end_within(_THREADS_TIMEOUT_S, code)
    return code


class _Server:
    """One run of the server, from the bound socket to the last closed connection."""

    def __init__(self, config: Config, engine_command: Sequence[str]) -> None:
        self._config = config
        self._engine_command = engine_command
        self._engine: EngineKeeper | None = None
        self._tls = Tls(config.server) if config.server.ssl_certfile else None
        self._stop = asyncio.Event()  # a signal came
        self._force = asyncio.Event()  # and another one
        self._front: Front | None = None
        self._http: HttpServer | None = None
        self._services: Services | None = None
        self._has_hung_up = False
        self._reload: asyncio.Future[None] | None = None  # held, or it might be collected

    async def run(self) -> None:
        """Start, serve and stop.

        Raises:
            LoramuxError: the start failed.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        listener = Listener(self._config.server)
        try:
            services = await self._unless_stopped(self._start())
            if services is not None:
                await self._serve(services, listener)
        finally:
            listener.close()
            if self._engine is not None:
                await self._engine.stop()
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # the default would spoil the exit code

    def _on_hangup(self) -> None:
        """Look again at what may change while the server runs."""
        if self._tls is not None:
            self._tls.refresh()
        self._has_hung_up = True
        if self._services is not None:
            self._reload = asyncio.ensure_future(self._services.access.reload())

    def _on_signal(self) -> None:
        if self._stop.is_set() and not self._force.is_set():
            self._force.set()
            _end_within(_FORCE_TIMEOUT_S, 0)
            if self._engine is not None:
                self._engine.kill()
            if self._http is not None:
                self._http.force_exit = True
        self._stop.set()

    async def _unless_stopped(self, work: Coroutine[None, None, Services]) -> Services | None:
        """The result of the start; None if a signal came first."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return None

    async def _start(self) -> Services:
        server = self._config.server
        began_s = time.monotonic()
        _say(f"loading model {server.model}")
        folder = await asyncio.to_thread(
            find_model_folder,
            server.model,
            revision=server.revision,
            download_dir=server.download_dir,
            token=server.hf_token,
            with_weights=self._config.engine.load_format != "dummy",
        )
        engine_config = msgspec.structs.replace(self._config.engine, model=str(folder))
        self._engine = EngineKeeper(engine_config, command=self._engine_command, care=self._config.care)
        info, front = await asyncio.gather(
            self._engine.start(), asyncio.to_thread(_import_front, self._config, folder)
        )
        _say(
            f"model loaded in {time.monotonic() - began_s:.1f} s: {info.architecture}, {info.dtype} on "
            f"{info.device}, context {info.max_model_len} tokens, KV cache "
            f"{info.num_kv_blocks * info.block_size} tokens"
        )
        self._front = front
        return await front.open(self._engine, _say)

    async def _serve(self, services: Services, listener: Listener) -> None:
        server, front = self._config.server, self._front
        assert front is not None
        self._services = services
        if self._has_hung_up:  # while it started: the keys are those of before
            await services.access.reload()
        self._http = front.http_server(services, self._tls)
        gc.collect()
        gc.freeze()  # what start-up allocated is never scanned again: a full scan takes tens of ms
        serving = asyncio.ensure_future(self._http.serve(sockets=[listener.socket]))
        await self._http.listening.wait()
        address = listener.address
        has_keys = self._config.access.has_keys
        if not has_keys and server.uds is not None:
            _say("no --api-key: everybody who may open the socket's file can use the server")
        elif not has_keys and listener.is_local:
            _say("no --api-key: only this machine can connect; --host 0.0.0.0 opens it to others")
        elif not has_keys:
            _say(f"warning: no --api-key: everybody who reaches {address} can use the server")
        _say(f"ready on {address} in {time.monotonic() - _STARTED_S:.1f} s")
        refresh = self._tls.watch() if self._tls is not None and server.ssl_refresh else self._stop.wait()
        await _first(self._stop.wait(), services.engine.wait_dead(), serving, refresh)
        has_failed = not self._stop.is_set()
        _say("stopping" if self._stop.is_set() else f"error: {services.engine.problem}")
        await self._drain(services, server.shutdown_timeout_s)
        self._http.should_exit = True
        await services.engine.stop()  # what still runs gets an error now
        await front.close(services)
        await serving
        if has_failed:
            raise EngineDead("the server ended, because its engine cannot be kept running")

    async def _drain(self, services: Services, timeout_s: float) -> None:
        """Let what runs come to its end, while probes still answer."""
        services.drain.begin()
        services.manager.events.close()
        if services.drain.num_open and timeout_s:
            _say(f"draining {services.drain.num_open} requests for at most {timeout_s:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await _first(services.drain.wait_idle(), self._force.wait(), services.engine.wait_dead())


def _import_front(config: Config, folder: Path) -> Front:
    """What answers requests: 0.4 s of imports, then the model's text, while the engine loads."""
    module = importlib.import_module("loramux.server.front")
    gc.freeze()  # imports leave no garbage to speak of, so the collection before the first request skips them
    front: Front = module.Front(config, folder)
    return front


async def _first(*work: Awaitable[object]) -> None:
    """Return when one of them has ended; the others are cancelled, but not a task of somebody else's."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, each in zip(tasks, work, strict=True):
            if task is not each:
                task.cancel()


def _end_within(seconds: float, code: int) -> None:
    """End the process by then, even if a thread of it hangs (a look-up on a network, say)."""
    last_resort = threading.Timer(seconds, os._exit, (code,))
    last_resort.daemon = True
    last_resort.start()


_STARTED_S: Final = time.monotonic()  # about when the process started: this module is imported first


def _say(line: str) -> None:
    """A line for the person who started the server."""
    log_lines.say(line)


def _set_up_logging(level: str, log_format: str) -> None:
    number = logging.DEBUG if level == "trace" else logging.getLevelNamesMapping()[level.upper()]
    log_lines.set_up(max(number, logging.INFO), log_format)
    logging.getLogger("loramux").setLevel(number)
    logging.getLogger("uvicorn.error").setLevel(max(number, logging.WARNING))  # our own lines say more
