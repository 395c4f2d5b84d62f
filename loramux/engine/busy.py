"""Is the server at work on what its engine sent? A byte that both processes see, without a message.

Where each of two cores has a compute thread, the server displaces one of them while it works, mostly at the
begin of a step, and every region that both threads share waits for it. So long the engine's first thread
computes alone (`loramux.engine.kernels.cpu.threads.is_alone`).
"""

from __future__ import annotations

import asyncio
import mmap
from pathlib import Path
from typing import Final

_FILE: Final = "busy"
_TURNS: Final = 3  # of the event loop, in which the streams' tasks write what a frame brought them


class BusyFlag:
    """Raised by the engine when it sends tokens, lowered by the server when they are with their readers."""

    __slots__ = ("_byte",)

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: of the socket between the two; whoever comes first makes the file.
        """
        with (folder / _FILE).open("a+b") as file:
            file.truncate(1)
            self._byte = mmap.mmap(file.fileno(), 1)

    def is_up(self) -> bool:
        """True between the two."""
        return self._byte[0] != 0

    def put_up(self) -> None:
        """Tokens are about to be sent."""
        self._byte[0] = 1

    def close(self) -> None:
        """Give its memory and descriptor back; it is of no use any more."""
        self._byte.close()

    async def lower_when_written(self) -> None:
        """Let the tasks of the streams write, then lower it."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        self._byte[0] = 0
