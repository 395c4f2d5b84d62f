"""Host memory for adapters' bytes, allocated once; on a machine with a GPU it is page-locked.

Memory that is locked when an adapter arrives would cost more than its copy, so all of it is locked at
the start, in a thread beside the loading of the model. It is handed out in pages of 1 MiB, lowest
first, so that it never fragments and mostly lies in one piece. What does not fit gets ordinary memory,
from which a copy is slower.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PAGE_BYTES: Final = 1 << 20


class HostBytes:
    """The memory of one adapter: bytes 0 to `nbytes`, in one or several pieces. Freed with the object."""

    def __init__(self, pieces: list[Tensor]) -> None:
        """Args:
        pieces: bytes, in order
        """
        self._pieces = pieces

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(len(piece) for piece in self._pieces)

    def parts(self, begin: int, end: int, *, at_most: int) -> Iterator[tuple[int, Tensor]]:
        """Memory that holds the bytes from `begin` to `end`: where each part starts, and its bytes."""
        first = 0
        for piece in self._pieces:
            low, high = max(begin, first), min(end, first + len(piece))
            for start in range(low, high, at_most):
                yield start, piece[start - first : min(start + at_most, high) - first]
            first += len(piece)


class HostArena:
    """Pages for the bytes of adapters. `allocate` belongs to one thread; memory is freed from any."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Reserve the memory, and begin to lock it if the device is a GPU."""
        num_pages = max(num_bytes // PAGE_BYTES, 1)
        memory = mmap.mmap(-1, num_pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to lock
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._free = list(range(num_pages))  # sorted
        self._returned: deque[list[int]] = deque()  # by finalizers, which may run at any point of any thread
        self._was_full = False
        self._locking: threading.Thread | None = None
        if device.type == "cuda":
            self._locking = threading.Thread(target=self._lock, args=(device,), name="arena", daemon=True)
            self._locking.start()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return len(self._memory)

    def allocate(self, nbytes: int) -> HostBytes:
        """Memory for an adapter: pages, or ordinary memory where too few are free."""
        if self._locking is not None:
            self._locking.join()
            self._locking = None
        while self._returned:
            self._free += self._returned.popleft()
            self._free.sort()
        count = math.ceil(nbytes / PAGE_BYTES)
        if count > len(self._free):
            if not self._was_full:
                logger.warning("an adapter lies outside the page-locked memory: raise --host-lora-bytes")
            self._was_full = True
            return HostBytes([torch.empty(nbytes, dtype=torch.uint8)])
        pages, self._free = self._free[:count], self._free[count:]
        held = HostBytes([self._memory[begin:end] for begin, end in _runs(pages)])
        weakref.finalize(held, self._returned.append, pages)
        return held

    def _lock(self, device: torch.device) -> None:
        try:
            with torch.cuda.device(device):
                runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                status = runtime.cudaHostRegister(self._memory.data_ptr(), len(self._memory), 0)
                torch.cuda.check_error(status)
        except RuntimeError as error:
            logger.warning("%d bytes for adapters could not be page-locked: %s", len(self._memory), error)


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive pages as spans of bytes."""
    begin = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[begin] * PAGE_BYTES, (pages[index - 1] + 1) * PAGE_BYTES
            begin = index
