"""Rank 0 of a tensor-parallel engine: a `ModelRunner` that tells the other ranks what it does.

It lives in the engine's process, beside the scheduler, and is the only rank that samples.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from llguidance import LLTokenizer

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.packed import HostWeights
from loramux.engine.config import EngineConfig
from loramux.engine.errors import EngineDead, InvalidConfig, LoramuxError
from loramux.engine.model_runner import ModelRunner, find_device
from loramux.engine.models.families import load_model_config
from loramux.engine.parallel import commands
from loramux.engine.parallel.commands import Answer, Command, Done
from loramux.engine.parallel.crew import Crew
from loramux.engine.parallel.mirror import StepEncoder
from loramux.engine.parallel.peers import Peers
from loramux.engine.parallel.shard import FLAG, shard_model
from loramux.engine.step import RunningStep, ScheduledBatch, StepResult
from loramux.engine.types import AdapterSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _SharedStep:
    """A step of which the other ranks compute their parts."""

    own: RunningStep
    crew: Crew

    def result(self) -> StepResult:
        """See `RunningStep`.

        Raises:
            EngineDead: another rank is gone; what was computed without it means nothing.
        """
        with self.crew.blamed():
            found = self.own.result()
        if self.crew.lost is not None:
            raise EngineDead(self.crew.lost)
        return found


class LeadingRunner(ModelRunner):
    """This rank's part of the model, and the other ranks behind it."""

    def __init__(
        self,
        config: EngineConfig,
        on_layer: Callable[[int, int], None] | None,
        on_lost: Callable[[str], None],
    ) -> None:
        """Start the other ranks and load the model together with them.

        Args:
            on_layer: as for `ModelRunner`.
            on_lost: called with a sentence, in a thread, when a rank ends that was not told to.

        Raises:
            UnsupportedModel, InvalidConfig: the model cannot be served as configured, or not by so many
                ranks.
            EngineDead: a rank ended while it was starting.
        """
        num_ranks = config.tensor_parallel_size
        shard_model(load_model_config(Path(config.model)), 0, num_ranks)  # refuse before anything starts
        device = find_device(config.device)
        if device.type == "cuda" and torch.cuda.device_count() < num_ranks:
            raise InvalidConfig(
                f"{FLAG} {num_ranks}: this machine has {torch.cuda.device_count()} CUDA devices", param=FLAG
            )
        self._encoder = StepEncoder()
        self._is_gpu = device.type == "cuda"
        self._ranks: Peers | None = None
        self._crew = Crew(config, device, partial(self._abandon, on_lost))
        try:
            self._crew.answers()  # all are there
            self._ranks = Peers(0, num_ranks, self._crew.store, device)
            self._load(config, on_layer, self._ranks)
            self._crew.wait_complete()
        except BaseException:
            self._crew.close()
            raise

    @property
    def other_pids(self) -> list[int]:
        """Process ids of ranks 1 and up."""
        return self._crew.pids

    def read_adapter(self, spec: AdapterSpec) -> HostWeights:
        """As every rank's part of it; one that fails on any rank is held by none.

        Raises:
            AdapterError: a rank could not read it.
        """
        try:
            own, answers = self._together(commands.ReadAdapter(spec), partial(super().read_adapter, spec))
        except LoramuxError:
            self.forget_adapter(spec.digest)
            raise
        return replace(own, other_ranks_bytes=sum(a.nbytes for a in answers if isinstance(a, Done)))

    def fill_lanes(self, adapter: HostWeights, span: LaneSpan) -> None:
        """On every rank; returns when all are done."""
        command = commands.FillLanes(adapter.digest, span.first, span.count, span.rank)
        self._together(command, partial(super().fill_lanes, adapter, span))

    def forget_adapter(self, digest: str) -> None:
        """Free what the other ranks hold of it in host memory."""
        self._crew.tell(commands.DropAdapter(digest))

    def keep_tables(self, residents: Set[str]) -> None:
        """On every rank."""
        if self.tables:
            self._crew.tell(commands.KeepTables(sorted(residents)))
        super().keep_tables(residents)

    def launch(self, batch: ScheduledBatch, tokenizer: LLTokenizer | None = None) -> RunningStep:
        """On every rank; this one samples.

        Raises:
            EngineDead: another rank is gone.
        """
        with self._crew.blamed():
            self._crew.tell(self._encoder.encode(batch, self.tables))
            return _SharedStep(super().launch(batch, tokenizer), self._crew)

    def close(self) -> None:
        """End the other ranks."""
        self._crew.close()
        if self._ranks is not None:
            self._ranks.close()

    def _abandon(self, on_lost: Callable[[str], None], why: str) -> None:
        """In a thread: let a GPU that waits for a lost rank go on, so that its step ends in an error."""
        if self._ranks is not None and self._is_gpu:
            self._ranks.abort()
        on_lost(why)

    def _load(self, config: EngineConfig, on_layer: Callable[[int, int], None] | None, peers: Peers) -> None:
        try:
            with self._crew.blamed():
                super().__init__(config, on_layer, peers)
        except EngineDead:
            self._crew.check(self._crew.last_words())  # it may have said why
            raise

    def _together(self, command: Command, own: Callable[[], T]) -> tuple[T, list[Answer]]:
        """Carry out a command here and on every other rank.

        Raises:
            LoramuxError: a rank, this one first, could not.
        """
        self._crew.tell(command)
        try:
            result = own()
        except BaseException:
            self._crew.answers()  # each command has one, read or not
            raise
        answers = self._crew.answers()
        self._crew.check(answers)
        return result, answers
