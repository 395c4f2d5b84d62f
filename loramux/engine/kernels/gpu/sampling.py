"""From logits to token ids in Triton: the same tokens as `kernels/sampling.py` chooses, in few passes.

One program takes one chunk of a row; the program of a row that ends last finds the best of all
chunks, in order, so that a step of greedy rows is one kernel and one pass over the logits.

Rows with filters need no sort. Their draw begins with the best sum of logit and noise among all tokens,
and asks whether the filters leave that token: how many come before it, with what mass. If not, then none
of those after it is left either, and the search goes on among those before it: the same token as if the
filters had been applied first. Mostly the first or second token is right. Only top_p together with
top_k or min_p must know the mass that those leave, and so looks for the k-th best logit by bisection,
among the few tokens that can be left.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.engine.kernels import sampling as layout
from loramux.engine.kernels.gpu.sampling_filter import filter_rows
from loramux.engine.kernels.gpu.sampling_row import (
    BIASED,
    DRAWN,
    FILTERED,
    FLAGS,
    FLOAT_COLUMNS,
    FREQUENCY,
    FULL,
    GREEDY,
    INT_COLUMNS,
    INVERSE_TEMPERATURE,
    LARGEST,
    MASK_ROW,
    MASKED,
    NEG_INF,
    NO_ID,
    OUTPUTS,
    PENALISED,
    PRESENCE,
    REPETITION,
    SLOT,
    count_token,
    gumbel,
)
from loramux.engine.kernels.sampling import SamplerInput, SamplerTables

CHUNK: Final = 2048  # fixed: a row's result must not depend on how many rows there are
FILTER_BLOCK: Final = 8192
LIST_SIZE: Final = 1024
DRAW_WARPS: Final = 4
FILTER_WARPS: Final = 16


class TritonSampler:
    """The kernels with their scratch: 4 bytes a token of the vocabulary for each row."""

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        *,
        chunk: int = CHUNK,
        filter_block: int = FILTER_BLOCK,
        list_size: int = LIST_SIZE,
    ) -> None:
        """Allocate the scratch.

        Args:
            chunk: tokens of a program of the first kernel
            filter_block: tokens that the second one's programs read at a time
            list_size: tokens that they may gather
        """
        self._chunk, self._filter_block, self._list_size = chunk, filter_block, list_size
        self._num_chunks = triton.cdiv(vocab_size, chunk)
        shape = (max_rows, self._num_chunks)
        self._scaled = torch.empty((max_rows, vocab_size), dtype=torch.float32, device=device)
        self._best = torch.empty(shape, dtype=torch.float32, device=device)
        self._ids = torch.empty(shape, dtype=torch.int32, device=device)
        self._peaks = torch.empty(shape, dtype=torch.float32, device=device)
        self._sums = torch.empty(shape, dtype=torch.float32, device=device)
        self._values = torch.empty((max_rows, list_size), dtype=torch.float32, device=device)
        self._tokens = torch.empty((max_rows, list_size), dtype=torch.int32, device=device)
        self._arrived = torch.zeros(max_rows, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor))

    def __call__(self, logits: Tensor, inputs: SamplerInput, tables: SamplerTables, out: Tensor) -> None:
        """As `kernels.sampling.draw_tokens`; one kernel, with filters in the step two."""
        num_rows, vocab_size = logits.shape
        width = triton.next_power_of_2(self._num_chunks)
        options: dict[str, Any] = {"MODE": inputs.mode, "WIDTH": width, "enable_fp_fusion": False}
        _draw[(num_rows, self._num_chunks)](
            logits,
            logits.stride(0),
            inputs.ints,
            inputs.floats,
            tables.counts,
            tables.biases,
            tables.masks,
            tables.masks.stride(0),
            self._scaled,
            self._best,
            self._ids,
            self._peaks,
            self._sums,
            self._arrived,
            out,
            vocab_size,
            self._num_chunks,
            BLOCK=self._chunk,
            num_warps=DRAW_WARPS,
            **options,
        )
        if inputs.mode != layout.FULL:
            return
        del options["MODE"]
        filter_rows[(num_rows,)](
            self._scaled,
            inputs.ints,
            inputs.floats,
            tables.counts,
            self._peaks,
            self._sums,
            self._values,
            self._tokens,
            out,
            vocab_size,
            self._num_chunks,
            BLOCKS=triton.cdiv(vocab_size, self._filter_block),
            BLOCK=self._filter_block,
            LIST=self._list_size,
            num_warps=FILTER_WARPS,
            **options,
        )


@triton.jit(do_not_specialize=["num_chunks"])
def _draw(
    logits: tl.tensor,
    logits_stride: tl.tensor,
    ints: tl.tensor,
    floats: tl.tensor,
    counts: tl.tensor,
    biases: tl.tensor,
    masks: tl.tensor,
    mask_stride: tl.tensor,
    scaled: tl.tensor,
    best_scores: tl.tensor,
    best_ids: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    arrived: tl.tensor,
    out: tl.tensor,
    vocab_size: tl.tensor,
    num_chunks: tl.tensor,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    record = ints + row * INT_COLUMNS
    numbers = floats + row * FLOAT_COLUMNS
    flags = tl.load(record + FLAGS)
    if flags == 0:
        tl.store(out + row, 0)
        return
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab_size
    x = tl.load(logits + row.to(tl.int64) * logits_stride + ids, mask=inside, other=NEG_INF).to(tl.float32)
    if MODE == FULL:
        x = _edited(x, ids, inside, record, numbers, counts, biases, masks, mask_stride, vocab_size, flags)
    score = _finite(x)
    if MODE != GREEDY:  # noqa: SIM102 decided when compiled
        if flags & DRAWN:
            score = _finite(score * tl.load(numbers + INVERSE_TEMPERATURE))
            if MODE == FULL:  # noqa: SIM102
                if flags & FILTERED:
                    tl.store(scaled + row.to(tl.int64) * vocab_size + ids, score, mask=inside)
                    top = tl.max(score, axis=0)
                    mass = tl.exp(score - tl.where(top > NEG_INF, top, 0.0))
                    tl.store(peaks + row * num_chunks + chunk, top)
                    tl.store(sums + row * num_chunks + chunk, tl.sum(mass, axis=0))
            score += gumbel(ids, record)
    best = tl.max(score, axis=0)
    best_id = tl.min(tl.where(score == best, ids, NO_ID), axis=0)
    tl.store(best_scores + row * num_chunks + chunk, best)
    tl.store(best_ids + row * num_chunks + chunk, best_id)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1) == num_chunks - 1:
        token = _best_of_chunks(best_scores, best_ids, row * num_chunks, num_chunks, WIDTH)
        tl.store(out + row, token)
        tl.store(arrived + row, 0)
        if MODE == FULL:  # noqa: SIM102
            if (flags & (PENALISED | FILTERED)) == PENALISED:
                count_token(counts, record, token, vocab_size)


@triton.jit
def _best_of_chunks(
    scores: tl.tensor, ids: tl.tensor, first: tl.tensor, num_chunks: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """The first of a row's best tokens, from what other programs have written."""
    chunks = tl.arange(0, WIDTH)
    score = tl.load(scores + first + chunks, mask=chunks < num_chunks, other=NEG_INF, cache_modifier=".cg")
    token = tl.load(ids + first + chunks, mask=chunks < num_chunks, other=NO_ID, cache_modifier=".cg")
    return tl.min(tl.where(score == tl.max(score, axis=0), token, NO_ID), axis=0)


@triton.jit
def _edited(
    x: tl.tensor,
    ids: tl.tensor,
    inside: tl.tensor,
    record: tl.tensor,
    numbers: tl.tensor,
    counts: tl.tensor,
    biases: tl.tensor,
    masks: tl.tensor,
    mask_stride: tl.tensor,
    vocab_size: tl.tensor,
    flags: tl.tensor,
) -> tl.tensor:
    """Biases, penalties and mask of a chunk."""
    table_row = tl.load(record + SLOT).to(tl.int64) * vocab_size
    if flags & BIASED:
        x += tl.load(biases + table_row + ids, mask=inside, other=0.0)
    if flags & PENALISED:
        count = tl.load(counts + table_row + ids, mask=inside, other=0)
        repetition = tl.load(numbers + REPETITION)
        penalised = tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
        x = tl.where(count != 0, penalised, x)
        outputs = count & OUTPUTS
        x = x - outputs.to(tl.float32) * tl.load(numbers + FREQUENCY)
        x = x - tl.where(outputs > 0, tl.load(numbers + PRESENCE), 0.0)
    if flags & MASKED:
        words = masks + tl.load(record + MASK_ROW) * mask_stride
        word = tl.load(words + ids // 32, mask=inside, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, NEG_INF)
    return x


@triton.jit
def _finite(x: tl.tensor) -> tl.tensor:
    x = tl.where(x == x, x, NEG_INF)  # NaN
    return tl.where(x > LARGEST, LARGEST, x)
