from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from loramux.engine.adapters.tables import column_norms, row_norms
from loramux.engine.kernels.lora import GainSegment, OutputGain, Segment, SiteLanes, apply_lora, plan_lora
from loramux.engine.kernels.tables import (
    AdapterTables,
    TableChange,
    TableSegment,
    TokenRows,
    change_embedding,
    change_logits,
)

VOCABULARY, WIDTH, RANK = 40, 12, 3


def random_change(*, is_head: bool, kind: str, seed: int = 0) -> TableChange:
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    outputs = VOCABULARY if is_head else WIDTH
    parts: dict[str, dict[str, Any]] = {
        "full": {"full": randn(VOCABULARY, WIDTH)},
        "rows": {"rows": TokenRows(torch.tensor([0, 7, 39]), randn(3, WIDTH))},
        "gain": {"gain": randn(outputs)},
        "lora": {
            "a": randn(RANK, WIDTH) if is_head else randn(VOCABULARY, RANK),
            "b": randn(RANK, outputs),
        },
    }
    chosen = parts if kind == "all" else {kind: parts[kind]}
    return TableChange(**{name: part for own in chosen.values() for name, part in own.items()})


def table_of(change: TableChange, base: torch.Tensor, *, is_head: bool) -> torch.Tensor:
    """The whole table that one adapter sees: what PEFT would merge into the model."""
    table = base.clone() if change.full is None else change.full.clone()
    if change.rows is not None:
        table[change.rows.token_ids] = change.rows.rows
    if change.gain is not None:
        table *= change.gain[:, None] if is_head else change.gain
    if change.a is not None and change.b is not None:
        table += change.b.t() @ change.a if is_head else change.a @ change.b
    return table


@pytest.mark.parametrize("kind", ["full", "rows", "gain", "lora", "all"])
def test_embedding_of_each_segment_is_that_of_its_adapters_own_table(kind: str) -> None:
    base = torch.randn(VOCABULARY, WIDTH)
    token_ids = torch.arange(VOCABULARY).repeat(2)
    changes = [random_change(is_head=False, kind=kind, seed=seed) for seed in (1, 2)]
    segments = [
        TableSegment(begin, end, 0, 0, AdapterTables(embedding=change))
        for (begin, end), change in zip([(5, 45), (50, 80)], changes, strict=True)
    ]
    x = functional.embedding(token_ids, base)
    before = x.clone()

    change_embedding(x, token_ids, segments)

    for s, change in zip(segments, changes, strict=True):
        own = functional.embedding(token_ids[s.begin : s.end], table_of(change, base, is_head=False))
        torch.testing.assert_close(x[s.begin : s.end], own, rtol=1e-5, atol=1e-5)
    assert torch.equal(x[:5], before[:5])
    assert torch.equal(x[45:50], before[45:50])


@pytest.mark.parametrize("kind", ["full", "rows", "gain", "lora", "all"])
def test_logits_of_each_segment_are_those_of_its_adapters_own_head(kind: str) -> None:
    base, hidden = torch.randn(VOCABULARY, WIDTH), torch.randn(9, WIDTH)
    changes = [random_change(is_head=True, kind=kind, seed=seed) for seed in (1, 2)]
    segments = [
        TableSegment(0, 0, begin, end, AdapterTables(head=change))
        for (begin, end), change in zip([(1, 4), (6, 9)], changes, strict=True)
    ]
    logits = functional.linear(hidden, base)
    before = logits.clone()

    change_logits(logits, hidden, [*segments, TableSegment(0, 9, 9, 9, segments[0].tables)])

    for s, change in zip(segments, changes, strict=True):
        own = slice(s.logits_begin, s.logits_end)
        expected = functional.linear(hidden[own], table_of(change, base, is_head=True))
        torch.testing.assert_close(logits[own], expected, rtol=1e-4, atol=1e-4)
    untouched = [0, 4, 5]
    assert torch.equal(logits[untouched], before[untouched])


@pytest.mark.parametrize("num_decode", [0, 12])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gains_scale_the_base_output_and_nothing_of_the_lanes(num_decode: int, has_bias: bool) -> None:
    widths, num_lanes = [8, 4], 16
    a = torch.randn(num_lanes, len(widths), WIDTH)
    b = [torch.randn(num_lanes, width) for width in widths]
    lanes, elsewhere = (SiteLanes(a=a, b=b, offsets=[0, 8, 12], index=index) for index in (5, 4))
    x, product, bias = torch.randn(12, WIDTH), torch.randn(12, 12), torch.randn(12) * has_bias
    gain = torch.rand(12) + 0.5
    gains = {5: OutputGain(gain, (1 - gain) * bias if has_bias else None)}
    segments = [Segment(0, 4, 0, 8), Segment(6, 12, 8, 5)]  # the second one is DoRA

    def run(out: torch.Tensor, with_gains: bool) -> torch.Tensor:
        own = [GainSegment(6, 12, gains)] if with_gains else []
        plan = plan_lora(segments, num_decode, dtype=torch.float32, device=torch.device("cpu"), gains=own)
        assert plan is not None
        apply_lora(out, x, lanes, plan)
        return out

    said = run(product + bias, with_gains=True)

    scaled = product.clone()
    scaled[6:] *= gain
    torch.testing.assert_close(said, run(scaled + bias, with_gains=False), rtol=1e-5, atol=1e-5)
    assert torch.equal(said[:6], run(product + bias, with_gains=False)[:6])
    plan = plan_lora(
        segments,
        num_decode,
        dtype=torch.float32,
        device=torch.device("cpu"),
        gains=[GainSegment(6, 12, gains)],
    )
    assert plan is not None
    other = product + bias
    apply_lora(other, x, elsewhere, plan)
    assert torch.equal(other, run(product + bias, with_gains=False))


@pytest.mark.parametrize("rows", [1, 2048, 5000])
def test_norms_computed_in_slices_are_those_of_the_whole(rows: int) -> None:
    weight, a, b = torch.randn(rows, 24), torch.randn(RANK, 24), torch.randn(rows, RANK)

    torch.testing.assert_close(row_norms(weight, a, b), (weight + b @ a).norm(dim=1))
    torch.testing.assert_close(
        column_norms(weight, b.t(), a.t()), (weight + b @ a).norm(dim=0), rtol=1e-5, atol=1e-5
    )


def test_bytes_are_those_of_every_tensor() -> None:
    change = random_change(is_head=True, kind="all")
    gains = {3: OutputGain(torch.zeros(10), torch.zeros(10)), 4: OutputGain(torch.zeros(5), None)}
    floats = VOCABULARY * WIDTH + 3 * WIDTH + VOCABULARY + RANK * (WIDTH + VOCABULARY) + 25

    assert AdapterTables(gains, head=change).nbytes == 4 * floats + 8 * 3
    assert not AdapterTables()
    assert AdapterTables(gains)
