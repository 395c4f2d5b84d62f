"""From logits to token ids on the device, in plain torch: what the Triton kernels compute, as a reference.

Every row has a record of integers and one of floats, and asks by its flags. In this order, as in
`layers/sampler.py`: bias, penalties, mask; then the best token, or a draw at a temperature among the
tokens that top_k, min_p and top_p leave.

    token = argmax over the tokens that are left of  logit / temperature + gumbel(seed, position, token)

is a draw from their softmax (Gumbel-max). The noise is a hash of the request's seed, the number of
tokens generated before, and the token's id, so a seeded request gets the same tokens alone, in any
batch and after a preemption. Tokens of the same logit are ordered by id, lower first.

Nothing here synchronises, and all shapes are static.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Columns of a row's integers.
FLAGS: Final = 0  # 0 = padding: token 0 comes out
SLOT: Final = 1  # row of the tables of counts and biases
MASK_ROW: Final = 2  # row of the masks
TOP_K: Final = 3  # vocab_size = off
SEED_LOW: Final = 4
SEED_HIGH: Final = 5
POSITION: Final = 6  # tokens generated before this one
INT_COLUMNS: Final = 8

# Columns of a row's floats.
INVERSE_TEMPERATURE: Final = 0
TOP_P: Final = 1
MIN_P: Final = 2
REPETITION: Final = 3
FREQUENCY: Final = 4
PRESENCE: Final = 5
FLOAT_COLUMNS: Final = 8

# Flags.
ACTIVE: Final = 1
DRAWN: Final = 2  # not greedy
FILTERED: Final = 4  # top_k, top_p or min_p; only with DRAWN
PENALISED: Final = 8
BIASED: Final = 16
MASKED: Final = 32

# What a step's rows ask for, at most. A kernel or graph of a mode serves the lower ones, too.
GREEDY: Final = 0
DRAW: Final = 1  # temperatures
FULL: Final = 2

IN_PROMPT: Final = 1 << 30  # bit of a count; the lower bits count the token in the output
NEG_INF: Final = float("-inf")
LARGEST: Final = 3.0e38  # logits are cut there: an infinite one would have no successor in a search

_WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplerTables:
    """What lies on the device from step to step; a row is used only by requests that ask."""

    counts: Tensor  # [num_slots, vocab_size] int32: outputs so far, and IN_PROMPT; updated by each draw
    biases: Tensor  # [num_slots, vocab_size] float32
    masks: Tensor  # [num_rows, ceil(vocab_size / 32)] int32: a bit a token, 1 = allowed

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in (self.counts, self.biases, self.masks))


@dataclass(frozen=True, slots=True)
class SamplerInput:
    """A step's rows as the sampler reads them."""

    ints: Tensor  # [num_rows, INT_COLUMNS] int32
    floats: Tensor  # [num_rows, FLOAT_COLUMNS] float32
    mode: int  # GREEDY, DRAW or FULL: at least what any row asks for


def draw_tokens(logits: Tensor, inputs: SamplerInput, tables: SamplerTables, out: Tensor) -> None:
    """Choose a token for every row, and count it where penalties are asked for.

    Args:
        logits: [num_rows, vocab_size], any float dtype; not changed
        out: [num_rows] int32, written
    """
    x = logits.float()
    flags = inputs.ints[:, FLAGS, None]
    if inputs.mode == FULL:
        x = edited_logits(x, inputs, tables)
    x = _finite(x)
    if inputs.mode != GREEDY:
        scaled = _finite(x * inputs.floats[:, INVERSE_TEMPERATURE, None])
        left = scaled
        if inputs.mode == FULL:
            kept = kept_tokens(scaled, *(column[:, None] for column in _filters(inputs)))
            left = torch.where(kept | (flags & FILTERED == 0), scaled, NEG_INF)
        noise = gumbel_noise(inputs.ints, logits.shape[1])
        x = torch.where(flags & DRAWN != 0, left + noise, x)
    ids = torch.where(flags != 0, x, 0.0).argmax(dim=-1)
    if inputs.mode == FULL:
        slots = inputs.ints[:, SLOT].long()
        penalised = (inputs.ints[:, FLAGS] & PENALISED != 0).int()
        tables.counts.index_put_((slots, ids), penalised, accumulate=True)
    out.copy_(ids)


def edited_logits(x: Tensor, inputs: SamplerInput, tables: SamplerTables) -> Tensor:
    """Apply biases, penalties and masks; x is [num_rows, vocab_size] float32, not changed."""
    flags = inputs.ints[:, FLAGS, None]
    slots = inputs.ints[:, SLOT].long()
    x = torch.where(flags & BIASED != 0, x + tables.biases[slots], x)
    counts = tables.counts[slots]
    repetition, frequency, presence = (inputs.floats[:, i, None] for i in (REPETITION, FREQUENCY, PRESENCE))
    penalised = torch.where(x > 0, x / repetition, x * repetition)
    penalised = torch.where(counts != 0, penalised, x)
    outputs = counts & (IN_PROMPT - 1)
    penalised = penalised - outputs.float() * frequency
    penalised = penalised - torch.where(outputs > 0, presence, 0.0)
    x = torch.where(flags & PENALISED != 0, penalised, x)
    tokens = torch.arange(x.shape[1], device=x.device)
    words = tables.masks[inputs.ints[:, MASK_ROW].long()][:, tokens // 32]
    allowed = (words >> (tokens % 32).int()) & 1 != 0
    return torch.where(allowed | (flags & MASKED == 0), x, NEG_INF)


def kept_tokens(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens the filters leave; [num_rows, vocab_size] bool.

    Args:
        scaled: [num_rows, vocab_size] float32 logits at the temperature
        top_k: [num_rows, 1] int32, at least 1; this many best tokens
        top_p: [num_rows, 1]; the fewest best tokens with this share of what the other two leave
        min_p: [num_rows, 1]; tokens with this share of the best token's probability
    """
    best, order = scaled.sort(dim=-1, descending=True, stable=True)
    weights = (best - best[:, :1]).exp().nan_to_num(0.0)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    keep = (rank < top_k) & (weights >= min_p)
    weights = weights * keep
    before = weights.cumsum(dim=-1) - weights
    keep &= (before < top_p * weights.sum(dim=-1, keepdim=True)) | (top_p >= 1.0)
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


def gumbel_noise(ints: Tensor, vocab_size: int) -> Tensor:
    """Independent standard Gumbel noise, [num_rows, vocab_size] float32, for the rows' seeds and positions.

    Source of the mixing function: "lowbias32", C. Wellons, Hash Prospector.
    """
    low, high, position = (ints[:, i, None].long() & _WORD for i in (SEED_LOW, SEED_HIGH, POSITION))
    first = _mix(_mix(low ^ 0x9E3779B9) + position)
    second = _mix(_mix(high ^ 0x85EBCA6B) + first)
    tokens = torch.arange(vocab_size, device=ints.device)[None]
    bits = _mix(_mix(tokens ^ first) + second)
    u = (bits.float() + 0.5) * 2.0**-32
    u = u.clamp(max=1.0 - 2.0**-24)
    small = u * (1.0 + u * (0.5 + u * (1.0 / 3.0)))  # of -log(1 - u): no digit is lost where it counts
    return -torch.where(u < 2.0**-6, small, -torch.log(1.0 - u)).log()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that looks random; int64 in and out."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _filters(inputs: SamplerInput) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.ints[:, TOP_K], inputs.floats[:, TOP_P], inputs.floats[:, MIN_P]


def _finite(x: Tensor) -> Tensor:
    """Without NaN and without what is larger than LARGEST."""
    return torch.where(x.isnan(), NEG_INF, x).clamp(max=LARGEST)
