"""Sites with adapters in their lanes, and steps over them, for the tests of the GPU kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loramux.engine.adapters.lane_memory import LaneLayout, site_lanes
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.kernels.gpu import lora_input
from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.lora import LoraInput, Segment, SiteLanes, apply_lora, reference_lora
from loramux.engine.models.families import Site, SitePart
from loramux.engine.step_buffers import StepBuffers, StepLimits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POOL = 128  # lanes
ADAPTERS = [LaneSpan(0, 8, 1), LaneSpan(8, 8, 8), LaneSpan(16, 24, 17), LaneSpan(64, 64, 64)]
UNWRITTEN = LaneSpan(40, 8, 8)  # an adapter that does not change this site


def make_site(
    in_features: int,
    widths: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    layout: LaneLayout = LaneLayout.BEHIND_WEIGHT,
) -> SiteLanes:
    """A site whose lanes are all written, but for `UNWRITTEN` (zero), others than the adapters' with
    large numbers."""
    torch.manual_seed(sum(widths))
    parts = tuple(SitePart(f"p{i}", width) for i, width in enumerate(widths))
    site = site_lanes(Site("s", in_features, parts, bias=False), 0, POOL, layout, dtype=dtype, device=DEVICE)
    site.a.fill_(3e4)
    for b in site.b:
        b.fill_(3e4)
    if site.weight is not None:
        site.weight[: sum(widths)] = torch.randn(sum(widths), in_features, device=DEVICE) / in_features**0.5
    for span in ADAPTERS:
        own = slice(span.first, span.first + span.rank)
        site.a[own] = (torch.randn(span.rank, len(widths), in_features, device=DEVICE) / in_features**0.5).to(
            dtype
        )
        for b in site.b:
            b[own] = (torch.randn(span.rank, b.shape[1], device=DEVICE) / span.rank**0.5).to(dtype)
    held = slice(UNWRITTEN.first, UNWRITTEN.end)
    site.a[held] = 0
    for b in site.b:
        b[held] = 0
    return site


@dataclass(frozen=True)
class Step:
    """A step's tokens by adapter, and both forms of what the sites are told of them."""

    lora: GpuLoraInput
    segments: list[Segment]
    num_tokens: int  # padding included


def make_step(spans: list[LaneSpan | None], counts: list[int], padding: int = 0) -> Step:
    """Sequences in token order with so many tokens each."""
    offsets = np.concatenate(([0], np.cumsum(counts)))
    num_tokens = int(offsets[-1]) + padding
    limits = StepLimits(
        max_tokens=num_tokens, max_seqs=len(spans), max_blocks=1, block_size=16, num_lanes=POOL, vocab_size=1
    )
    buffers = StepBuffers(lora_input.fields(limits), DEVICE)
    lora_input.fill(buffers.host, spans, offsets, num_tokens)
    buffers.upload()
    found = lora_input.view(
        buffers.device,
        num_tokens,
        len(spans),
        num_lanes=lora_input.lanes_in_use(spans, POOL),
        decode_only=max(counts) == 1,
    )
    assert found is not None
    segments = [
        Segment(int(begin), int(end), span.first, span.rank)
        for begin, end, span in zip(offsets, offsets[1:], spans, strict=False)
        if span is not None
    ]
    return Step(found, segments, num_tokens)


# who the tokens belong to: spans of sequences, tokens of each, padding
_SMALL, _EIGHT, _ODD, _WIDE = ADAPTERS
DECODE = ([None, _SMALL, _EIGHT, _ODD, _WIDE, UNWRITTEN], [1] * 6, 2)
MIXED = ([_EIGHT, _EIGHT, None, _ODD, _WIDE, None], [1, 20, 3, 17, 2, 1], 3)


def reference(base: Tensor, x: Tensor, site: SiteLanes, step: Step) -> Tensor:
    """[num_tokens, out_features] base output and LoRA, in float64."""
    wide = SiteLanes(site.a.double(), [b.double() for b in site.b], site.offsets)
    out = base.double().clone()
    if step.num_tokens > 100:  # token by token takes too long
        apply_lora(out, x.double(), wide, LoraInput(None, step.segments))
    else:
        reference_lora(out, x.double(), wide, step.segments)
    return out
