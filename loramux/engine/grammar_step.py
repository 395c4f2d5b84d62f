"""The grammars of one step: masks computed in a thread beside the model, and what they say afterwards."""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch
from llguidance import LLTokenizer

from loramux.engine.background import roam
from loramux.engine.grammar import FilledMasks, GrammarMasks, MaskRow
from loramux.engine.layers.sampler import TokenMask
from loramux.engine.sequence import Sequence
from loramux.engine.step import ScheduledSequence

MAX_THREADS: Final = 8
IMPOSSIBLE: Final = "the grammar allows no token that allowed_token_ids, bad_words and min_tokens leave"


@dataclass(frozen=True, slots=True)
class StepMasks:
    """The masks of the sequences of a step that have a grammar."""

    sequences: list[Sequence]
    filled: FilledMasks

    def token_mask(self, sampling: Items[Sequence], device: torch.device) -> TokenMask:
        """For the sampler, whose rows are these sequences; those with a grammar are in the same order."""
        rows = [index for index, seq in enumerate(sampling) if seq.matcher is not None]
        forbidden = torch.from_numpy(self.filled.forbidden)
        return TokenMask(rows, forbidden.to(device, non_blocking=True))

    @property
    def ended(self) -> frozenset[str]:
        """Sequences whose text is complete: no token can follow."""
        return frozenset(self.sequences[row].request_id for row in self.filled.ended)

    @property
    def failed(self) -> dict[str, str]:
        """Sequences that cannot go on, and why."""
        return {self.sequences[row].request_id: why for row, why in self.filled.failed.items()}


class GrammarStep:
    """Starts the computation of a step's masks; its thread is started by the first grammar."""

    def __init__(self, vocab_size: int) -> None:
        """Args:
        vocab_size: columns of the logits.
        """
        self._vocab_size = vocab_size
        self._masks: GrammarMasks | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks", initializer=roam)

    def begin(
        self, order: Items[ScheduledSequence], tokenizer: LLTokenizer | None
    ) -> Future[StepMasks] | None:
        """The masks of those that sample a token under a grammar, in the same order; None if none does."""
        sequences = [item.seq for item in order if item.samples and item.seq.matcher is not None]
        if not sequences:
            return None
        assert tokenizer is not None, "a matcher is ready, so there is a tokenizer"
        return self._pool.submit(self._fill, sequences, tokenizer)

    def _fill(self, sequences: list[Sequence], tokenizer: LLTokenizer) -> StepMasks:
        if self._masks is None:
            self._masks = GrammarMasks(
                self._vocab_size, num_threads=min(torch.get_num_threads(), MAX_THREADS)
            )
        rows = [
            MaskRow(seq.matcher, seq.sampling.end_token_ids) for seq in sequences if seq.matcher is not None
        ]
        return StepMasks(sequences, self._masks.fill(rows, tokenizer))
