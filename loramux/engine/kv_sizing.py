"""How many KV blocks fit. Pure arithmetic: what is measured on the device is passed in.

    bytes for KV = what may be used - what everything else takes
    blocks       = bytes for KV / bytes a block, but no more than max_num_seqs full sequences can fill

A configuration in which not even one sequence of `--max-model-len` tokens fits is refused with the whole
calculation, so that an operator sees which of its terms to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loramux.engine.errors import InvalidConfig

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What may be used, and what is taken already."""

    limit: int  # bytes
    origin: str  # of the limit, e.g. "139.8 GiB * 0.9 (--gpu-memory-utilization)"
    taken: tuple[tuple[str, int], ...] = ()  # what, bytes
    is_physical: bool = False  # more cannot be had, whatever a flag says

    @property
    def left(self) -> int:
        """Bytes for the KV cache; negative if there are none."""
        return self.limit - sum(size for _, size in self.taken)

    def __str__(self) -> str:
        terms = "".join(f" - {gib(size)} {what}" for what, size in self.taken)
        return f"{self.origin}{terms} = {gib(self.left)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDemand:
    """What the KV cache is wanted for."""

    block_bytes: int  # of all layers
    block_size: int  # tokens a block
    max_num_seqs: int
    max_model_len: int  # tokens
    may_shorten: bool  # the length is the model's limit, not the operator's wish
    num_blocks: int | None = None  # asked for by --num-gpu-blocks-override


@dataclass(frozen=True, slots=True)
class KvPlan:
    """The size of the KV cache."""

    num_blocks: int
    max_model_len: int  # tokens; shorter than wanted if no more fits


def budget_of_gpu(
    total: int,
    utilization: float,
    *,
    outside: int,
    allocated: int,
    parts: Sequence[tuple[str, int]] = (),
    reserves: Sequence[tuple[str, int]] = (),
) -> MemoryBudget:
    """What a GPU has for the KV cache.

    Args:
        total: bytes of the device
        utilization: share of it that may be in use, by whomever
        outside: bytes in use that the engine's tensors do not hold: contexts, libraries, other processes
        allocated: bytes of the engine's tensors
        parts: what of these has a name of its own; the rest is weights
        reserves: bytes that will be needed later
    """
    named = tuple((name, size) for name, size in parts if size)
    taken = (
        ("weights", allocated - sum(size for _, size in named)),
        *named,
        *((name, size) for name, size in reserves if size),
        ("outside the engine", max(outside, 0)),
    )
    return MemoryBudget(
        limit=int(total * utilization),
        origin=f"{gib(total)} * {utilization:g} (--gpu-memory-utilization)",
        taken=taken,
        is_physical=True,
    )


def plan_kv_cache(budget: MemoryBudget, demand: KvDemand) -> KvPlan:
    """Blocks that fit.

    Raises:
        InvalidConfig: they cannot hold one full sequence, or fewer fit than were asked for.
    """
    fitting = max(budget.left, 0) // demand.block_bytes
    if demand.num_blocks is not None and budget.is_physical and demand.num_blocks > fitting:
        wanted, flag = gib(demand.num_blocks * demand.block_bytes), "--num-gpu-blocks-override"
        message = f"{flag} {demand.num_blocks} needs {wanted}, but {fitting} blocks fit: {budget}"
        raise InvalidConfig(message, param=flag)
    blocks = demand.num_blocks or fitting
    needed = -(-demand.max_model_len // demand.block_size)
    if blocks < needed:
        if not demand.may_shorten or blocks == 0:
            raise InvalidConfig(_why_not(budget, demand, blocks, needed), param="--max-model-len")
        return KvPlan(blocks, blocks * demand.block_size)
    most = (demand.max_num_seqs + 1) * needed  # more could never be used
    return KvPlan(demand.num_blocks or min(blocks, most), demand.max_model_len)


def gib(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.2f} GiB"


def _why_not(budget: MemoryBudget, demand: KvDemand, blocks: int, needed: int) -> str:
    levers = "or raise --kv-cache-bytes"
    if budget.is_physical:
        levers = "--max-loras or --max-num-batched-tokens, or raise --gpu-memory-utilization"
    if demand.num_blocks is not None:
        levers = "or raise --num-gpu-blocks-override"
    return (
        f"one sequence of --max-model-len {demand.max_model_len} tokens needs {needed} KV blocks of "
        f"{demand.block_bytes} bytes, {gib(needed * demand.block_bytes)}, but {blocks} fit: {budget}; "
        f"lower --max-model-len{',' if budget.is_physical else ''} {levers}"
    )
