"""The plan of a step: every query meets every key of its window exactly once, within the static bounds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.kernels.attention import BatchLayout
from loramux.engine.kernels.gpu import attention_input as columns
from loramux.engine.kernels.gpu.attention_input import AttentionPlanner
from loramux.engine.step_buffers import StepBuffers, StepLimits
from tests.engine.kernels.gpu.attention_steps import BLOCK, Work, make_layout, make_shape

CPU = torch.device("cpu")
LIMITS = StepLimits(
    max_tokens=4096, max_seqs=64, max_blocks=1024, block_size=BLOCK, num_lanes=0, vocab_size=0
)


def fill(planner: AttentionPlanner, step: BatchLayout) -> StepBuffers:
    buffers = StepBuffers(planner.fields, CPU)
    for array in buffers.host.values():
        array.fill(77)  # what an older step left
    buffers.upload(planner.fill(buffers.host, step))
    return buffers


def assert_covers(items: np.ndarray, tokens: range, step: BatchLayout, window: int | None) -> None:
    """Each of these tokens' visible keys lies in exactly one item."""
    seen: dict[int, Counter[int]] = {token: Counter() for token in tokens}
    for item in items[items[:, columns.NUM_PARTS] > 0]:
        first = item[columns.FIRST_TOKEN]
        for token in range(first, first + item[columns.NUM_TOKENS]):
            position = int(step.positions[token])
            assert position == item[columns.POSITION] + token - first
            seen[token].update(range(item[columns.KEY_BEGIN], min(item[columns.KEY_END], position + 1)))
    for token, keys in seen.items():
        end = int(step.positions[token]) + 1
        low = 0 if window is None else max(0, end - window)
        assert all(keys[key] == 1 for key in range(low, end))
        assert max(keys) == end - 1


@pytest.mark.parametrize("heads", [(6, 6), (9, 3), (32, 8), (28, 4), (16, 1)])
@pytest.mark.parametrize("window", [None, 100, 5000])
@settings(max_examples=8, deadline=None)
@given(
    work=st.lists(
        st.tuples(st.integers(0, 3000), st.sampled_from([1, 1, 1, 2, 15, 16, 17, 100, 700])),
        min_size=1,
        max_size=5,
    )
)
def test_items_cover_every_visible_key_once(heads: tuple[int, int], window: int | None, work: Work) -> None:
    step = make_layout(work)
    planner = AttentionPlanner(make_shape(*heads, window=window), LIMITS)

    host = fill(planner, step).host

    middle = int(step.offsets[step.num_decode])
    assert_covers(host["decode_items"][0], range(middle), step, window)
    assert_covers(host["prompt_items"][0], range(middle, int(step.offsets[-1])), step, window)


@pytest.mark.parametrize("heads", [(9, 3), (32, 8), (16, 1)])
@pytest.mark.parametrize(
    "work",
    [[(i, 1) for i in range(64)], [(15000, 1)] + [(5, 1)] * 63, [(16000, 2)] * 64, [(0, 65)] * 63],
)
def test_a_step_launches_no_more_than_its_size_says(heads: tuple[int, int], work: Work) -> None:
    step = make_layout(work)
    planner = AttentionPlanner(make_shape(*heads), LIMITS)

    host = fill(planner, step).host

    num_tokens = int(step.offsets[-1])
    bounds = {
        "decode_items": (planner.num_decode_items(len(work)), planner.decode),
        "prompt_items": (planner.num_prompt_items(num_tokens, len(work)), planner.prompt),
    }
    for name, (bound, cut) in bounds.items():
        items = host[name][0]
        assert not items[bound:].any()
        split = np.flatnonzero(items[:, columns.NUM_PARTS] > 1)
        assert len(split) <= planner.num_split_items(cut)
        assert split.tolist() == list(range(len(split))), "split tiles come first"
        assert (items[:, columns.KEY_BEGIN] % cut.block_n == 0).all()


def test_one_long_context_among_short_ones_is_shared_out() -> None:
    planner = AttentionPlanner(make_shape(32, 8), LIMITS)

    host = fill(planner, make_layout([(16000, 1)] + [(100, 1)] * 40)).host

    items = host["decode_items"][0]
    assert items[0, columns.NUM_PARTS] > 16
    assert (items[:, columns.KEY_END] - items[:, columns.KEY_BEGIN]).max() <= 1024


def test_padding_writes_no_keys() -> None:
    planner = AttentionPlanner(make_shape(9, 3), LIMITS)
    step = make_layout([(17, 1), (0, 3)])

    buffers = fill(planner, step)

    own = planner.view(buffers.device, 8, 4)
    block_ids = own.block_ids.numpy()
    assert own.slots.tolist() == [2 * BLOCK + 1, BLOCK, BLOCK + 1, BLOCK + 2] + [-1] * 4
    assert block_ids[:3].tolist() == [0, 2, 1]
