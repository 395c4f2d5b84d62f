"""Steps that serve nobody: the code of all others is compiled, or read from disk, before the first request.

A kernel's first use on a machine compiles it, seconds for all of them; its first use in a process reads what
was compiled before, some 50 ms. Requests shall not wait for either. Only a tensor-parallel engine on CPUs,
which is for tests, compiles when it must.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.config import LANE_GROUP
from loramux.engine.sequence import Sequence
from loramux.engine.step import ScheduledBatch, ScheduledSequence
from loramux.engine.types import Request, TokenSampling

PROMPT: Final = 160  # tokens of a prompt that every kernel shares between threads
STREAMS: Final = 32  # the same for sequences that decode


def warm_up_batches(max_tokens: int, block_size: int, *, with_lanes: bool) -> Iterator[ScheduledBatch]:
    """A prompt, one sequence that decodes, and many; then again with the first lanes, which are empty.

    All of them write into the first KV blocks, of which no request has any yet.

    Args:
        max_tokens: that a sequence may have.
    """
    prompt = min(PROMPT, max_tokens - 1)
    if prompt < 1:
        return
    for lanes in (None, LaneSpan(0, LANE_GROUP, LANE_GROUP)) if with_lanes else (None,):
        for streams, start, count in ((1, 0, prompt), (1, prompt, 1), (STREAMS, prompt, 1)):
            sequences = [_sequence(i, start + count, block_size, lanes) for i in range(streams)]
            yield ScheduledBatch([ScheduledSequence(seq, start, count) for seq in sequences])


def _sequence(index: int, length: int, block_size: int, lanes: LaneSpan | None) -> Sequence:
    sampling = TokenSampling(max_tokens=1, temperature=0.0, seed=0)
    request = Request(request_id=f"warm-up-{index}", prompt_token_ids=[0] * length, sampling=sampling)
    seq = Sequence(request, 0.0)
    seq.block_ids = list(range(-(-length // block_size)))
    seq.lanes = lanes
    return seq
