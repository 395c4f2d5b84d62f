"""The processes of the other ranks, as rank 0 holds them: start, tell, ask, notice an end.

A rank cannot be replaced while the others go on, since its KV cache and its lanes are lost: when one
ends, the engine ends. Its process is waited for in a thread, so that this is noticed at once, whatever
rank 0 is doing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec
import torch

from loramux.engine.config import EngineConfig
from loramux.engine.errors import EngineDead, from_wire
from loramux.engine.parallel import commands
from loramux.engine.parallel.commands import Answer, Command
from loramux.engine.parallel.peers import TIMEOUT

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S: Final = 5.0
_START_FAILS_S: Final = 10.0  # in which rank 0 itself ends a start that another rank left
_GONE: Final = "a rank of the tensor-parallel engine is gone"
_NOTICE_S: Final = 2.0  # in which a process that ended is known to have ended


class Crew:
    """Ranks 1 and up of one engine.

    Args:
        config: what every rank is started with.
        device: of this rank.
        on_lost: called with a sentence when a process ends that was not told to, in a thread.
    """

    def __init__(self, config: EngineConfig, device: torch.device, on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        self._folder = tempfile.TemporaryDirectory(prefix="loramux-ranks-")
        self.store = Path(self._folder.name) / "store"
        self._life, self._life_of_others = os.pipe()[::-1]
        self._sending = threading.Lock()  # steps come from one thread, adapters from another
        self._closed = threading.Event()
        self._is_complete = False  # all ranks have loaded their parts
        self.lost: str | None = None  # which rank ended, once one did
        self._lost_one = threading.Event()
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, config.tensor_parallel_size):
            self._start(rank, config, device)
        os.close(self._life_of_others)
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}-watch", daemon=True)
            for rank, process in enumerate(self._processes, 1)
        ]
        for watcher in self._watchers:
            watcher.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1 and up."""
        return [process.pid for process in self._processes]

    def tell(self, command: Command) -> None:
        """Send a command to every rank, after all commands before it.

        Raises:
            EngineDead: a rank is gone.
        """
        frame = commands.encode(command)
        try:
            with self._sending:
                for pipe in self._pipes:
                    pipe.send_bytes(frame)
        except OSError as error:
            raise EngineDead(self._why() or _GONE) from error

    def answers(self) -> list[Answer]:
        """The next answer of every rank.

        Raises:
            EngineDead: a rank is gone, or says nothing.
        """
        found: list[Answer] = []
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                if not pipe.poll(TIMEOUT.total_seconds()):
                    raise EngineDead(f"rank {rank} of the tensor-parallel engine does not answer")
                found.append(commands.decode_answer(pipe.recv_bytes()))
            except (EOFError, OSError):
                raise EngineDead(self._why() or _GONE) from None
        return found

    def wait_complete(self) -> None:
        """Return when every rank has loaded its part of the model.

        Raises:
            LoramuxError: a rank could not.
            EngineDead: a rank ended.
        """
        self.check(self.answers())
        self._is_complete = True

    def last_words(self) -> list[Answer]:
        """What ranks said before they ended, if rank 0 failed while all were starting."""
        found: list[Answer] = []
        for pipe in self._pipes:
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll(0):
                    found.append(commands.decode_answer(pipe.recv_bytes()))
        return found

    def check(self, answers: list[Answer]) -> None:
        """Raise the first error that a rank answered."""
        for answer in answers:
            if isinstance(answer, commands.Failed):
                raise from_wire(answer.error, answer.message, answer.param)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """What fails in here because another rank is gone raises EngineDead, which says so."""
        try:
            yield
        except RuntimeError as error:
            if (why := self._why()) is not None:
                raise EngineDead(why) from error
            raise

    def close(self) -> None:
        """End the processes: ask, then kill."""
        self._closed.set()
        with contextlib.suppress(EngineDead):
            self.tell(commands.Shutdown())
        for process in self._processes:
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for watcher in self._watchers:
            watcher.join()
        for pipe in self._pipes:
            pipe.close()
        os.close(self._life)
        self._folder.cleanup()

    def _start(self, rank: int, config: EngineConfig, device: torch.device) -> None:
        own, other = socket.socketpair()
        with other:
            process = subprocess.Popen(
                (
                    *(sys.executable, "-m", "loramux.engine.parallel.worker"),
                    *(str(rank), str(config.tensor_parallel_size), str(self.store)),
                    *(str(other.fileno()), str(self._life_of_others)),
                    msgspec.json.encode(config).decode(),
                ),
                env={**os.environ, **_visible_gpu(rank, device)},
                pass_fds=(other.fileno(), self._life_of_others),
                start_new_session=True,  # Ctrl-C reaches rank 0 only, which then ends the others
            )
        self._processes.append(process)
        self._pipes.append(Connection(own.detach()))

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._closed.is_set():
            return
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        why = f"rank {rank} of the tensor-parallel engine (process {process.pid}) ended: {how}"
        self.lost = self.lost or why
        self._lost_one.set()
        logger.error("%s; the engine ends with it", why)
        if self._is_complete or not self._closed.wait(_START_FAILS_S):
            self._on_lost(why)

    def _why(self) -> str | None:
        """Which rank ended, if one did."""
        self._lost_one.wait(_NOTICE_S)
        return self.lost


def _visible_gpu(rank: int, device: torch.device) -> dict[str, str]:
    """One GPU for each rank, which is every process's first: rank 0 computes on the first of all."""
    if device.type != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[rank].strip() if visible else str(rank)}
