"""Adapters from host memory into a CPU's lanes, without the interpreter.

They lie on the host as their files have them (see `packed.py`); a compiled kernel makes lanes of them, in
the loader's thread. While it works no other thread waits for the interpreter, which the step loop lets go
and takes again at each of its kernels: against a thread that does the same in many small calls, every one
of these would be a wait.
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import torch

from loramux.engine.adapters.arena import HostBytes
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.packed import AdapterPacker, Column, HostWeights, PackedAdapter
from loramux.engine.adapters.weights import HostAdapter, LanePool
from loramux.engine.kernels.cpu.dtypes import TAGS
from loramux.engine.kernels.cpu.unpack import PADDING, compile_for, unpack
from loramux.engine.parallel.shard import Shard
from loramux.engine.types import AdapterSpec


class LaneUnpacker:
    """Reads and unpacks adapters for a pool with a compiled kernel. Its calls belong to one thread."""

    max_host_bytes = None  # as configured

    def __init__(self, pool: LanePool, shard: Shard) -> None:
        """Compile what is needed, or read it from the cache."""
        self._pool = pool
        self._packer = AdapterPacker(pool, shard, _allocate)
        self._tag = TAGS[pool.dtype]
        compile_for(self._tag)
        self._ranks = {}  # address of a part's A -> its row of `SiteLanes.ranks`
        for lanes in pool.sites:
            for index in range(len(lanes.b)):
                self._ranks[lanes.a[:, index].data_ptr()] = lanes.ranks[index]

    def read(self, spec: AdapterSpec) -> PackedAdapter | None:
        """Read an adapter into host memory; None if it must be unpacked there.

        Raises:
            AdapterNotFound, AdapterIncompatible: its files are not what the inspection saw, or hold numbers
                that are not finite in the lanes' dtype.
        """
        if not self._packer.takes(spec, sys.maxsize):
            return None
        adapter = self._packer.read(spec)
        table = adapter.table.copy()
        aside = torch.empty(table[:, Column.COLUMNS].max(initial=0), dtype=self._pool.dtype)
        table[:, Column.TARGET], table[:, Column.TARGET_STRIDE] = aside.data_ptr(), 0
        self._unpack(adapter, table, 0)  # all lanes may be taken, and who loads it must know now
        return adapter

    def write(self, adapter: HostWeights, span: LaneSpan) -> None:
        """Fill lanes that no running sequence uses.

        Raises:
            AdapterIncompatible: it holds numbers that are not finite in the lanes' dtype.
        """
        if isinstance(adapter, HostAdapter):
            self._pool.write(adapter, span)
            return
        table = adapter.table.copy()
        table[:, Column.TARGET] += span.first * table[:, Column.TARGET_STRIDE] * self._pool.dtype.itemsize
        self._unpack(adapter, table, span.count)
        for target, rank in adapter.table[:, [Column.TARGET, Column.RANK]].tolist():
            if (ranks := self._ranks.get(target)) is not None:
                ranks[span.first] = rank

    def _unpack(self, adapter: PackedAdapter, table: npt.NDArray[np.int64], num_lanes: int) -> None:
        ((_, memory),) = adapter.memory.parts(0, adapter.memory.nbytes, at_most=sys.maxsize)
        flags = np.zeros(len(table), dtype=np.int64)
        unpack(self._tag, table, 0, len(table), memory.data_ptr(), num_lanes, flags)
        adapter.check(flags, self._pool.dtype)


def _allocate(nbytes: int) -> HostBytes:
    """In one piece, with what the kernel may read behind it."""
    return HostBytes([torch.empty(nbytes + PADDING, dtype=torch.uint8)[:nbytes]])
