"""Read parts of files into device memory, without a copy of the model in the host's.

    file ──preadv──► pinned chunk ──copy on a side stream──► tensor on the device

Several threads each take a free chunk, read and start its copy, so that reads of different chunks overlap
with each other and with the copies. On a CPU the same code copies without streams.
"""

from __future__ import annotations

import os
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

CHUNK_BYTES: Final = 4 << 20  # so that a tensor of 8 MiB is read by two threads
NUM_CHUNKS: Final = 16
MAX_THREADS: Final = 8


@dataclass(frozen=True, slots=True)
class _Chunk:
    memory: Tensor  # bytes, pinned if the device is a GPU
    view: memoryview
    copied: Any  # event: its last copy has left it; None on a CPU


class DeviceReader:
    """A ring of chunks and the threads that fill them."""

    def __init__(
        self, device: torch.device, *, chunk_bytes: int = CHUNK_BYTES, num_chunks: int = NUM_CHUNKS
    ) -> None:
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
        for _ in range(num_chunks):
            self._free.put(self._new_chunk())
        self._threads = ThreadPoolExecutor(
            min(MAX_THREADS, num_chunks, os.cpu_count() or 1), thread_name_prefix="weight-reader"
        )

    def read(self, fd: int, offset: int, out: Tensor) -> None:
        """Fill a contiguous tensor with the bytes of a file from `offset` on.

        Returns when the host has read all of them; work on the current stream finds them in place.

        Raises:
            OSError: the file cannot be read, or ends before that.
        """
        target = out.view(-1).view(torch.uint8)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # who used this memory before
        begins = range(0, len(target), self._chunk_bytes)
        reads = [
            self._threads.submit(
                self._read_chunk, fd, offset + begin, target[begin : begin + self._chunk_bytes]
            )
            for begin in begins
        ]
        errors = [error for read in reads if (error := read.exception()) is not None]
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads and wait for the copies."""
        self._threads.shutdown()
        if self._stream is not None:
            self._stream.synchronize()

    def _new_chunk(self) -> _Chunk:
        memory = torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        event = torch.cuda.Event() if self._stream is not None else None  # type: ignore[no-untyped-call]
        return _Chunk(memory, memoryview(memory.numpy().data), event)

    @torch.inference_mode()  # a mode of the thread; `out` may have been made in it
    def _read_chunk(self, fd: int, offset: int, out: Tensor) -> None:
        chunk = self._free.get()
        try:
            if chunk.copied is not None:
                chunk.copied.synchronize()
            read_exactly(fd, chunk.view[: len(out)], offset)
            if self._stream is None:
                out.copy_(chunk.memory[: len(out)])
                return
            with torch.cuda.stream(self._stream):
                out.copy_(chunk.memory[: len(out)], non_blocking=True)
                chunk.copied.record(self._stream)
        finally:
            self._free.put(chunk)


def read_exactly(fd: int, out: memoryview, offset: int) -> None:
    """Fill `out` with a file's bytes from `offset` on; the interpreter is free meanwhile.

    Raises:
        OSError: the file cannot be read, or ends before that.
    """
    done = 0
    while done < len(out):
        step = os.preadv(fd, [out[done:]], offset + done)
        if step == 0:
            raise OSError(f"the file ends {len(out) - done} bytes early")
        done += step
