"""What is in use on a GPU: measured at the start, before the KV cache takes the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux.engine.kv_sizing import MemoryBudget, budget_of_gpu


def gpu_budget(
    device: torch.device,
    utilization: float,
    *,
    parts: Sequence[tuple[str, int]] = (),
    reserves: Sequence[tuple[str, int]] = (),
) -> MemoryBudget:
    """What a GPU has for the KV cache, once everything else is allocated; arguments as in `budget_of_gpu`."""
    free, total = torch.cuda.mem_get_info(device)
    return budget_of_gpu(
        total,
        utilization,
        outside=total - free - torch.cuda.memory_reserved(device),
        allocated=torch.cuda.memory_allocated(device),
        parts=parts,
        reserves=reserves,
    )
