"""Draws among the tokens that top_k, top_p and min_p leave, without a sort.

`filter_rows` has one program a row. Where top_p works on what top_k or min_p leave, the few tokens that
can be left are first gathered into a list, and all passes go over that; else, and where they do not
fit into it, over the row.
"""

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
    sums: tl.tensor,
    list_values: tl.tensor,
    list_tokens: tl.tensor,
    out: tl.tensor,
    vocab_size: tl.tensor,
    num_chunks: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Replace the row's best token of all in `out`; rows without filters end at once."""
    row = tl.program_id(0)
    record = ints + row * INT_COLUMNS
    flags = tl.load(record + FLAGS)
    if (flags & FILTERED) == 0:
        return
    scaled += row.to(tl.int64) * vocab_size
    values = list_values + row * LIST
    tokens = list_tokens + row * LIST
    chunks = tl.arange(0, WIDTH)
    chunk_peaks = tl.load(peaks + row * num_chunks + chunks, mask=chunks < num_chunks, other=NEG_INF)
    peak = tl.max(chunk_peaks, axis=0)
    token = tl.load(out + row)
    cut = floats + row * FLOAT_COLUMNS
    top_p, min_p, top_k = tl.load(cut + TOP_P), tl.load(cut + MIN_P), tl.load(record + TOP_K)
    low = _least_left(chunk_peaks, peak, top_k, min_p)
    if peak > NEG_INF:
        if (top_p < 1.0) & ((top_k < vocab_size) | (min_p > 0.0)):
            size = _gather(scaled, low, values, tokens, vocab_size, BLOCKS, BLOCK, LIST)
            if size <= LIST:
                wanted = top_p * _mass_left(values, size, low, peak, top_k, min_p, 1, LIST)
                token = _draw_listed(
                    scaled, values, tokens, size, token, peak, top_k, wanted, min_p, record, LIST
                )
            else:
                wanted = top_p * _mass_left(scaled, vocab_size, low, peak, top_k, min_p, BLOCKS, BLOCK)
                token = _draw_whole(
                    scaled, vocab_size, token, peak, top_k, wanted, min_p, record, BLOCKS, BLOCK
                )
        else:
            chunk_sums = tl.load(sums + row * num_chunks + chunks, mask=chunks < num_chunks, other=0.0)
            total = tl.sum(chunk_sums * tl.exp(chunk_peaks - peak), axis=0)
            wanted = tl.where(top_p < 1.0, top_p * total, float("inf"))
            token = _draw_whole(scaled, vocab_size, token, peak, top_k, wanted, min_p, record, BLOCKS, BLOCK)
        tl.store(out + row, token)
    if flags & PENALISED:
        count_token(counts, record, token, vocab_size)


@triton.jit
def _least_left(chunk_peaks: tl.tensor, peak: tl.tensor, top_k: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """No logit below this is left by top_k and min_p."""
    # The k-th largest peak of a chunk bounds the k-th largest logit.
    at_least = tl.sum((chunk_peaks[None, :] >= chunk_peaks[:, None]).to(tl.int32), axis=1)
    low = tl.max(tl.where(at_least >= top_k, chunk_peaks, NEG_INF), axis=0)
    if min_p > 0.0:
        low = tl.maximum(low, peak + tl.log(min_p) - 0.001)  # exp and log are rounded
    return low


@triton.jit
def _gather(
    scaled: tl.tensor,
    low: tl.tensor,
    list_values: tl.tensor,
    list_tokens: tl.tensor,
    vocab_size: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
) -> tl.tensor:
    """Write the tokens with logits of at least `low` into a list, by id; how many there are."""
    found = 0
    if low > NEG_INF:
        for block in range(BLOCKS):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(scaled + ids, mask=ids < vocab_size, other=NEG_INF)
            is_one = x >= low
            places = found + tl.cumsum(is_one.to(tl.int32), axis=0) - 1
            fits = is_one & (places < LIST)
            tl.store(list_values + places, x, mask=fits)
            tl.store(list_tokens + places, ids, mask=fits)
            found += tl.sum(is_one.to(tl.int32), axis=0)
        tl.debug_barrier()
    else:
        found += LIST + 1
    return found


@triton.jit
def _draw_whole(
    scaled: tl.tensor,
    vocab_size: tl.tensor,
    token: tl.tensor,
    peak: tl.tensor,
    top_k: tl.tensor,
    wanted: tl.tensor,
    min_p: tl.tensor,
    record: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """`_draw_left` over the row."""
    return _draw_left(
        scaled, scaled, scaled, vocab_size, token, peak, top_k, wanted, min_p, record, BLOCKS, BLOCK, False
    )


@triton.jit
def _draw_listed(
    scaled: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    token: tl.tensor,
    peak: tl.tensor,
    top_k: tl.tensor,
    wanted: tl.tensor,
    min_p: tl.tensor,
    record: tl.tensor,
    LIST: tl.constexpr,
) -> tl.tensor:
    """`_draw_left` over the list."""
    return _draw_left(scaled, values, tokens, size, token, peak, top_k, wanted, min_p, record, 1, LIST, True)


@triton.jit
def _draw_left(
    scaled: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    token: tl.tensor,
    peak: tl.tensor,
    top_k: tl.tensor,
    wanted: tl.tensor,
    min_p: tl.tensor,
    record: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
) -> tl.tensor:
    """The token with the best sum of logit and noise among those that are left.

    Args:
        token: the one with the best sum of all
        wanted: mass that may come before a token
    """
    is_left = 0
    while is_left == 0:
        z = tl.load(scaled + token)
        rank, mass = _before(values, tokens, size, z, token, peak, min_p, BLOCKS, BLOCK, LISTED)
        if (rank == 0) | ((rank < top_k) & (mass < wanted) & (tl.exp(z - peak) >= min_p)):
            is_left = 1
        else:
            token = _best_before(values, tokens, size, z, token, peak, min_p, record, BLOCKS, BLOCK, LISTED)
    return token


@triton.jit
def _part(
    values: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    block: tl.tensor,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
) -> tl.tensor:
    """Logits and ids of a block of the row, or of the list."""
    places = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + places, mask=places < size, other=NEG_INF)
    ids = places
    if LISTED:
        ids = tl.load(tokens + places, mask=places < size, other=NO_ID)
    return x, ids


@triton.jit
def _before(
    values: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    z: tl.tensor,
    token: tl.tensor,
    peak: tl.tensor,
    min_p: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
) -> tl.tensor:
    """How many tokens come before one, and the mass of those that min_p leaves; the peak's mass is 1."""
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(BLOCKS):
        x, ids = _part(values, tokens, size, block, BLOCK, LISTED)
        is_before = (x > z) | ((x == z) & (ids < token))
        weight = tl.exp(x - peak)
        rank += is_before.to(tl.int32)
        mass += tl.where(is_before & (weight >= min_p), weight, 0.0)
    return tl.sum(rank, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _best_before(
    values: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    z: tl.tensor,
    token: tl.tensor,
    peak: tl.tensor,
    min_p: tl.tensor,
    record: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
) -> tl.tensor:
    """The token with the best sum of logit and noise among those that come before one."""
    best = tl.full([BLOCK], NEG_INF, dtype=tl.float32)
    best_id = tl.full([BLOCK], NO_ID, dtype=tl.int32)
    for block in range(BLOCKS):
        x, ids = _part(values, tokens, size, block, BLOCK, LISTED)
        is_one = ((x > z) | ((x == z) & (ids < token))) & (tl.exp(x - peak) >= min_p)
        score = tl.where(is_one, x + gumbel(ids, record), NEG_INF)
        best_id = tl.where(score > best, ids, best_id)
        best = tl.maximum(score, best)
    return tl.min(tl.where(best == tl.max(best, axis=0), best_id, NO_ID), axis=0)


@triton.jit
def _mass_left(
    values: tl.tensor,
    size: tl.tensor,
    low: tl.tensor,
    peak: tl.tensor,
    top_k: tl.tensor,
    min_p: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The mass of the tokens that top_k and min_p leave.

    Bisection keeps `low` and `high` so that at least top_k logits lie above `low` and fewer than
    top_k above `high`, which is one of the logits.
    """
    num_above, mass, least, _ = _above(values, size, NEG_INF, peak, min_p, BLOCKS, BLOCK)
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
            num_above, above, least, most = _above(values, size, middle, peak, min_p, BLOCKS, BLOCK)
            if num_above == top_k:
                mass = above
                is_found = 1
            elif num_above < top_k:
                high = most
                num_high = num_above
                mass_high = above
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
    values: tl.tensor,
    size: tl.tensor,
    bound: tl.tensor,
    peak: tl.tensor,
    min_p: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Of the logits above a bound: number, mass after min_p, the least; the largest of the others."""
    number = tl.zeros([BLOCK], dtype=tl.int32)
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    least = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    most = tl.full([BLOCK], NEG_INF, dtype=tl.float32)
    for block in range(BLOCKS):
        places = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(values + places, mask=places < size, other=NEG_INF)
        is_above = x > bound
        weight = tl.exp(x - peak)
        number += is_above.to(tl.int32)
        mass += tl.where(is_above & (weight >= min_p), weight, 0.0)
        least = tl.minimum(least, tl.where(is_above, x, float("inf")))
        most = tl.maximum(most, tl.where(is_above, NEG_INF, x))
    return tl.sum(number, axis=0), tl.sum(mass, axis=0), tl.min(least, axis=0), tl.max(most, axis=0)
