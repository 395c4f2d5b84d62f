"""What every kernel of a linear site shares: which rows a program computes, and what LoRA adds to them.

    y[t, n] += Σ over the lanes l of t's adapter   h[t, l] · B[l, n]

h is what the shrink left: in the model's dtype behind the base output of an augmented product, or as
planes of partial sums in float32. A program computes M rows:

- M = 1: one token, its lanes by `token_lane` and `token_rank`; plain arithmetic units;
- M ≥ 16: one tile of one adapter's tokens, by `tiles`; tensor cores;
- without LoRA: M consecutive tokens.

Only a token's own lanes are read, so it does not matter what the others hold.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Under the interpreter tl.dot of bfloat16 operands is silently wrong: they are widened first.
INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def own_rows(
    program: tl.tensor,
    num_tokens: tl.tensor,
    token_lane: tl.tensor,
    token_rank: tl.tensor,
    tiles: tl.tensor,
    M: tl.constexpr,
    LORA: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """First row of a program, one past its last, first lane and number of lanes."""
    lane = 0
    rank = 0
    if LORA and M > 1:
        first = tl.load(tiles + program * 4)
        end = first + tl.load(tiles + program * 4 + 1)
        lane = tl.load(tiles + program * 4 + 2)
        rank = tl.load(tiles + program * 4 + 3)
    else:
        first = program * M
        end = tl.minimum(first + M, num_tokens)
        if LORA:
            lane = tl.load(token_lane + program)
            rank = tl.load(token_rank + program)
    return first, end, lane, rank


@triton.jit
def add_expand(
    y: tl.tensor,
    h: tl.tensor,
    h_row: tl.tensor,
    h_plane: tl.tensor,
    b: tl.tensor,
    b_lane: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    lane: tl.tensor,
    rank: tl.tensor,
    part: tl.tensor,
    columns: tl.tensor,
    wanted: tl.tensor,
    M: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
) -> tl.tensor:
    """The module's equation for [M, N] float32, rounded to B's dtype as a product of its own would be.

    Args:
        h: [PLANES, num_tokens, ≥ num_lanes * PARTS]; lane l of a part is column l * PARTS + part
        b: [num_lanes, out_features]
        columns, wanted: [N] columns of b, and whether they are this program's
        R: lanes at a time; from 16 where M is above 1
    """
    for begin in range(0, rank, R):
        own = begin + tl.arange(0, R)
        live = own < rank
        at_b = b + (lane + own)[:, None] * b_lane + columns[None, :]
        weights = tl.load(at_b, mask=live[:, None] & wanted[None, :], other=0.0)
        column = (lane + own) * PARTS + part
        if M == 1:
            at_h = h + first * h_row + column
            shrunk = tl.load(at_h, mask=live, other=0.0).to(tl.float32)
            for plane in tl.static_range(1, PLANES):
                shrunk += tl.load(at_h + plane * h_plane, mask=live, other=0.0)
            shrunk = shrunk.to(b.dtype.element_ty).to(tl.float32)
            y += tl.sum(shrunk[:, None] * weights.to(tl.float32), axis=0)[None, :]
        else:
            rows = first + tl.arange(0, M)
            here = (rows < end)[:, None] & live[None, :]
            at_rows = h + rows[:, None] * h_row + column[None, :]
            block = tl.load(at_rows, mask=here, other=0.0)
            for plane in tl.static_range(1, PLANES):
                block += tl.load(at_rows + plane * h_plane, mask=here, other=0.0)
            if INTERPRETED:
                y = tl.dot(block.to(tl.float32), weights.to(tl.float32), y, input_precision="ieee")
            else:
                y = tl.dot(block.to(b.dtype.element_ty), weights, y, input_precision="ieee")
    return y.to(b.dtype.element_ty).to(tl.float32)


@triton.jit
def rounded(x: tl.tensor, like: tl.tensor) -> tl.tensor:
    """float32 → the dtype behind `like` → float32: what an operator that writes its result leaves."""
    return x.to(like.dtype.element_ty).to(tl.float32)
