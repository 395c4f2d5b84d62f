"""An adapter's bytes as they lie in its files, and the table of how they become lanes.

The part of an adapter's files that holds tensors is read as it is, and one kernel turns it into lanes: on a
GPU (see `transfer.py`), where it is copied to the device in large pieces, or on a CPU (`unpacking.py`).
`Column` says what the table holds: a row for each A and each B of the model. Adapters that change more than
linear layers, or do it by DoRA, are read by `weights.py` on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.engine.adapters.arena import HostBytes
from loramux.engine.adapters.files import AdapterFiles
from loramux.engine.adapters.weights import HostAdapter, LanePool
from loramux.engine.errors import AdapterIncompatible
from loramux.engine.parallel.shard import Shard
from loramux.engine.types import AdapterSpec, LoraModule, TensorRef

KINDS: Final = {"BF16": 0, "F16": 1, "F32": 2}
ITEM_BYTES: Final = np.array([2, 2, 4])  # by kind
CHUNK_BYTES: Final = 8 << 20  # of one read, and of one copy to the device
ALIGNMENT: Final = 16  # bytes: of each file's part, and of each batch


class Column(IntEnum):
    """Of the table."""

    SOURCE = 0  # first byte, in the adapter's bytes
    LANE_STRIDE = 1  # elements from one lane's row to the next
    COLUMN_STRIDE = 2  # elements from one feature to the next
    KIND = 3  # dtype of the source, see KINDS
    RANK = 4  # lanes that carry weights; 0 = the adapter leaves this module alone
    COLUMNS = 5  # features
    TARGET = 6  # address of lane 0
    TARGET_STRIDE = 7  # elements from one lane to the next; its features are consecutive
    SCALE = 8  # the bits of a float32; 1 for A


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of the table whose sources lie near each other."""

    rows: slice
    begin: int  # first byte of the adapter's that they read, a multiple of ALIGNMENT
    end: int


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter on the host as its files have it."""

    digest: str
    rank: int
    memory: HostBytes
    table: npt.NDArray[np.int64]  # [rows, columns of Column], by source
    keys: list[str]  # of each row's tensor, for errors; empty where there is none
    other_ranks_bytes: int = 0  # that the other ranks of a tensor-parallel engine hold

    @property
    def nbytes(self) -> int:
        """Bytes held, on every rank."""
        return self.memory.nbytes + self.other_ranks_bytes

    def check(self, flags: npt.NDArray[Any], dtype: torch.dtype) -> None:
        """What became of it in lanes.

        Args:
            flags: [rows]: not 0 where a number was not finite in the lanes' dtype

        Raises:
            AdapterIncompatible: one was not.
        """
        bad = np.flatnonzero(flags)
        if len(bad):
            raise AdapterIncompatible(
                f"tensor {self.keys[bad[0]]} of the adapter holds numbers that are not finite in {dtype}"
            )

    def batches(self, limit: int) -> Iterator[Batch]:
        """All rows, in batches that read at most `limit` bytes."""
        rank, item = self.table[:, Column.RANK], ITEM_BYTES[self.table[:, Column.KIND]]
        last = (rank - 1) * self.table[:, Column.LANE_STRIDE]
        last += (self.table[:, Column.COLUMNS] - 1) * self.table[:, Column.COLUMN_STRIDE]
        ends = np.where(rank > 0, self.table[:, Column.SOURCE] + (last + 1) * item, 0)
        ends = np.maximum.accumulate(ends)
        first = 0
        while first < len(ends):
            begin = int(self.table[first, Column.SOURCE]) // ALIGNMENT * ALIGNMENT
            after = int(np.searchsorted(ends, begin + limit, side="right"))
            assert after > first, "a tensor does not fit into the staging memory"
            yield Batch(slice(first, after), begin, int(ends[after - 1]))
            first = after


HostWeights = HostAdapter | PackedAdapter


class AdapterPacker:
    """Reads adapters for one pool of lanes."""

    def __init__(
        self,
        pool: LanePool,
        shard: Shard,
        allocate: Callable[[int], HostBytes],
        threads: Executor | None = None,
    ) -> None:
        """Args:
        allocate: memory for so many bytes
        threads: that read the pieces of a file side by side; None = the calling thread does
        """
        self._allocate = allocate
        self._threads = threads
        self._modules: dict[str, int] = {}  # path -> row of its A in the template; its B is the next
        rows: list[list[int]] = []
        skipped: list[int] = []  # features of the whole module before this rank's: input of A, output of B
        own = shard.own
        for layer in range(own.num_layers):
            for site, whole in zip(own.sites, shard.whole.sites, strict=True):
                lanes = pool.site(layer, site.name)
                assert lanes is not None
                for index, part in enumerate(site.parts):
                    name = own.layer_prefix(layer) + part.module
                    self._modules[name] = len(rows)
                    rows.append(_row(lanes.a[:, index], whole.in_features, 1))
                    rows.append(_row(lanes.b[index], 1, 0))
                    skipped += [shard.columns(name).start or 0, shard.rows(name).start or 0]
        self._template = np.array(rows, dtype=np.int64)
        self._skipped = np.array(skipped, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Of every table."""
        return len(self._template)

    def takes(self, spec: AdapterSpec, limit: int) -> bool:
        """True if it is LoRA on linear layers alone, its tensors aligned and of at most `limit` bytes."""
        if spec.tables or any(m.magnitude or m.module not in self._modules for m in spec.modules):
            return False
        most = int(max(self._template[:, Column.COLUMNS].max(), self._template[:, Column.LANE_STRIDE].max()))
        if spec.rank * most * int(ITEM_BYTES.max()) + ALIGNMENT > limit:
            return False
        places = _places(spec)
        return all(
            (ref.offset - places[ref.file].begin) % ITEM_BYTES[KINDS[ref.dtype]] == 0
            for module in spec.modules
            for ref in (module.a, module.b)
        )

    def read(self, spec: AdapterSpec) -> PackedAdapter:
        """Read an adapter that `takes` accepts.

        Raises:
            AdapterNotFound: a file is gone since the inspection.
            AdapterIncompatible: a file changed since the inspection.
        """
        places = _places(spec)
        table = self._table(spec.modules, places)
        keys = [""] * len(table)
        for module in spec.modules:
            row = self._modules[module.module]
            keys[row : row + 2] = module.a.key, module.b.key
        order = np.argsort(table[:, Column.SOURCE], kind="stable")
        memory = self._allocate(max(place.base + place.end - place.begin for place in places.values()))
        with AdapterFiles(spec) as files:
            reads = [
                (name, place.begin + start - place.base, part)
                for name, place in places.items()
                for start, part in memory.parts(
                    place.base, place.base + place.end - place.begin, at_most=CHUNK_BYTES
                )
            ]
            self._read_all(files, reads)
        return PackedAdapter(spec.digest, spec.rank, memory, table[order], [keys[row] for row in order])

    def _read_all(self, files: AdapterFiles, reads: list[tuple[str, int, Tensor]]) -> None:
        if self._threads is None:
            for read in reads:
                files.read_into(*read)
            return
        ends = [self._threads.submit(files.read_into, *read) for read in reads]
        errors = [error for end in ends if (error := end.exception()) is not None]
        if errors:
            raise errors[0]

    def _table(self, modules: list[LoraModule], places: dict[str, _Place]) -> npt.NDArray[np.int64]:
        table = self._template.copy()
        a = np.array([self._modules[m.module] for m in modules], dtype=np.int64)
        b = a + 1
        rank = np.array([m.rank for m in modules], dtype=np.int64)
        scale = np.array([m.scale for m in modules], dtype=np.float32)
        for rows, refs in ((a, [m.a for m in modules]), (b, [m.b for m in modules])):
            table[rows, Column.KIND] = [KINDS[ref.dtype] for ref in refs]
            table[rows, Column.RANK] = rank
            table[rows, Column.SOURCE] = [places[ref.file].position(ref) for ref in refs]
        table[b, Column.COLUMN_STRIDE] = rank
        table[b, Column.SCALE] = scale.view(np.int32)
        item = ITEM_BYTES[table[:, Column.KIND]]
        table[:, Column.SOURCE] += self._skipped * table[:, Column.COLUMN_STRIDE] * item
        return table


@dataclass(frozen=True, slots=True)
class _Place:
    """The part of one file that holds tensors, and where it goes."""

    begin: int  # in the file
    end: int
    base: int  # in the adapter's bytes

    def position(self, ref: TensorRef) -> int:
        """Where a tensor lies in the adapter's bytes."""
        return self.base + ref.offset - self.begin


def _row(lanes: Tensor, lane_stride: int, column_stride: int) -> list[int]:
    """A row of the template, of a module that no adapter changes.

    Args:
        lanes: [num_lanes, features]
    """
    assert lanes.stride(1) == 1
    one = int(np.float32(1).view(np.int32))
    return [0, lane_stride, column_stride, 0, 0, lanes.shape[1], lanes.data_ptr(), lanes.stride(0), one]


def _places(spec: AdapterSpec) -> dict[str, _Place]:
    """Of every weights file."""
    begins: dict[str, int] = {}
    for module in spec.modules:
        for ref in (module.a, module.b):
            begins[ref.file] = min(ref.offset, begins.get(ref.file, ref.offset))
    places, base = {}, 0
    for file in spec.files:
        if file.name in begins:
            places[file.name] = place = _Place(begins[file.name], file.size, base)
            base = -(-(base + place.end - place.begin) // ALIGNMENT) * ALIGNMENT
    return places
