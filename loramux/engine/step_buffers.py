"""All facts of a step in one buffer: filled on the host, copied once, read where it always lies.

Everything that changes from step to step (ids, positions, block tables, lanes, sampling parameters)
is a field of one buffer, so that a step costs one copy and a captured graph finds its inputs at fixed
addresses. Each part of a step owns some fields and offers three functions:

    fields(limits) -> Fields     what it needs, for the largest step
    fill(host, ...)              numpy; a slot still holds an older step, so padding is written, too
    view(device, ...)            its inputs as slices of the device's tensors

    host slot 0 ─┐  side stream               compute stream
                 ├──────────────► staging 0 ─┐
    host slot 1 ─┘  (while the    staging 1 ─┴──► device tensors, read by kernels and graphs
                     last step runs)

With two slots the next step is filled and copied to the device's memory while the last one computes;
what the compute stream itself waits for is a copy within the device. On a CPU there are no streams,
and `upload` is one copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.engine.config import EngineConfig

Field = tuple[tuple[int, ...], npt.DTypeLike]  # shape and numpy dtype
Fields = Mapping[str, Field]
HostFields = Mapping[str, npt.NDArray[Any]]
DeviceFields = Mapping[str, Tensor]

ALIGNMENT: Final = 128  # bytes; kernels may assume 16
NUM_SLOTS: Final = 2
TOKEN_MULTIPLE: Final = 16  # to which steps without a graph are padded: kernels are compiled for it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step: what fields are sized for."""

    max_tokens: int  # computed in a step, padding included
    max_seqs: int  # in a step, padding included
    max_blocks: int  # KV blocks of one sequence
    block_size: int  # tokens of a KV block
    num_lanes: int  # of the pool; 0 without LoRA
    vocab_size: int


def step_limits(config: EngineConfig, *, max_model_len: int, vocab_size: int) -> StepLimits:
    """The largest step of a configuration."""
    most = max(config.max_num_batched_tokens, config.max_num_seqs)
    return StepLimits(
        max_tokens=-(-most // TOKEN_MULTIPLE) * TOKEN_MULTIPLE,
        max_seqs=config.max_num_seqs,
        max_blocks=-(-max_model_len // config.block_size),
        block_size=config.block_size,
        num_lanes=config.lane_pool,
        vocab_size=vocab_size,
    )


@dataclass(frozen=True, slots=True)
class _Slot:
    """One step's facts on their way to the device."""

    host: Tensor  # bytes, pinned if the device is a GPU
    staging: Tensor  # bytes on the device; on a CPU the same as `host`
    arrays: HostFields  # views of `host`
    staged: Any  # event: `host` has been read, `staging` is complete; None on a CPU
    read: Any  # event: `staging` has been read; None on a CPU


class StepBuffers:
    """The fields of all parts, on the host and on the device."""

    def __init__(self, fields: Fields, device: torch.device) -> None:
        """Allocate everything. The field with the most bytes lies last, see `upload`."""
        self._sizes = {
            name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in fields.items()
        }
        names = sorted(fields, key=lambda name: self._sizes[name])
        self._last = names[-1]
        self._last_rows = fields[self._last][0][0]
        offsets: dict[str, int] = {}
        end = 0
        for name in names:
            offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offsets[name] + self._sizes[name]
        self._offset, self._num_bytes = offsets[self._last], end
        self._is_cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self.device: DeviceFields = {
            name: _as_tensor(self._device, offsets[name], fields[name]) for name in names
        }
        self._slots = [self._slot(fields, offsets, device) for _ in range(NUM_SLOTS)]
        self._current = 0

    @property
    def host(self) -> HostFields:
        """The current slot's fields, to be filled. They hold what an older step wrote."""
        return self._slots[self._current].arrays

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._num_bytes * (1 + NUM_SLOTS if self._is_cuda else 1)

    def next_slot(self) -> HostFields:
        """Turn to the other slot, waiting until its last upload has left it; returns its fields."""
        self._current = (self._current + 1) % NUM_SLOTS
        slot = self._slots[self._current]
        if slot.staged is not None:
            slot.staged.synchronize()
        return slot.arrays

    def upload(self, rows: Mapping[str, int] | None = None) -> None:
        """Copy the current slot to the device's tensors, in order with what the current stream computes.

        Args:
            rows: of some fields, how many leading rows matter. Only the largest field, whose rows
                lie at the buffer's end, is cut short; of the others everything is copied.
        """
        slot = self._slots[self._current]
        end = self._num_bytes
        if rows is not None and self._last in rows:
            used = min(rows[self._last], self._last_rows)
            end = self._offset + used * (self._sizes[self._last] // self._last_rows)
        if self._side is None:
            self._device[:end].copy_(slot.host[:end])
            return
        stream = torch.cuda.current_stream(self._device.device)
        with torch.cuda.stream(self._side):
            self._side.wait_event(slot.read)
            slot.staging[:end].copy_(slot.host[:end], non_blocking=True)
            slot.staged.record(self._side)
        stream.wait_event(slot.staged)
        self._device[:end].copy_(slot.staging[:end], non_blocking=True)
        slot.read.record(stream)

    def _slot(self, fields: Fields, offsets: Mapping[str, int], device: torch.device) -> _Slot:
        host = torch.zeros(self._num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
        arrays = {name: _as_tensor(host, offsets[name], field).numpy() for name, field in fields.items()}
        if not self._is_cuda:
            return _Slot(host, host, arrays, None, None)
        staging = torch.zeros(self._num_bytes, dtype=torch.uint8, device=device)
        staged, read = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        read.record(torch.cuda.current_stream(device))  # the first copy must not pass the zeros
        return _Slot(host, staging, arrays, staged, read)


def _as_tensor(buffer: Tensor, offset: int, field: Field) -> Tensor:
    """A part of a buffer of bytes as the field that lies there."""
    shape, dtype = field
    kind = torch.from_numpy(np.empty(0, dtype=dtype)).dtype
    size = math.prod(shape) * kind.itemsize
    return buffer[offset : offset + size].view(kind).view(shape)
