"""The engine's own process: the step loop between a socket and an `Engine`.

Started by `EngineClient` as `python -m loramux.engine ADDRESS CONFIG_JSON`. It ends when it
is told to, when its parent is gone, or by an error that leaves the device in doubt; the server
notices at once and says so to everybody who waits.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from functools import partial
from pathlib import Path

import msgspec
import zmq

from loramux.engine import log_format, messages
from loramux.engine.background import roam, step_back
from loramux.engine.busy import BusyFlag
from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.errors import LoramuxError
from loramux.engine.kernel_cache import remove_unused
from loramux.engine.kernels.cpu import FOLDER
from loramux.engine.messages import FromEngine, ToEngine
from loramux.engine.types import FreedMemory

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


class EngineProcess:
    """Reads messages, steps the engine, sends what came out; at most one frame a step."""

    def __init__(self, engine: Engine, pair: zmq.Socket[bytes], server: BusyFlag) -> None:
        self.engine = engine
        self._server = server
        self._socket = pair
        self._poller = zmq.Poller()
        self._poller.register(pair, zmq.POLLIN)
        self._poller.register(engine.residency.wake_fd, zmq.POLLIN)
        self._out: list[FromEngine] = []
        self._last_beat_s = 0.0
        self._stopping = False

    def run(self) -> None:
        """Serve until a `Shutdown` message."""
        self._out.append(messages.Ready(self.engine.info))
        while not self._stopping:
            self._receive(wait=not self.engine.has_work())
            outputs = self.engine.step()
            if outputs:
                self._server.put_up()
                self._out.append(messages.Outputs(outputs))
            for request_id, error in self.engine.take_failures():
                self._fail_request(request_id, error)
            self._send()
        self.engine.close()

    def _receive(self, *, wait: bool) -> None:
        """Take in everything that has arrived; with `wait`, sleep until something does."""
        if wait:
            self._send()
            is_idle = not self._poller.poll(0) and not self.engine.page_ahead()
            if is_idle and not self._poller.poll(int(HEARTBEAT_S * 1000)):
                self.engine.grammars.warm_up()  # idle: the best time for it
        while self._socket.poll(0):
            for message in messages.decode_to_engine(self._socket.recv()):
                self._handle(message)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case messages.AddRequest(request):
                try:
                    self.engine.add_request(request)
                except LoramuxError as error:
                    self._fail_request(request.request_id, error)
            case messages.Abort(request_ids):
                self.engine.abort(request_ids)
            case messages.LoadAdapter(call_id, spec, pinned):
                try:
                    self.engine.begin_load(spec, partial(self._loaded, call_id), pinned=pinned)
                except LoramuxError as error:
                    self._loaded(call_id, error)
            case messages.UnloadAdapter(call_id, digest):
                try:
                    self.engine.begin_unload(digest, partial(self._gone, call_id))
                except LoramuxError as error:
                    self._loaded(call_id, error)
            case messages.RestoreAdapters(specs):
                for spec in specs:
                    self.engine.restore_adapter(spec)
            case messages.GetStats(call_id):
                self._out.append(messages.Reply(call_id, stats=self.engine.stats()))
            case messages.Shutdown():
                self._stopping = True

    def _loaded(self, call_id: int, error: LoramuxError | None) -> None:
        if error is None:
            self._out.append(messages.Reply(call_id))
        else:
            self._out.append(messages.Reply(call_id, type(error).__name__, error.message, error.param))

    def _gone(self, call_id: int, freed: FreedMemory) -> None:
        self._out.append(messages.Reply(call_id, freed=freed))

    def _fail_request(self, request_id: str, error: LoramuxError) -> None:
        self._out.append(messages.RequestFailed(request_id, type(error).__name__, error.message, error.param))

    def _send(self) -> None:
        now = time.monotonic()
        if now - self._last_beat_s >= HEARTBEAT_S:
            self._out.append(messages.Heartbeat(self.engine.stats()))
            self._last_beat_s = now
        if self._out:
            self._socket.send(messages.encode(self._out))
            self._out.clear()


def main(address: str, config_json: str) -> int:
    """Connect, load the model, serve. Returns the exit code."""
    config = msgspec.json.decode(config_json, type=EngineConfig)
    log_format.set_up(logging.INFO, config.log_format, process="engine")
    context = zmq.Context()
    pair: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    pair.set_hwm(0)
    pair.setsockopt(zmq.LINGER, 1000)
    pair.connect(address)
    try:
        engine = Engine(config, on_rank_lost=lambda _: os._exit(messages.EXIT_RANK_LOST))
    except LoramuxError as error:
        pair.send(messages.encode([messages.StartFailed(type(error).__name__, error.message, error.param)]))
        pair.close()
        context.term()
        return 1
    server = BusyFlag(Path(address.removeprefix("ipc://")).parent)
    engine.runner.bind_threads(server)
    gc.collect()
    gc.freeze()  # what start-up allocated is never scanned again
    threading.Thread(target=_tidy_up, name="kernel-cache", daemon=True).start()
    EngineProcess(engine, pair, server).run()
    pair.close()
    context.term()
    return 0


def _tidy_up() -> None:
    """Remove compiled kernels of other versions, in nobody's way."""
    roam()
    step_back()
    remove_unused(FOLDER)
