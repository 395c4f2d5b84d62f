"""Adapters from host memory into a GPU's lanes, beside the steps that run.

    page-locked pages ──copies──► staging ──one kernel──► lanes        all on a side stream

Everything is issued and awaited by the loader's thread: the step loop hears of an adapter when its lanes
are complete. One adapter is on its way at a time, so the staging memory is never written while it is read.
Lanes are written after the steps that were launched before: one of them may still read what lay there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from loramux.engine.adapters.arena import HostArena
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.packed import CHUNK_BYTES, AdapterPacker, Column, HostWeights, PackedAdapter
from loramux.engine.adapters.weights import HostAdapter, LanePool
from loramux.engine.parallel.shard import Shard
from loramux.engine.types import AdapterSpec

STAGING_BYTES: Final = 128 << 20
NUM_READERS: Final = 4  # threads: one alone reads slower than the bus copies


class Scatter(Protocol):
    """`scatter` of `kernels/gpu/scatter.py`."""

    def __call__(
        self,
        table: Tensor,
        source: Tensor,
        flags: Tensor,
        like: Tensor,
        *,
        rows: slice,
        count: int,
        max_features: int,
    ) -> None:
        """Write lanes."""
        ...


class LaneTransfer:
    """Host memory, staging memory and the side stream between them. Its calls belong to one thread."""

    def __init__(
        self,
        pool: LanePool,
        shard: Shard,
        scatter: Scatter,
        *,
        host_bytes: int,
        device: torch.device,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        """Allocate everything. Steps are launched on the stream that is current here."""
        self._pool = pool
        self._scatter = scatter
        self._arena = HostArena(host_bytes, device)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        self._packer = AdapterPacker(pool, shard, self._arena.allocate, self._readers)
        is_gpu = device.type == "cuda"
        rows = self._packer.num_rows
        self._staging = torch.empty(staging_bytes, dtype=torch.uint8, device=device)
        self._host_table = torch.empty((rows, len(Column)), dtype=torch.int64, pin_memory=is_gpu)
        self._table = torch.empty_like(self._host_table, device=device)
        self._host_flags = torch.zeros(rows, dtype=torch.int32, pin_memory=is_gpu)
        self._flags = torch.zeros_like(self._host_flags, device=device)
        self._steps = torch.cuda.current_stream(device) if is_gpu else None
        self._stream = torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]
        self._done: Any = torch.cuda.Event(blocking=True) if is_gpu else None  # type: ignore[no-untyped-call]
        self._compile()

    @property
    def max_host_bytes(self) -> int:
        """Bytes of adapters to keep on the host: there is room for one that arrives before another leaves."""
        return self._arena.nbytes // 8 * 7

    @property
    def staging_bytes(self) -> int:
        """Bytes on the device."""
        return self._staging.nbytes + self._table.nbytes + self._flags.nbytes

    def read(self, spec: AdapterSpec) -> PackedAdapter | None:
        """Read an adapter into host memory; None if it must be unpacked there.

        Raises:
            AdapterNotFound, AdapterIncompatible: its files are not what the inspection saw.
        """
        return self._packer.read(spec) if self._packer.takes(spec, len(self._staging)) else None

    def write(self, adapter: HostWeights, span: LaneSpan) -> None:
        """Fill lanes that no running sequence uses; returns when they are complete.

        Raises:
            AdapterIncompatible: it holds numbers that are not finite in the lanes' dtype.
        """
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                if isinstance(adapter, HostAdapter):
                    self._wait_for_steps()
                    self._pool.write(adapter, span)
                    return
                self._write_packed(adapter, span)
        finally:
            if self._stream is not None:
                self._done.record(self._stream)
                self._done.synchronize()
        adapter.check(self._host_flags.numpy(), self._pool.dtype)

    def _write_packed(self, adapter: PackedAdapter, span: LaneSpan) -> None:
        table, batches = self._host_table.numpy(), list(adapter.batches(len(self._staging)))
        np.copyto(table, adapter.table)
        table[:, Column.TARGET] += span.first * table[:, Column.TARGET_STRIDE] * self._pool.dtype.itemsize
        for batch in batches:
            table[batch.rows, Column.SOURCE] -= batch.begin
        widest = int(table[:, Column.COLUMNS].max())
        self._table.copy_(self._host_table, non_blocking=True)
        self._flags.zero_()
        for index, batch in enumerate(batches):
            for start, part in adapter.memory.parts(batch.begin, batch.end, at_most=CHUNK_BYTES):
                place = start - batch.begin
                self._staging[place : place + len(part)].copy_(part, non_blocking=True)
            if index == 0:
                self._wait_for_steps()
            self._launch(batch.rows, count=span.count, max_features=widest)
        self._host_flags.copy_(self._flags, non_blocking=True)

    def _compile(self) -> None:
        """Launch the kernel on a row without features: the first adapter should not wait for a compiler."""
        self._table[0].zero_()
        self._launch(slice(0, 1), count=1, max_features=1)

    def _launch(self, rows: slice, *, count: int, max_features: int) -> None:
        self._scatter(
            self._table,
            self._staging,
            self._flags,
            self._pool.any_lanes,
            rows=rows,
            count=count,
            max_features=max_features,
        )

    def _wait_for_steps(self) -> None:
        if self._stream is not None and self._steps is not None:
            self._stream.wait_stream(self._steps)
