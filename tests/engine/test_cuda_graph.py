"""Which graph a step takes, and what is recorded."""

from __future__ import annotations

import pytest

from loramux.engine.cuda_graph import (
    DECODE_SIZES,
    MIXED_SIZES,
    RerunRecorder,
    StepGraphs,
    StepShape,
    eager_shape,
    graph_shapes,
)

LANES = (0, 64, 128)


def shapes(
    sizes: list[int] | None = None, *, largest: int | None = None, max_seqs: int = 40, max_tokens: int = 512
) -> list[StepShape]:
    return graph_shapes(sizes, largest=largest, max_seqs=max_seqs, max_tokens=max_tokens, lanes=LANES)


def recorded(which: list[StepShape]) -> StepGraphs:
    graphs = StepGraphs(which, RerunRecorder())
    graphs.record(lambda _: None)
    return graphs


def test_every_number_of_sequences_has_a_decode_graph_that_holds_it() -> None:
    graphs = recorded(shapes())
    for num_seqs in range(1, 41):
        found = graphs.find(num_seqs, num_seqs, 64, decode_only=True)
        assert found is not None
        assert found.num_tokens == min(size for size in (*DECODE_SIZES, 40) if size >= num_seqs)
        assert (found.num_lanes, found.decode_only) == (64, True)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(2, 64), (64, 64), (65, 128), (500, 512), (512, 512), (513, None)]
)
def test_a_step_that_reads_prompts_takes_the_smallest_graph_that_holds_it(
    num_tokens: int, expected: int | None
) -> None:
    found = recorded(shapes()).find(num_tokens, 2, 0, decode_only=False)
    assert (found.num_tokens if found else None) == expected


def test_lanes_are_never_more_than_the_step_has() -> None:
    assert recorded(shapes()).find(1, 1, 32, decode_only=True) is None


def test_what_is_recorded() -> None:
    found = shapes()
    decode = {s.num_tokens for s in found if s.decode_only}
    mixed = {s.num_tokens for s in found if not s.decode_only}

    assert decode == {size for size in DECODE_SIZES if size < 40} | {40}
    assert mixed == {size for size in MIXED_SIZES if size <= 512}
    assert all(s.num_seqs == s.num_tokens for s in found if s.decode_only)
    assert all(s.num_seqs == 40 for s in found if not s.decode_only)
    assert {s.num_lanes for s in found} == set(LANES)
    assert len(found) == len(set(found))


def test_the_operator_decides_what_is_recorded() -> None:
    assert {s.num_tokens for s in shapes([1, 8, 64])} == {1, 8, 64}
    assert all(s.decode_only for s in shapes([1, 8]))
    assert max(s.num_tokens for s in shapes(largest=100)) == 64


def test_the_largest_is_recorded_first() -> None:
    order: list[StepShape] = []
    graphs = StepGraphs(shapes(), RerunRecorder())
    told: list[tuple[int, int]] = []
    graphs.record(order.append, lambda *progress: told.append(progress))

    sizes = [shape.num_tokens for shape in order]
    assert sizes == sorted(sizes, reverse=True)
    assert told == [(i + 1, len(order)) for i in range(len(order))]


def test_replay_computes_the_shape_that_was_asked_for() -> None:
    computed: list[StepShape] = []
    graphs = recorded(shapes())
    graphs.record(computed.append)
    computed.clear()
    shape = graphs.find(3, 3, 128, decode_only=True)
    assert shape is not None

    graphs.replay(shape)

    assert computed == [StepShape(4, 4, 128, True)]


def test_steps_without_a_graph_are_padded_to_what_kernels_are_compiled_for() -> None:
    assert eager_shape(17, 3, 0, decode_only=False) == StepShape(32, 3, 0, False)
