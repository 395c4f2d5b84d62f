"""The other ranks build the model input of a step from what rank 0 sends of it, and it is the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
import torch

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.kernels.attention import AttentionShape, TorchAttention
from loramux.engine.kernels.lora import OutputGain
from loramux.engine.kernels.tables import AdapterTables
from loramux.engine.model_input import InputBuilder
from loramux.engine.parallel import commands
from loramux.engine.parallel.mirror import StepEncoder, decode_step
from loramux.engine.sequence import Sequence
from loramux.engine.step import ScheduledBatch, ScheduledSequence
from loramux.engine.types import Request, TokenSampling

TABLES = {"bbb": AdapterTables(gains={0: OutputGain(torch.ones(4), None)})}


def sequence(prompt: int, blocks: list[int], adapter: str | None, **sampling: Any) -> Sequence:
    seq = Sequence(
        Request(
            request_id=f"{adapter}-{prompt}",
            prompt_token_ids=list(range(100, 100 + prompt)),
            sampling=TokenSampling(max_tokens=9, **sampling),
            adapter=adapter,
        ),
        0.0,
    )
    seq.block_ids = blocks
    return seq


@pytest.fixture
def batch() -> ScheduledBatch:
    """A decoding row, the end of a prompt and the middle of another one."""
    decoding = sequence(5, [3], "aaa")
    decoding.lanes = LaneSpan(8, 8, 4)
    for token in (7, 8, 9):
        decoding.append(token)
    ending = sequence(30, [9, 1], "bbb", prompt_logprobs=2)
    ending.lanes = LaneSpan(16, 24, 20)
    return ScheduledBatch(
        [
            ScheduledSequence(sequence(40, [5, 6, 7], None), 16, 16, samples=False),
            ScheduledSequence(ending, 20, 10),
            ScheduledSequence(decoding, 7, 1),
        ]
    )


def tensors_of(value: Any) -> Any:
    """A model input as plain values."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return {
            f.name: tensors_of(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "order"
        }
    if isinstance(value, dict):
        return {key: tensors_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [tensors_of(entry) for entry in value]
    return value


def test_both_sides_build_the_same_input(batch: ScheduledBatch) -> None:
    shape = AttentionShape(
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        block_size=16,
        windows=(None,),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    builder = InputBuilder(
        attention=TorchAttention(shape),
        needs_lengths=True,
        lora_kernel=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    sent = commands.decode_command(commands.encode(StepEncoder().encode(batch, TABLES)))
    assert isinstance(sent, commands.Step)

    here, there = builder.build(batch, TABLES), builder.build(decode_step(sent), TABLES)

    assert tensors_of(there) == tensors_of(here)
    assert len(here.logits_index) == 11


def test_a_long_context_does_not_travel(batch: ScheduledBatch) -> None:
    batch.sequences[2].seq.token_ids[:0] = range(100_000)

    assert len(StepEncoder().encode(batch, TABLES).token_ids) == 8 * (16 + 10 + 1)


def test_a_pending_token_is_found_by_its_sequences_handle(batch: ScheduledBatch) -> None:
    encoder = StepEncoder()
    first = decode_step(encoder.encode(batch, TABLES)).sequences
    middle, ending, decoding = batch.sequences
    for item in (ending, decoding):
        item.seq.num_pending = 1
    following = ScheduledBatch(
        [
            ScheduledSequence(decoding.seq, 8, 1),
            ScheduledSequence(sequence(3, [2], "aaa"), 0, 3),
            ScheduledSequence(ending.seq, 30, 1),
        ]
    )

    then = decode_step(encoder.encode(following, TABLES)).sequences

    assert [item.num_pending for item in then] == [1, 0, 1]
    assert [then[0].seq.request_id, then[2].seq.request_id] == [
        first[2].seq.request_id,
        first[1].seq.request_id,
    ]
    assert then[1].seq.request_id not in {item.seq.request_id for item in first}
    assert then[1].seq.token_ids[0:3] == [100, 101, 102]
    assert middle not in following.sequences


def test_only_adapters_with_tables_are_named(batch: ScheduledBatch) -> None:
    assert StepEncoder().encode(batch, TABLES).tables == [None, "bbb", None]


def test_every_command_survives_the_way() -> None:
    for command in (
        commands.FillLanes("aaa", 8, 16, 12),
        commands.DropAdapter("aaa"),
        commands.KeepTables(["aaa"]),
        commands.Shutdown(),
    ):
        assert commands.decode_command(commands.encode(command)) == command
    with pytest.raises(msgspec.ValidationError):
        commands.decode_answer(commands.encode(commands.Shutdown()))
