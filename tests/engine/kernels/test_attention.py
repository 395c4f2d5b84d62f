from __future__ import annotations

import pytest
import torch

from loramux.engine.adapters.lanes import LaneTable
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.block_manager import BlockManager
from loramux.engine.kernels.attention import KVCache, paged_attention, reference_attention, write_kv
from loramux.engine.model_input import InputBuilder
from loramux.engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from loramux.engine.sequence import Sequence
from loramux.engine.types import Request, TokenSampling

KV_HEADS, HEADS, DIM, BLOCK, BLOCKS = 2, 6, 8, 4, 128


def sequence(name: str, num_tokens: int, blocks: BlockManager) -> Sequence:
    sampling = TokenSampling(max_tokens=1)
    seq = Sequence(Request(request_id=name, prompt_token_ids=[1] * num_tokens, sampling=sampling), 0.0)
    held = blocks.allocate(-(-num_tokens // BLOCK))
    assert held is not None
    seq.block_ids = held
    return seq


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "work",
    [
        [(0, 7)],
        [(0, 200)],  # more than one query block
        [(9, 4), (16, 16), (3, 1)],
        [(0, 1), (1, 1), (15, 1), (16, 1), (60, 1), (61, 1), (300, 1)],  # groups of different length
        [(5, 1), (0, 9), (31, 1), (12, 2)],
    ],
    ids=["prompt", "long prompt", "chunks", "decode", "mixed"],
)
def test_paged_attention_equals_the_reference(work: list[tuple[int, int]], window: int | None) -> None:
    torch.manual_seed(0)
    blocks = BlockManager(BLOCKS, BLOCK)
    cache = KVCache(torch.randn(BLOCKS, KV_HEADS, BLOCK, DIM), torch.randn(BLOCKS, KV_HEADS, BLOCK, DIM))
    blocks.allocate(3)  # so that block ids and positions differ
    items = [
        ScheduledSequence(sequence(str(i), start + count, blocks), start, count)
        for i, (start, count) in enumerate(work)
    ]
    builder = InputBuilder(
        block_size=BLOCK,
        num_kv_heads=KV_HEADS,
        windows=(window, None),
        needs_lengths=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    inputs = builder.build(ScheduledBatch(items))
    total = sum(item.count for item in items)
    q, k, v = (torch.randn(total, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))

    write_kv(cache, k, v, inputs.attention.write_rows)
    out = paged_attention(q, cache, inputs.attention, scale=DIM**-0.5, window=window)

    first = 0
    for item in inputs.order:
        keys, values = (
            torch.cat([c[b].transpose(0, 1) for b in item.seq.block_ids])[: item.end]
            for c in (cache.k, cache.v)
        )
        tokens = slice(first, first + item.count)
        assert torch.equal(keys[item.start :], k[tokens])
        expected = reference_attention(q[tokens], keys, values, start=item.start, window=window)
        torch.testing.assert_close(out[tokens], expected.reshape(item.count, -1), rtol=1e-4, atol=1e-5)
        first += item.count


def test_scheduler_and_builder_agree_on_the_token_order() -> None:
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
    builder = InputBuilder(
        block_size=BLOCK,
        num_kv_heads=KV_HEADS,
        windows=(None,),
        needs_lengths=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    batch = scheduler.schedule(0.0)
    assert batch is not None

    inputs = builder.build(batch)

    assert inputs.token_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert inputs.positions.tolist() == inputs.token_ids.tolist()
    assert inputs.rope_lengths is not None
    assert inputs.rope_lengths.tolist() == [5] * 5 + [9] * 7
    assert inputs.logits_index.tolist() == [4]  # "b" is still in the middle of its prompt
