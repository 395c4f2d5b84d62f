"""Both attentions, plain torch and compiled, against the reference, through the engine's own seams."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from loramux.engine.adapters.lanes import LaneSpan, LaneTable
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.block_manager import BlockManager
from loramux.engine.kernels.attention import (
    Attention,
    AttentionShape,
    BatchLayout,
    TorchAttention,
    reference_attention,
)
from loramux.engine.kernels.attention_varlen import VarlenAttention
from loramux.engine.kernels.cpu.backend import CpuAttention, supports
from loramux.engine.model_input import InputBuilder, ModelInput
from loramux.engine.scheduler import Scheduler
from loramux.engine.sequence import Sequence
from loramux.engine.step import ScheduledBatch, ScheduledSequence
from loramux.engine.types import Request, TokenSampling
from tests.engine.kernels import paged_libraries

KERNELS = "loramux.engine.kernels"
KV_HEADS, HEADS, DIM, BLOCK, BLOCKS = 2, 6, 32, 16, 256

SHAPE = AttentionShape(
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    block_size=BLOCK,
    windows=(None, 5),
    dtype=torch.float32,
    device=torch.device("cpu"),
)
BACKENDS = [TorchAttention, CpuAttention]
FOREIGN = ["varlen", "flashinfer"]  # with stand-ins for the libraries that compute
WORK = [
    [(0, 7)],
    [(0, 200)],  # more than one query block
    [(9, 4), (16, 16), (3, 2)],
    [(0, 1), (1, 1), (15, 1), (16, 1), (60, 1), (61, 1), (300, 1)],  # groups of different length
    [(5, 1), (0, 9), (31, 1), (12, 2)],
    [(i, 1) for i in range(40)],  # enough rows for several threads
]


def sequence(name: str, num_tokens: int, blocks: BlockManager) -> Sequence:
    sampling = TokenSampling(max_tokens=1)
    seq = Sequence(Request(request_id=name, prompt_token_ids=[1] * num_tokens, sampling=sampling), 0.0)
    held = blocks.allocate(-(-num_tokens // BLOCK))
    assert held is not None
    seq.block_ids = held
    return seq


def make_builder(attention: Attention) -> InputBuilder:
    return InputBuilder(
        attention=attention,
        needs_lengths=True,
        lora_kernel=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def run(attention: Attention, work: list[tuple[int, int]], window: int | None) -> list[torch.Tensor]:
    """Compute every sequence's earlier tokens first, then the work; returns its rows by sequence."""
    torch.manual_seed(0)
    blocks = BlockManager(BLOCKS, BLOCK)
    blocks.allocate(3)  # so that block ids and positions differ
    cache = attention.empty_cache(BLOCKS)
    builder = make_builder(attention)
    seqs = [sequence(str(i), start + count, blocks) for i, (start, count) in enumerate(work)]
    qkv = [torch.randn(seq.num_tokens, HEADS + 2 * KV_HEADS, DIM) for seq in seqs]
    earlier = [ScheduledSequence(s, 0, start) for s, (start, _) in zip(seqs, work, strict=True) if start]
    if earlier:
        compute(attention, cache, builder.build(ScheduledBatch(earlier)), qkv, None)
    items = [ScheduledSequence(s, start, n) for s, (start, n) in zip(seqs, work, strict=True)]
    inputs = builder.build(ScheduledBatch(items))
    out = compute(attention, cache, inputs, qkv, window)
    rows = dict(
        zip(
            (item.seq.request_id for item in inputs.order),
            torch.split(out, [i.count for i in inputs.order]),
            strict=True,
        )
    )
    for i, (start, count) in enumerate(work):
        q, k, v = torch.split(qkv[i], [HEADS, KV_HEADS, KV_HEADS], dim=1)
        expected = reference_attention(q[start:], k, v, start=start, window=window)
        torch.testing.assert_close(rows[str(i)], expected.reshape(count, -1), rtol=1e-4, atol=1e-5)
    return [rows[str(i)] for i in range(len(work))]


def compute(
    attention: Attention, cache: object, inputs: ModelInput, qkv: list[torch.Tensor], window: int | None
) -> torch.Tensor:
    batch = torch.cat([qkv[int(i.seq.request_id)][i.start : i.end] for i in inputs.order])
    q = attention.store(batch.view(len(batch), -1).clone(), None, None, cache, inputs.attention)  # type: ignore[arg-type]
    return attention.attend(q, cache, inputs.attention, window=window)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("work", WORK, ids=["prompt", "long prompt", "chunks", "decode", "mixed", "many"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_equals_the_reference(
    backend: type[TorchAttention] | type[CpuAttention], work: list[tuple[int, int]], window: int | None
) -> None:
    run(backend(SHAPE), work, window)


def test_each_dtype_of_a_process_has_code_of_its_own() -> None:
    CpuAttention(replace(SHAPE, dtype=torch.bfloat16))

    run(CpuAttention(SHAPE), WORK[4], None)


@pytest.mark.parametrize("work", [WORK[1], WORK[5]], ids=["prompt", "decode"])
def test_a_team_smaller_than_planned_computes_all(work: list[tuple[int, int]]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        attention = CpuAttention(SHAPE)
    finally:
        torch.set_num_threads(before)
    for call in attention._calls.values():
        call._num_threads = 2  # as OpenMP grants them under OMP_THREAD_LIMIT=2

    run(attention, work, None)


def make_foreign(name: str, shape: AttentionShape, patch: pytest.MonkeyPatch) -> Attention:
    if name == "varlen":
        return VarlenAttention(shape, paged_libraries.varlen_attn)
    patch.setitem(sys.modules, "flashinfer", paged_libraries)
    patch.delitem(sys.modules, f"{KERNELS}.attention_flashinfer", raising=False)
    made: Attention = importlib.import_module(f"{KERNELS}.attention_flashinfer").FlashInferAttention(shape)
    return made


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("work", [*WORK[2:5]], ids=["chunks", "decode", "mixed"])
@pytest.mark.parametrize("name", FOREIGN)
def test_libraries_are_told_what_they_are_to_compute(
    name: str, work: list[tuple[int, int]], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_foreign(name, SHAPE, monkeypatch), work, window)


def test_an_8_bit_cache_changes_little() -> None:
    plain = TorchAttention(SHAPE)
    small = TorchAttention(replace(SHAPE, kv_dtype=torch.float8_e4m3fn))
    torch.manual_seed(0)
    qkv = torch.randn(40, (HEADS + 2 * KV_HEADS) * DIM)
    qkv[3, -5] = 1e6  # a value that 8 bits cannot hold must not become a NaN
    blocks = [np.arange(3)]
    numbers = np.arange(40)
    layout = BatchLayout(np.array([40]), np.array([40]), np.array([0, 40]), numbers * 0, numbers, blocks, 0)

    rows = []
    for attention in (plain, small):
        cache, step = attention.empty_cache(4), attention.plan(layout)
        q = attention.store(qkv.clone(), None, None, cache, step)
        rows.append(attention.attend(q, cache, step, window=None))

    assert cache.k.dtype == torch.float8_e4m3fn
    assert cache.k.nbytes * 4 == plain.empty_cache(4).k.nbytes
    assert rows[1].isfinite().all()
    torch.testing.assert_close(rows[1][:3], rows[0][:3], rtol=0.1, atol=0.15)
    assert not torch.equal(rows[1][:3], rows[0][:3])


@pytest.mark.parametrize(
    ("change", "is_supported"),
    [
        ({}, True),
        ({"head_dim": 16}, False),
        ({"block_size": 8}, False),
        ({"dtype": torch.float16}, False),
        ({"kv_dtype": torch.float8_e4m3fn}, False),
    ],
)
def test_compiled_attention_takes_only_what_it_can(change: dict[str, object], is_supported: bool) -> None:
    fields = {name: getattr(SHAPE, name) for name in SHAPE.__slots__}

    assert supports(AttentionShape(**{**fields, **change})) is is_supported


@pytest.mark.parametrize("backend", BACKENDS)
def test_scheduler_and_builder_agree_on_the_token_order(
    backend: type[TorchAttention] | type[CpuAttention],
) -> None:
    scheduler = Scheduler(
        blocks=BlockManager(64, BLOCK),
        adapters=AdapterStore(LaneTable(8)),
        max_num_seqs=4,
        max_num_batched_tokens=12,
    )
    for name, length in (("a", 5), ("b", 9)):
        prompt = list(range(length))
        scheduler.add(
            Request(request_id=name, prompt_token_ids=prompt, sampling=TokenSampling(max_tokens=2)), 0.0
        )
    batch = scheduler.schedule(0.0)
    assert batch is not None

    inputs = make_builder(backend(SHAPE)).build(batch)

    assert inputs.token_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert inputs.positions.tolist() == inputs.token_ids.tolist()
    assert inputs.rope_lengths is not None
    assert inputs.rope_lengths.tolist() == [5] * 5 + [9] * 7
    assert inputs.logits_index.tolist() == [4]  # "b" is still in the middle of its prompt


def test_steps_share_a_lora_plan_while_the_same_rows_have_the_same_lanes() -> None:
    builder = make_builder(TorchAttention(SHAPE))
    blocks = BlockManager(BLOCKS, BLOCK)
    seqs = [sequence(str(i), 5, blocks) for i in range(3)]

    def plan(*firsts: int | None) -> object:
        for seq, first in zip(seqs, firsts, strict=True):
            seq.lanes = None if first is None else LaneSpan(first, 8, 8)
        return builder.build(ScheduledBatch([ScheduledSequence(seq, 4, 1) for seq in seqs])).lora

    first = plan(8, 16, 16)

    assert first is not None
    assert plan(8, 16, 16) is first
    assert plan(8, 8, 16) is not first
    assert plan(None, None, None) is None
    assert plan(8, 16, 16) is not first
