"""LoRA over rank lanes: what one wrapped site adds to its base output.

    out[t, part] += (x[t] · A[lane, part]ᵀ) · B_part[lane]     summed over the lanes of t's adapter

The pool of a site holds one A row a lane and part (a fused site such as qkv has several parts that
share their input) and one B row a lane and part; alpha / rank is already folded into B. A token's
adapter owns consecutive lanes [first, first + rank); base tokens own none.

DoRA scales the whole output of a layer: y = bias + g * (W x + scale * B A x), with one g a feature,
fixed when the adapter is loaded. Its lanes hold B with g folded in, too, so that before the lanes are
added only the base output of these tokens has to be scaled (`OutputGain`).

Two regimes, chosen by `plan_lora` from the number of tokens:

- few tokens (decode): on a CPU, a compiled kernel in which each token reads its own lanes only. In
  plain torch, one shrink over the pool's prefix that is in use, a mask that keeps each token's own
  lanes, one expand a part: operator dispatch dominates, so fewer and larger is faster.
- many tokens (prompt chunks): tokens of one adapter are consecutive; each segment is shrunk and
  expanded with its true rank, so arithmetic is not multiplied by the number of adapters resident. On a
  CPU that multiplies pairs of bfloat16 a compiled kernel does that and the base product in one, for
  every long enough run of one adapter's tokens.

`reference_lora` says the same token by token and is what the tests hold every form to. Adapters
hold finite numbers only (checked at load), so a masked lane contributes exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.kernels.cpu.lora import LoraKernel, LoraRows, site_table
from loramux.engine.kernels.cpu.lora_prompts import LEAST_PROMPT, LEAST_TOKENS, LoraPrompts

ROW_MULTIPLE = 128  # of [weight; lanes], so that the tiles of a product are whole
MASKED_MAX_TOKENS = 64  # above it a token range is computed segment by segment


@dataclass(slots=True)
class SiteLanes:
    """The pool of one site in one layer."""

    a: Tensor  # [num_lanes, num_parts, in_features]
    b: list[Tensor]  # one a part: [num_lanes, out_features of the part]; on a GPU columns of one tensor
    offsets: list[int]  # where each part starts in the fused output; one more for the end
    index: int = 0  # among all sites of the model
    weight: Tensor | None = None  # [rows, in_features]: the base weight's place, then `a`, then padding
    ranks: Ints = field(init=False)  # [num_parts, num_lanes]: at an adapter's first lane, its rank here
    table: Ints = field(init=False)  # for the compiled kernel
    address: int = field(init=False)  # of the table

    def __post_init__(self) -> None:
        self.ranks = np.full((len(self.b), len(self.a)), len(self.a), dtype=np.int64)
        self.table = site_table(self.a, self.b, self.ranks)
        self.address = self.table.ctypes.data

    def product_rows(self, num_lanes: int) -> int:
        """Rows of `weight` that yield the base output and the shrink of the first `num_lanes` lanes."""
        rows = self.offsets[-1] + num_lanes * len(self.b)
        return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one adapter."""

    begin: int
    end: int
    first_lane: int
    rank: int


@dataclass(frozen=True, slots=True)
class MaskedRange:
    """Consecutive tokens, mixed adapters and base, computed together."""

    begin: int
    end: int
    num_lanes: int  # prefix of the pool that holds every lane in use here
    mask: Tensor  # [end - begin, num_lanes, 1], model dtype: 1 on a token's own lanes


@dataclass(frozen=True, slots=True)
class OutputGain:
    """What one DoRA adapter does to the base output of a site; 1 and 0 on parts that it leaves alone."""

    gain: Tensor  # [out_features of the fused site]
    offset: Tensor | None  # [out_features], (1 - gain) * bias; None without a bias

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.gain.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def to(self, device: torch.device) -> OutputGain:
        """On another device; the same tensors if they are there already."""
        return OutputGain(self.gain.to(device), None if self.offset is None else self.offset.to(device))


@dataclass(frozen=True, slots=True)
class GainSegment:
    """Consecutive tokens of one DoRA adapter."""

    begin: int
    end: int
    gains: Mapping[int, OutputGain]  # by index of the site


@dataclass(frozen=True, slots=True)
class LoraInput:
    """A step's LoRA work; the same at every site."""

    masked: MaskedRange | None
    segments: list[Segment]
    gains: Sequence[GainSegment] = ()
    rows: LoraRows | None = None
    prompts: LoraPrompts | None = None  # what `segments` say, for sites whose product it can multiply, too


def plan_lora(
    segments: list[Segment],
    num_decode_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gains: Sequence[GainSegment] = (),
    kernel: LoraKernel | None = None,
) -> LoraInput | None:
    """Choose the regime of each token range; None when no token has an adapter.

    Args:
        segments: maximal runs of one adapter in token order, base tokens left out; a run never
            crosses `num_decode_tokens`, and decode tokens come first.
        gains: the tokens of DoRA adapters, which have segments, too.
        kernel: compiled, if there is one for this model's lanes.
    """
    if not segments:
        return None
    if kernel is not None and kernel.takes_prompts:
        decode_end = num_decode_tokens
        least = {s: LEAST_TOKENS if s.end <= decode_end else LEAST_PROMPT for s in segments}
        rows = [s for s in segments if s.end - s.begin < least[s]]
        prompts = [s for s in segments if s.end - s.begin >= least[s]]
        return LoraInput(
            *(None, prompts, gains, kernel.plan(_groups(rows)) if rows else None),
            kernel.plan_prompts(_groups(prompts)) if prompts else None,
        )
    decode = [s for s in segments if s.end <= num_decode_tokens]
    prompts = [s for s in segments if s.end > num_decode_tokens]
    if kernel is not None:
        return LoraInput(None, prompts, gains, kernel.plan(_groups(decode)) if decode else None)
    if len(decode) <= 1 or decode[-1].end - decode[0].begin > MASKED_MAX_TOKENS * len(decode):
        return LoraInput(None, segments, gains)
    begin, end = decode[0].begin, decode[-1].end
    num_lanes = max(s.first_lane + s.rank for s in decode)
    mask = torch.zeros((end - begin, num_lanes, 1), dtype=dtype)
    for s in decode:
        mask[s.begin - begin : s.end - begin, s.first_lane : s.first_lane + s.rank] = 1
    return LoraInput(MaskedRange(begin, end, num_lanes, mask.to(device)), prompts, gains)


def _groups(segments: list[Segment]) -> Ints:
    """[num_groups, 4]: first token, tokens, first lane, lanes."""
    return np.array([(s.begin, s.end - s.begin, s.first_lane, s.rank) for s in segments], dtype=np.int64)


def apply_lora(out: Tensor, x: Tensor, site: SiteLanes, plan: LoraInput) -> None:
    """Add the module's equation to `out` in place.

    Args:
        out: [num_tokens, sum of the parts' out_features], the base output
        x: [num_tokens, in_features], the site's input
    """
    for g in plan.gains:
        if (own := g.gains.get(site.index)) is not None:
            scale_output(out[g.begin : g.end], own)
    if plan.rows is not None:
        plan.rows.add(out, x, site.address)
    if plan.masked is not None:
        r = plan.masked
        shrunk = _shrink(x[r.begin : r.end], site.a[: r.num_lanes]).mul_(r.mask)
        _expand(out[r.begin : r.end], shrunk, site, slice(0, r.num_lanes))
    for s in plan.segments:
        lanes = slice(s.first_lane, s.first_lane + s.rank)
        _expand(out[s.begin : s.end], _shrink(x[s.begin : s.end], site.a[lanes]), site, lanes)


def scale_output(out: Tensor, own: OutputGain) -> None:
    """Apply an adapter's gain to the base output of its own tokens, in place."""
    if own.offset is None:
        out.mul_(own.gain)
    else:
        torch.addcmul(own.offset, out, own.gain, out=out)


def _shrink(x: Tensor, a: Tensor) -> Tensor:
    """[num_tokens, num_lanes, num_parts] = x · aᵀ."""
    num_lanes, num_parts, in_features = a.shape
    flat = a.view(num_lanes * num_parts, in_features)
    return torch.nn.functional.linear(x, flat).view(-1, num_lanes, num_parts)


def _expand(out: Tensor, shrunk: Tensor, site: SiteLanes, lanes: slice) -> None:
    for part, b in enumerate(site.b):
        out[:, site.offsets[part] : site.offsets[part + 1]].addmm_(shrunk[:, :, part], b[lanes])


def reference_lora(out: Tensor, x: Tensor, site: SiteLanes, segments: list[Segment]) -> None:
    """The equation, token by token, part by part."""
    for s in segments:
        for token in range(s.begin, s.end):
            for part, b in enumerate(site.b):
                for lane in range(s.first_lane, s.first_lane + s.rank):
                    h = x[token] @ site.a[lane, part]
                    out[token, site.offsets[part] : site.offsets[part + 1]] += h * b[lane]
