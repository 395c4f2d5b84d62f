"""What the ranks of a tensor-parallel engine tell each other while they compute: sums and logits.

A group of its own, not torch's default one, so that an application may use torch.distributed as it
likes beside an `LLM`. NCCL between GPUs, where every call is queued on the current stream and may be
part of a graph; gloo over the loopback interface between CPU processes.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

# Of one call. A rank that died is noticed at once by other means; this ends an engine of which one
# rank hangs. Longer than any rank may load its part of the model after the others.
TIMEOUT: Final = timedelta(minutes=10)


class Peers:
    """The other ranks, as the model of this rank sees them: all make the same calls in the same order.

    A call raises RuntimeError if another rank is gone, or does not come within TIMEOUT.
    """

    def __init__(self, rank: int, size: int, store: Path, device: torch.device) -> None:
        """Meet the other ranks; returns when all have come.

        Args:
            store: a file in a folder that is shared by the ranks and nobody else.
        """
        self.rank = rank
        self.size = size
        self._device = device
        self._group: Any = _connect(rank, size, store, device)
        self.smallest(0)  # the first call connects the ranks: do it now

    def add(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place; x is contiguous and as large on every rank."""
        options = _c10d().AllreduceOptions()
        options.asyncOp = False
        _wait(self._group.allreduce([x], options))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[num_rows, n] of each rank → [num_rows, size * n], side by side."""
        num_rows, width = x.shape
        out = x.new_empty(self.size * num_rows, width)
        options = _c10d().AllgatherOptions()
        options.asyncOp = False
        _wait(self._group._allgather_base(out, x.contiguous(), options))
        return out.view(self.size, num_rows, width).transpose(0, 1).reshape(num_rows, self.size * width)

    def share(self, x: Tensor) -> None:
        """Rank 0's x on every rank, in place; x is contiguous and as large on every rank."""
        options = _c10d().BroadcastOptions()
        options.rootRank = 0
        options.asyncOp = False
        _wait(self._group.broadcast([x], options))

    def smallest(self, value: int) -> int:
        """The least of all ranks' values."""
        own = torch.tensor([value], dtype=torch.int64, device=self._device)
        options = _c10d().AllreduceOptions()
        options.reduceOp = _c10d().ReduceOp.MIN
        _wait(self._group.allreduce([own], options))
        return int(own.item())

    def close(self) -> None:
        """Leave the group, whether the others are still there or not; its threads end."""
        if self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def abort(self) -> None:
        """Let a call that waits for another rank fail; from another thread."""
        self._group.abort()


def _wait(work: Any) -> None:
    """Let the current stream wait, on a CPU the caller; a backend that has done so returns nothing."""
    if work is not None:
        work.wait()


def _connect(rank: int, size: int, store: Path, device: torch.device) -> Any:
    c10d = _c10d()
    meeting = dist.FileStore(str(store), size)  # type: ignore[attr-defined]
    if device.type == "cuda":
        nccl = c10d.ProcessGroupNCCL.Options()
        nccl._timeout = TIMEOUT
        return c10d.ProcessGroupNCCL(meeting, rank, size, nccl)
    gloo = c10d.ProcessGroupGloo._Options()
    gloo._timeout = TIMEOUT
    gloo._threads = 1
    gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return c10d.ProcessGroupGloo(meeting, rank, size, gloo)


def _c10d() -> Any:
    """The part of torch.distributed below its default group; it carries no types."""
    return dist.distributed_c10d
