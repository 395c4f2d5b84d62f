"""What the sampling kernels share: the columns of a row's record, its noise, its count."""

from __future__ import annotations

import triton
import triton.language as tl

from loramux.engine.kernels import sampling as layout

FLAGS = tl.constexpr(layout.FLAGS)
SLOT = tl.constexpr(layout.SLOT)
MASK_ROW = tl.constexpr(layout.MASK_ROW)
TOP_K = tl.constexpr(layout.TOP_K)
SEED_LOW = tl.constexpr(layout.SEED_LOW)
SEED_HIGH = tl.constexpr(layout.SEED_HIGH)
POSITION = tl.constexpr(layout.POSITION)
INT_COLUMNS = tl.constexpr(layout.INT_COLUMNS)
INVERSE_TEMPERATURE = tl.constexpr(layout.INVERSE_TEMPERATURE)
TOP_P = tl.constexpr(layout.TOP_P)
MIN_P = tl.constexpr(layout.MIN_P)
REPETITION = tl.constexpr(layout.REPETITION)
FREQUENCY = tl.constexpr(layout.FREQUENCY)
PRESENCE = tl.constexpr(layout.PRESENCE)
FLOAT_COLUMNS = tl.constexpr(layout.FLOAT_COLUMNS)
DRAWN = tl.constexpr(layout.DRAWN)
FILTERED = tl.constexpr(layout.FILTERED)
PENALISED = tl.constexpr(layout.PENALISED)
BIASED = tl.constexpr(layout.BIASED)
MASKED = tl.constexpr(layout.MASKED)
GREEDY = tl.constexpr(layout.GREEDY)
FULL = tl.constexpr(layout.FULL)
OUTPUTS = tl.constexpr(layout.IN_PROMPT - 1)
LARGEST = tl.constexpr(layout.LARGEST)
NEG_INF = tl.constexpr(float("-inf"))
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def count_token(counts: tl.tensor, record: tl.tensor, token: tl.tensor, vocab_size: tl.tensor) -> None:
    """One more of a token in the output of a row."""
    place = counts + tl.load(record + SLOT).to(tl.int64) * vocab_size + token
    tl.store(place, tl.load(place) + 1)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def gumbel(ids: tl.tensor, record: tl.tensor) -> tl.tensor:
    """As `gumbel_noise` of the reference."""
    low = (ids * 0 + tl.load(record + SEED_LOW)).to(tl.uint32, bitcast=True)
    high = (ids * 0 + tl.load(record + SEED_HIGH)).to(tl.uint32, bitcast=True)
    position = (ids * 0 + tl.load(record + POSITION)).to(tl.uint32, bitcast=True)
    first = _mix(_mix(low ^ 0x9E3779B9) + position)
    second = _mix(_mix(high ^ 0x85EBCA6B) + first)
    bits = _mix(_mix(ids.to(tl.uint32, bitcast=True) ^ first) + second)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    u = tl.minimum(u, 0.99999994)  # 1 - 2**-24
    small = u * (1.0 + u * (0.5 + u * 0.3333333432674408))
    return -tl.log(tl.where(u < 0.015625, small, -tl.log(1.0 - u)))
