"""`Attention` through `torch.nn.attention.varlen`: torch's interface to FlashAttention 3 and 4.

Torch's own kernel (FlashAttention 2) refuses block tables. Which implementation takes them depends on
the GPU; the packages that bring them are not torch's, and are activated here. Steps that use this
attention are not captured in graphs: the longest lengths of a step are arguments on the host.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from loramux.engine.kernels.attention import (
    Angles,
    AttentionInput,
    AttentionShape,
    BatchLayout,
    KVCache,
    TorchAttention,
    token_rows,
)
from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.layers.norm import RMSNorm

IMPLEMENTATIONS: Final = {9: "FA3", 10: "FA4"}  # by major compute capability: those that take block tables
Attend = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class VarlenInput(AttentionInput):
    """As `varlen_attn` reads it."""

    write_rows: Tensor  # [num_tokens * num_kv_heads] int64
    starts: Tensor  # [num_seqs + 1] int32: where each sequence's queries begin
    lengths: Tensor  # [num_seqs] int32: keys of each
    block_table: Tensor  # [num_seqs, most blocks] int32
    max_queries: int
    max_keys: int


def varlen_refusal(shape: AttentionShape) -> str | None:
    """What this machine lacks for it; None = nothing, and the implementation is active now."""
    if shape.device.type != "cuda":
        return f"it needs a CUDA device, --device is {shape.device.type}"
    if shape.kv_dtype is not None:
        return "it reads no 8-bit cache, leave --kv-cache-dtype at auto"
    if shape.dtype == torch.float32:
        return "it computes in float16 or bfloat16, --dtype is float32"
    attend = _varlen_attn()
    if attend is None or "block_table" not in inspect.signature(attend).parameters:
        return f"it needs block tables in torch.nn.attention.varlen, torch 2.13; this is {torch.__version__}"
    major = torch.cuda.get_device_capability(shape.device)[0]
    name = IMPLEMENTATIONS.get(major)
    if name is None:
        return f"no FlashAttention reads block tables on compute capability {major}.x"
    try:
        torch_attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        return f"torch cannot activate {name}, a package that torch does not bring: {error}"
    return None


class VarlenAttention:
    """Plain torch writes the cache, FlashAttention reads it."""

    def __init__(self, shape: AttentionShape, attend: Attend | None = None) -> None:
        """Args:
        attend: with the interface of `varlen_attn`; None = torch's
        """
        self._shape = shape
        self._plain = TorchAttention(shape)
        self._attend = attend or _varlen_attn()

    def empty_cache(self, num_blocks: int) -> KVCache:
        """See `Attention.empty_cache`."""
        return self._plain.empty_cache(num_blocks)

    def plan(self, layout: BatchLayout) -> VarlenInput:
        """Lengths, and the block tables side by side."""
        used = -(-layout.ends // self._shape.block_size)
        table = np.zeros((len(used), int(used.max())), dtype=np.int64)
        for row, (ids, count) in enumerate(zip(layout.blocks, used, strict=True)):
            table[row, :count] = ids[:count]
        return VarlenInput(
            write_rows=self._tensor(token_rows(layout, self._shape)),
            starts=self._tensor(layout.offsets).int(),
            lengths=self._tensor(layout.ends).int(),
            block_table=self._tensor(table).int(),
            max_queries=int(layout.counts.max()),
            max_keys=int(layout.ends.max()),
        )

    def store(
        self,
        qkv: Tensor,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        plan: AttentionInput,
    ) -> Tensor:
        """See `Attention.store`."""
        assert isinstance(plan, VarlenInput)
        return self._plain.write(qkv, angles, norms, cache, plan.write_rows)

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        """See `Attention.attend`."""
        assert isinstance(plan, VarlenInput)
        out: Tensor = self._attend(  # type: ignore[misc]
            q,
            cache.k.transpose(1, 2),  # [num_blocks, block_size, num_kv_heads, head_dim]
            cache.v.transpose(1, 2),
            plan.starts,
            None,
            plan.max_queries,
            plan.max_keys,
            scale=self._shape.scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=plan.lengths,
            block_table=plan.block_table,
        )
        return out.reshape(q.shape[0], -1)

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._shape.device, non_blocking=True)


def _varlen_attn() -> Attend | None:
    """Torch's function; None if this torch is older than it."""
    try:
        found: Attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return found
