"""The parts of one decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

from loramux.engine.layers.norm import RMSNorm
from loramux.engine.layers.parts import LinearSite, ResidualNorm


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """In the order in which they are computed; attention comes between `head_norms` and `attn_out`."""

    norm_1: ResidualNorm
    qkv: LinearSite
    head_norms: tuple[RMSNorm, RMSNorm] | None  # of q's and k's heads
    attn_out: LinearSite
    norm_2: ResidualNorm
    mlp_in: LinearSite
    mlp_out: LinearSite
    window: int | None
