from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.kernels.gpu import lora_input
from loramux.engine.step_buffers import StepBuffers, StepLimits

LIMITS = StepLimits(max_tokens=3000, max_seqs=8, max_blocks=4, block_size=16, num_lanes=160, vocab_size=1)
A, B = LaneSpan(0, 8, 5), LaneSpan(64, 16, 16)


def test_buckets_double_up_to_the_whole_pool() -> None:
    assert lora_input.lane_buckets(0) == (0,)
    assert lora_input.lane_buckets(24) == (0, 24)
    assert lora_input.lane_buckets(512) == (0, 64, 128, 256, 512)
    assert lora_input.lane_buckets(160) == (0, 64, 128, 160)


def test_the_bucket_holds_the_last_lane_in_use() -> None:
    assert lora_input.lanes_in_use([None, None], 160) == 0
    assert lora_input.lanes_in_use([A, None], 160) == 64
    assert lora_input.lanes_in_use([A, B], 160) == 128
    assert lora_input.lanes_in_use([LaneSpan(128, 24, 17)], 160) == 160


def test_a_server_without_lanes_needs_no_fields() -> None:
    without = StepLimits(max_tokens=8, max_seqs=8, max_blocks=4, block_size=16, num_lanes=0, vocab_size=1)
    assert lora_input.fields(without) == {}
    assert lora_input.view({}, 8, 8, num_lanes=0, decode_only=True) is None


@pytest.mark.parametrize(
    ("spans", "counts", "padding"),
    [
        ([None, A, A, B], [1, 1, 1, 1], 0),
        ([None, A, A, B], [1, 1, 1, 1], 4),
        ([A, None, A, B, None], [1, 1, 40, 16, 33], 37),
        ([B], [2500], 12),
        ([None] * 8, [1] * 8, 0),
    ],
)
def test_tokens_and_tiles_tell_the_same(
    spans: list[LaneSpan | None], counts: list[int], padding: int
) -> None:
    buffers = StepBuffers(lora_input.fields(LIMITS), torch.device("cpu"))
    for array in buffers.host.values():
        array.fill(77)  # of an older step
    offsets = np.concatenate(([0], np.cumsum(counts)))
    num_tokens = int(offsets[-1]) + padding

    lora_input.fill(buffers.host, spans, offsets, num_tokens)
    buffers.upload()
    found = lora_input.view(buffers.device, num_tokens, len(spans), num_lanes=160, decode_only=False)

    assert found is not None
    assert found.num_tokens == num_tokens
    owner = np.repeat(np.arange(len(spans)), counts)
    lanes = [spans[i].first if spans[i] else -1 for i in owner] + [-1] * padding
    ranks = [spans[i].rank if spans[i] else 0 for i in owner] + [0] * padding
    assert found.token_lane.tolist() == lanes
    assert found.token_rank.tolist() == ranks
    covered: list[int] = []
    for first, count, lane, rank in found.tiles.tolist():
        assert count <= found.tile_rows
        covered += range(first, first + count)
        assert lanes[first : first + count] == [lane] * count
        assert ranks[first : first + count] == [rank] * count
    assert covered == list(range(num_tokens)), "each token in one tile"
