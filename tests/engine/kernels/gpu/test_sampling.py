"""The sampling kernels against their plain-torch reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.engine.kernels import sampling as layout
from loramux.engine.kernels.gpu.sampling import TritonSampler
from loramux.engine.kernels.sampling import (
    ACTIVE,
    BIASED,
    DRAW,
    DRAWN,
    FILTERED,
    FULL,
    GREEDY,
    MASKED,
    PENALISED,
    SamplerInput,
    SamplerTables,
    draw_tokens,
)
from tests.engine.layers.test_device_sampler import CPU, EDITS, VOCAB, Stepper, follow_the_cpu_sampler
from tests.engine.layers.test_device_sampler import row as request

EVERYTHING = DRAWN | FILTERED | PENALISED | BIASED | MASKED


@dataclass
class Step:
    """Rows with random logits and tables."""

    logits: Tensor
    inputs: SamplerInput
    tables: SamplerTables

    @staticmethod
    def of(
        rows: list[dict[str, Any]], vocab_size: int, *, mode: int = FULL, device: torch.device = CPU
    ) -> Step:
        ints = torch.zeros((len(rows), layout.INT_COLUMNS), dtype=torch.int32)
        floats = torch.ones((len(rows), layout.FLOAT_COLUMNS))
        for index, row in enumerate(rows):
            ints[index, layout.FLAGS] = row.get("flags", 0) | ACTIVE
            ints[index, layout.SLOT] = len(rows) - 1 - index
            ints[index, layout.MASK_ROW] = index
            ints[index, layout.TOP_K] = row.get("top_k", vocab_size)
            ints[index, layout.SEED_LOW] = row.get("seed", index)
            ints[index, layout.POSITION] = row.get("position", 0)
            floats[index, layout.INVERSE_TEMPERATURE] = 1 / row.get("temperature", 1.0)
            floats[index, layout.TOP_P] = row.get("top_p", 1.0)
            floats[index, layout.MIN_P] = row.get("min_p", 0.0)
            floats[index, layout.REPETITION] = 1.3
            floats[index, layout.FREQUENCY] = 0.2
            floats[index, layout.PRESENCE] = 0.7
        rng = torch.Generator().manual_seed(len(rows))
        size = (len(rows), vocab_size)
        counts = torch.randint(0, 3, size, generator=rng, dtype=torch.int32)
        counts[:, ::5] |= layout.IN_PROMPT
        counts[:, 1::2] = 0
        words = torch.randint(-(2**31), 2**31 - 1, (len(rows), -(-vocab_size // 32)), generator=rng)
        tables = SamplerTables(
            counts.to(device), torch.randn(size, generator=rng).to(device), words.int().to(device)
        )
        logits = (torch.randn(size, generator=rng) * 3).to(device)
        return Step(logits, SamplerInput(ints.to(device), floats.to(device), mode), tables)

    def drawn(self, draw: Any) -> tuple[list[int], Tensor]:
        """Tokens, and the counts afterwards."""
        tables = SamplerTables(self.tables.counts.clone(), self.tables.biases, self.tables.masks)
        out = torch.full((len(self.logits),), -1, dtype=torch.int32, device=self.logits.device)
        draw(self.logits, self.inputs, tables, out)
        return out.tolist(), tables.counts

    def check(self) -> list[int]:
        """The kernels do what the reference does; its tokens."""
        rows, vocab_size = self.logits.shape
        kernels = TritonSampler(
            rows, vocab_size, self.logits.device, chunk=32, filter_block=128, list_size=32
        )
        expected, counts = self.drawn(draw_tokens)
        for _ in range(1 + (rows < 6)):  # the kernels' scratch is as it was
            found, found_counts = self.drawn(kernels)
            assert found == expected
            assert torch.equal(found_counts, counts)
        return expected


@pytest.mark.parametrize("vocab_size", [7, 64, 301])
@pytest.mark.parametrize("mode", [GREEDY, DRAW, FULL])
def test_greedy_rows_take_the_first_of_the_best(vocab_size: int, mode: int) -> None:
    step = Step.of([{}] * 5, vocab_size, mode=mode)
    step.logits[1, 2:] = step.logits.max() + 1  # a tie across chunks
    step.logits[2] = float("-inf")
    step.logits[3, 5] = float("nan")
    step.logits[4, 6] = float("inf")

    tokens = step.check()

    assert tokens[:3] == [int(step.logits[0].argmax()), 2, 0]
    assert tokens[4] == 6


def test_low_precision_logits_of_a_wider_tensor_are_read() -> None:
    step = Step.of([{}, {"flags": DRAWN}], 100, mode=DRAW)
    step.logits = torch.nn.functional.pad(step.logits, (0, 28), value=99.0).bfloat16()[:, :100]

    step.check()


def test_padding_costs_nothing_and_gives_token_0() -> None:
    step = Step.of([{"flags": EVERYTHING}] * 3, 65)
    step.inputs.ints[1:] = 0

    assert step.check()[1:] == [0, 0]


def test_draws_depend_on_seed_position_and_token_only() -> None:
    rows = [{"flags": DRAWN, "seed": 5, "position": 8}, {"flags": DRAWN, "seed": 5, "position": 9}]
    step = Step.of([*rows, *rows, {"flags": DRAWN, "seed": -5, "position": 8}], 200, mode=DRAW)
    step.logits[:] = step.logits[0]

    tokens = step.check()

    assert tokens[:2] == tokens[2:4]
    assert len(set(tokens)) == 3


@pytest.mark.parametrize("flags", [PENALISED, BIASED, MASKED, PENALISED | BIASED | MASKED | DRAWN])
def test_edits(flags: int) -> None:
    step = Step.of([{"flags": flags}, {}], 130)

    step.check()


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 9},
        {"top_p": 0.3},
        {"top_p": 0.95, "temperature": 3.0},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.5},
        {"top_k": 90, "top_p": 0.9, "temperature": 2.0},
        {"top_p": 0.7, "min_p": 0.05},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.1},
        {"top_k": 299, "top_p": 1e-4},
    ],
    ids=str,
)
def test_filters(filters: dict[str, Any]) -> None:
    step = Step.of([{"flags": DRAWN | FILTERED, "seed": seed, **filters} for seed in range(6)], 300)

    step.check()


@pytest.mark.parametrize("filters", [{"top_k": 4}, {"top_p": 0.4}, {"top_k": 7, "top_p": 0.6}], ids=str)
def test_equal_logits_at_the_cut_are_kept_by_id(filters: dict[str, Any]) -> None:
    step = Step.of([{"flags": DRAWN | FILTERED, "seed": seed, **filters} for seed in range(12)], 150)
    step.logits[:6] = (step.logits[:6] / 2).round()
    step.logits[6:] = 0.0
    step.logits[6:, 70:] = float("-inf")

    tokens = step.check()

    if filters == {"top_k": 4}:
        assert set(tokens[6:]) <= {0, 1, 2, 3}


def test_rows_of_which_little_is_left() -> None:
    rows = [{"flags": DRAWN | FILTERED, "top_k": 3, "top_p": 0.5, "min_p": 0.1}] * 3
    step = Step.of(rows, 100)
    step.logits[0] = float("-inf")
    step.logits[1, :99] = float("-inf")
    step.logits[2, 2:] = float("-inf")

    assert step.check()[:2] == [0, 99]


def test_all_filters_and_edits_in_one_batch() -> None:
    rows: list[dict[str, Any]] = [
        {"flags": EVERYTHING, "top_k": 3 + 9 * i, "top_p": 0.8, "min_p": 0.01, "position": i}
        for i in range(4)
    ]

    Step.of([*rows, {}, {"flags": DRAWN}, {"flags": PENALISED}], 333).check()


def test_counts_biases_and_masks_follow_requests_through_steps() -> None:
    kernels = TritonSampler(len(EDITS), VOCAB, CPU, chunk=32, filter_block=32, list_size=16)

    follow_the_cpu_sampler(Stepper(max_seqs=len(EDITS), draw=kernels), 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_requests_are_followed_on_the_device() -> None:
    device = torch.device("cuda")
    kernels = TritonSampler(len(EDITS), VOCAB, device)

    follow_the_cpu_sampler(Stepper(max_seqs=len(EDITS), device=device, draw=kernels), 12, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_nothing_on_the_device() -> None:
    device = torch.device("cuda")
    stepper = Stepper(128256, 4, device, TritonSampler(4, 128256, device))
    fields: dict[str, Any] = {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "logit_bias": {5: 1.0}}
    rows = [request(str(i), [1, 2, 3], seed=i, **fields) for i in range(4)]
    logits = torch.randn((4, 128256), dtype=torch.bfloat16, device=device)
    expected = stepper(logits, rows)  # compiles; memory is found
    stepper(logits, [request(f"other {i}", [1, 2, 3], seed=i, **fields) for i in range(4)])

    torch.cuda.set_sync_debug_mode("error")
    try:
        found = stepper.launch(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert found.tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab_size", [128256, 152064])
@pytest.mark.parametrize("num_rows", [1, 33, 128])
@pytest.mark.parametrize("flags", [0, DRAWN, DRAWN | FILTERED, EVERYTHING])
def test_real_vocabularies_on_the_device(vocab_size: int, num_rows: int, flags: int) -> None:
    device = torch.device("cuda")
    kinds: list[dict[str, Any]] = [
        {"top_k": 20, "top_p": 0.8},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"top_k": 50},
    ]
    rows = [{"flags": flags, "temperature": 0.7, **kinds[i % 4]} for i in range(num_rows)]
    mode = FULL if flags & ~DRAWN else DRAW if flags else GREEDY
    step = Step.of(rows, vocab_size, mode=mode, device=device)
    kernels = TritonSampler(num_rows, vocab_size, device)

    expected, _ = step.drawn(draw_tokens)
    found, _ = step.drawn(kernels)

    same = sum(a == b for a, b in zip(expected, found, strict=True))
    assert same >= (num_rows if flags == 0 else 0.98 * num_rows)  # logarithms differ in their last digits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_reads_its_rows_anew() -> None:
    device = torch.device("cuda")
    step = Step.of([{"flags": EVERYTHING, "top_p": 0.9, "top_k": 40}] * 8, 128256, device=device)
    kernels = TritonSampler(8, 128256, device)
    expected, counts = step.drawn(kernels)
    out = torch.zeros(8, dtype=torch.int32, device=device)
    ints = step.inputs.ints.clone()
    tables = SamplerTables(step.tables.counts.clone(), step.tables.biases, step.tables.masks)
    graph = torch.cuda.CUDAGraph()
    step.inputs.ints.zero_()
    with torch.cuda.graph(graph):
        kernels(step.logits, step.inputs, tables, out)

    graph.replay()
    assert out.tolist() == [0] * 8
    step.inputs.ints.copy_(ints)
    graph.replay()

    assert out.tolist() == expected
    assert torch.equal(tables.counts, counts)
