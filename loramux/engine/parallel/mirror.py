"""A scheduled batch on its way to the other ranks, which build the same model input from it.

Only what a step's input is made of travels: of a long sequence the tokens to compute, not those
before them. A `MirroredSequence` has these and nothing else; reading any other attribute is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from typing import SupportsIndex, overload

import numpy as np

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.parallel.commands import ROW, Step
from loramux.engine.sequence import Sequence
from loramux.engine.step import ScheduledBatch, ScheduledSequence


class StepEncoder:
    """Packs one step after the other.

    A token that the step before samples may be read by a step before the host knows it; the ranks find
    it by the sequence's handle, which is as long as a sequence is computed in every step.
    """

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}  # by request id, of the last step
        self._next_handle = itertools.count()

    def encode(self, batch: ScheduledBatch, tables: Container[str]) -> Step:
        """What the other ranks must know of a batch.

        Args:
            tables: digests of the adapters that have tables on the device
        """
        items = batch.sequences
        known = self._handles
        self._handles = {
            item.seq.request_id: known[item.seq.request_id]
            if item.seq.request_id in known
            else next(self._next_handle)
            for item in items
        }
        rows = np.array([_row(item, self._handles[item.seq.request_id]) for item in items], dtype=np.int64)
        token_ids = [token for item in items for token in item.seq.token_ids[item.start : item.end]]
        block_ids = [block for item in items for block in item.seq.block_ids]
        return Step(
            rows=rows.tobytes(),
            token_ids=np.array(token_ids, dtype=np.int64).tobytes(),
            block_ids=np.array(block_ids, dtype=np.int64).tobytes(),
            tables=[item.seq.adapter if item.seq.adapter in tables else None for item in items],
        )


def decode_step(step: Step) -> ScheduledBatch:
    """The batch again, for an `InputBuilder`."""
    rows = np.frombuffer(step.rows, dtype=np.int64).reshape(-1, len(ROW)).tolist()
    token_ids = np.frombuffer(step.token_ids, dtype=np.int64).tolist()
    block_ids = np.frombuffer(step.block_ids, dtype=np.int64).tolist()
    items = []
    next_token = next_block = 0
    for row, adapter in zip(rows, step.tables, strict=True):
        handle, start, count, num_pending, num_prompt, samples, wants_logprobs, num_blocks, *lanes = row
        num_known = count - num_pending
        seq = MirroredSequence(
            request_id=str(handle),
            token_ids=_Window(start, token_ids[next_token : next_token + num_known]),
            num_prompt=num_prompt,
            block_ids=block_ids[next_block : next_block + num_blocks],
            lanes=LaneSpan(*lanes) if lanes[0] >= 0 else None,
            adapter=adapter,
            wants_prompt_logprobs=bool(wants_logprobs),
        )
        next_token += num_known
        next_block += num_blocks
        items.append(ScheduledSequence(seq, start, count, bool(samples)))
    return ScheduledBatch(items)


def _row(item: ScheduledSequence, handle: int) -> tuple[int, ...]:
    seq, lanes = item.seq, item.seq.lanes
    return (
        handle,
        item.start,
        item.count,
        item.num_pending,
        seq.num_prompt,
        int(item.samples),
        int(item.wants_prompt_logprobs),
        len(seq.block_ids),
        *((lanes.first, lanes.count, lanes.rank) if lanes is not None else (-1, 0, 0)),
    )


class MirroredSequence(Sequence):
    """What a step reads of a sequence that rank 0 owns."""

    __slots__ = ("_request_id", "_wants_prompt_logprobs")

    def __init__(
        self,
        *,
        request_id: str,
        token_ids: list[int],
        num_prompt: int,
        block_ids: list[int],
        lanes: LaneSpan | None,
        adapter: str | None,
        wants_prompt_logprobs: bool,
    ) -> None:
        # not Sequence's: there is no request here
        self._request_id = request_id
        self.token_ids = token_ids
        self.num_prompt = num_prompt
        self.block_ids = block_ids
        self.lanes = lanes
        self.adapter = adapter
        self._wants_prompt_logprobs = wants_prompt_logprobs

    @property
    def request_id(self) -> str:
        """Stands for the request's own."""
        return self._request_id

    @property
    def wants_prompt_logprobs(self) -> bool:
        """As rank 0 says."""
        return self._wants_prompt_logprobs


class _Window(list[int]):
    """The tokens of a sequence from `start` on; those before are not known."""

    def __init__(self, start: int, tokens: list[int]) -> None:
        super().__init__(tokens)
        self._start = start

    def __len__(self) -> int:
        return self._start + super().__len__()

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | list[int]:
        assert isinstance(index, slice)
        return super().__getitem__(slice(index.start - self._start, index.stop - self._start))
