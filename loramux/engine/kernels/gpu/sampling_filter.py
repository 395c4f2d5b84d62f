"""Draws among the tokens that top_k, top_p and min_p leave, without a sort."""

from __future__ import annotations

import triton
import triton.language as tl

from loramux.engine.kernels.gpu.sampling_row import (
    FILTERED,
    FLAGS,
    FLOAT_COLUMNS,
    INT_COLUMNS,
    MIN_P,
    NEG_INF,
    NO_ID,
    PENALISED,
    TOP_K,
    TOP_P,
    count_token,
    gumbel,
)


@triton.jit(do_not_specialize=["num_chunks"])
def filter_rows(
    scaled: tl.tensor,
    ints: tl.tensor,
    floats: tl.tensor,
    counts: tl.tensor,
    peaks: tl.tensor,
    out: tl.tensor,
    vocab_size: tl.tensor,
    num_chunks: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One program a row; rows without filters end at once. `out` holds the row's best token of all."""
    row = tl.program_id(0)
    record = ints + row * INT_COLUMNS
    numbers = floats + row * FLOAT_COLUMNS
    flags = tl.load(record + FLAGS)
    if (flags & FILTERED) == 0:
        return
    scaled += row.to(tl.int64) * vocab_size
    chunks = tl.arange(0, WIDTH)
    chunk_peaks = tl.load(peaks + row * num_chunks + chunks, mask=chunks < num_chunks, other=NEG_INF)
    peak = tl.max(chunk_peaks, axis=0)
    token = tl.load(out + row)
    if peak > NEG_INF:
        top_k = tl.load(record + TOP_K)
        top_p = tl.load(numbers + TOP_P)
        min_p = tl.load(numbers + MIN_P)
        wanted = float("inf")  # mass that may come before a token
        if top_p < 1.0:
            wanted = top_p * _mass_left(scaled, chunk_peaks, peak, top_k, min_p, vocab_size, BLOCKS, BLOCK)
        is_left = 0
        while is_left == 0:
            z = tl.load(scaled + token)
            rank, mass = _before(scaled, z, token, peak, min_p, vocab_size, BLOCKS, BLOCK)
            if (rank == 0) | ((rank < top_k) & (mass < wanted) & (tl.exp(z - peak) >= min_p)):
                is_left = 1
            else:
                token = _best_before(scaled, z, token, peak, min_p, record, vocab_size, BLOCKS, BLOCK)
        tl.store(out + row, token)
    if flags & PENALISED:
        count_token(counts, record, token, vocab_size)


@triton.jit
def _before(
    scaled: tl.tensor,
    z: tl.tensor,
    token: tl.tensor,
    peak: tl.tensor,
    min_p: tl.tensor,
    vocab_size: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """How many tokens come before one, and the mass of those that min_p leaves; the peak's mass is 1."""
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(BLOCKS):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(scaled + ids, mask=ids < vocab_size, other=NEG_INF)
        is_before = (x > z) | ((x == z) & (ids < token))
        weight = tl.exp(x - peak)
        rank += is_before.to(tl.int32)
        mass += tl.where(is_before & (weight >= min_p), weight, 0.0)
    return tl.sum(rank, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _best_before(
    scaled: tl.tensor,
    z: tl.tensor,
    token: tl.tensor,
    peak: tl.tensor,
    min_p: tl.tensor,
    record: tl.tensor,
    vocab_size: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The token with the best sum of logit and noise among those that come before one."""
    best = tl.full([BLOCK], NEG_INF, dtype=tl.float32)
    best_id = tl.full([BLOCK], NO_ID, dtype=tl.int32)
    for block in range(BLOCKS):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(scaled + ids, mask=ids < vocab_size, other=NEG_INF)
        is_one = ((x > z) | ((x == z) & (ids < token))) & (tl.exp(x - peak) >= min_p)
        score = tl.where(is_one, x + gumbel(ids, record), NEG_INF)
        best_id = tl.where(score > best, ids, best_id)
        best = tl.maximum(score, best)
    return tl.min(tl.where(best == tl.max(best, axis=0), best_id, NO_ID), axis=0)


@triton.jit
def _mass_left(
    scaled: tl.tensor,
    chunk_peaks: tl.tensor,
    peak: tl.tensor,
    top_k: tl.tensor,
    min_p: tl.tensor,
    vocab_size: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The mass of the tokens that top_k and min_p leave.

    Bisection keeps `low` and `high` so that at least top_k logits lie above `low` and fewer than
    top_k above `high`, which is one of the logits.
    """
    # The k-th largest peak of a chunk is a bound of the k-th largest logit.
    at_least = tl.sum((chunk_peaks[None, :] >= chunk_peaks[:, None]).to(tl.int32), axis=1)
    low = tl.max(tl.where(at_least >= top_k, chunk_peaks, NEG_INF), axis=0)
    num_above, mass, least, _ = _above(scaled, NEG_INF, peak, min_p, vocab_size, BLOCKS, BLOCK)
    if num_above > top_k:
        low = tl.maximum(low, least)
        low -= tl.abs(low) * 1e-6 + 1e-30  # below the logit
        high = peak
        num_high = 0
        mass_high = 0.0
        is_found = 0
        while is_found == 0:
            middle = 0.5 * low + 0.5 * high
            middle = tl.where(middle < high, middle, low)
            num_above, mass_above, least, most = _above(
                scaled, middle, peak, min_p, vocab_size, BLOCKS, BLOCK
            )
            if num_above == top_k:
                mass = mass_above
                is_found = 1
            elif num_above < top_k:
                high = most
                num_high = num_above
                mass_high = mass_above
            elif least == high:  # the k-th is one of several equal ones
                weight = tl.exp(high - peak)
                share = (top_k - num_high).to(tl.float32) * weight
                mass = mass_high + tl.where(weight >= min_p, share, 0.0)
                is_found = 1
            else:
                low = middle
    return mass


@triton.jit
def _above(
    scaled: tl.tensor,
    bound: tl.tensor,
    peak: tl.tensor,
    min_p: tl.tensor,
    vocab_size: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Of the logits above a bound: number, mass after min_p, the least; the largest of the others."""
    number = tl.zeros([BLOCK], dtype=tl.int32)
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    least = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    most = tl.full([BLOCK], NEG_INF, dtype=tl.float32)
    for block in range(BLOCKS):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(scaled + ids, mask=ids < vocab_size, other=NEG_INF)
        is_above = x > bound
        weight = tl.exp(x - peak)
        number += is_above.to(tl.int32)
        mass += tl.where(is_above & (weight >= min_p), weight, 0.0)
        least = tl.minimum(least, tl.where(is_above, x, float("inf")))
        most = tl.maximum(most, tl.where(is_above, NEG_INF, x))
    return tl.sum(number, axis=0), tl.sum(mass, axis=0), tl.min(least, axis=0), tl.max(most, axis=0)
