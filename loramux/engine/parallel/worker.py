"""A rank of a tensor-parallel engine other than the first: a process that does what rank 0 does.

Started by `Crew` as `python -m loramux.engine.parallel.worker RANK SIZE STORE PIPE LIFE CONFIG_JSON`, the
last but one being file descriptors. It ends when it is told to, when rank 0 is gone, or by an error; rank 0
then ends with it.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec
import torch

from loramux.engine import log_format
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.packed import HostWeights
from loramux.engine.background import step_back
from loramux.engine.config import EngineConfig
from loramux.engine.errors import LoramuxError
from loramux.engine.model_runner import ModelRunner, find_device
from loramux.engine.parallel import commands
from loramux.engine.parallel.commands import Answer, Command, Done, Failed
from loramux.engine.parallel.mirror import decode_step
from loramux.engine.parallel.peers import Peers
from loramux.engine.types import AdapterSpec

logger = logging.getLogger(__name__)

_FAREWELL_S: Final = 2.0  # in which the end of rank 0 is noticed, after a sum that failed because of it


class Worker:
    """Carries out rank 0's commands: steps in the calling thread, adapters in one of its own."""

    def __init__(self, runner: ModelRunner, pipe: Connection) -> None:
        self._runner = runner
        self._pipe = pipe
        self._adapters: dict[str, HostWeights] = {}
        self._chores: queue.SimpleQueue[Command] = queue.SimpleQueue()
        threading.Thread(target=self._do_chores, name="adapters", daemon=True).start()

    def run(self) -> None:
        """Until `Shutdown`, or rank 0 is gone."""
        while True:
            try:
                command = commands.decode_command(self._pipe.recv_bytes())
            except EOFError:
                return
            match command:
                case commands.Step():
                    self._runner.follow(decode_step(command))
                case commands.Shutdown():
                    return
                case _:
                    self._chores.put(command)

    def _do_chores(self) -> None:
        step_back()
        torch.set_num_threads(1)  # of this thread: the others belong to the steps
        while True:
            match self._chores.get():
                case commands.ReadAdapter(spec):
                    self._answer(self._read(spec))
                case commands.FillLanes(digest, first, count, rank):
                    self._answer(self._fill(digest, LaneSpan(first, count, rank)))
                case commands.DropAdapter(digest):
                    self._adapters.pop(digest, None)
                case commands.KeepTables(residents):
                    self._runner.keep_tables(set(residents))

    def _read(self, spec: AdapterSpec) -> Answer:
        try:
            adapter = self._runner.read_adapter(spec)
        except Exception as error:  # noqa: BLE001 - one bad file must not end the rank
            return _failed(error)
        self._adapters[spec.digest] = adapter
        return Done(adapter.nbytes)

    def _fill(self, digest: str, span: LaneSpan) -> Answer:
        try:
            self._runner.fill_lanes(self._adapters[digest], span)
        except Exception as error:  # noqa: BLE001 - reported to rank 0
            return _failed(error)
        return Done()

    def _answer(self, answer: Answer) -> None:
        self._pipe.send_bytes(commands.encode(answer))


def _failed(error: Exception) -> Failed:
    if isinstance(error, LoramuxError):
        return Failed(type(error).__name__, error.message, error.param)
    return Failed(LoramuxError.__name__, f"the adapter could not be moved: {error!r}", None)


def main(rank: int, size: int, store: Path, pipe: Connection, life: int, config: EngineConfig) -> int:
    """Load this rank's part of the model and follow rank 0. Returns the exit code of a start that failed."""
    log_format.set_up(logging.INFO, config.log_format, process=f"engine rank {rank}")
    threading.Thread(target=_end_with_rank_0, args=(life,), name="rank-0-watch", daemon=True).start()
    pipe.send_bytes(commands.encode(Done()))  # here, and about to meet the others
    try:
        peers = Peers(rank, size, store, find_device(config.device))
        runner = ModelRunner(config, peers=peers)
    except LoramuxError as error:
        pipe.send_bytes(commands.encode(Failed(type(error).__name__, error.message, error.param)))
        return 1
    pipe.send_bytes(commands.encode(Done()))
    try:
        Worker(runner, pipe).run()
    except RuntimeError:
        time.sleep(_FAREWELL_S)  # if rank 0 is gone, that is why, and the process ends here
        raise
    os._exit(0)  # at once: tidying up behind torch takes a second, and rank 0 waits


def _end_with_rank_0(life: int) -> None:
    """`life` is the end of a pipe whose other end only rank 0 holds."""
    os.read(life, 1)
    os._exit(0)


if __name__ == "__main__":
    _rank, _size, _store, _pipe, _life, _config = sys.argv[1:]
    sys.exit(
        main(
            int(_rank),
            int(_size),
            Path(_store),
            Connection(int(_pipe)),
            int(_life),
            msgspec.json.decode(_config, type=EngineConfig),
        )
    )
