from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from loramux.engine.layers.sampler import (
    SamplingRow,
    TokenMask,
    process_logits,
    sample,
    token_logprobs,
    uniforms,
)
from loramux.engine.types import TokenSampling

VOCAB = 40


def row(seed: int = 1, tokens: list[int] | None = None, num_prompt: int = 1, **fields: Any) -> SamplingRow:
    fields.setdefault("max_tokens", 10)
    return SamplingRow(TokenSampling(**fields), seed, tokens or [0], num_prompt)


def draws(logits: torch.Tensor, num: int = 4000, **fields: Any) -> Counter[int]:
    rows = [row(seed, **fields) for seed in range(num)]
    return Counter(sample(logits.expand(num, -1), rows).token_ids)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2


def test_greedy_and_drawing_rows_mix_in_one_batch(logits: torch.Tensor) -> None:
    rows = [row(temperature=0.0), row(7, temperature=1.0), row(temperature=0.0)]

    out = sample(logits.expand(3, -1), rows).token_ids

    assert out[0] == out[2] == int(logits.argmax())
    assert out[1] == sample(logits[None], [rows[1]]).token_ids[0]  # the batch does not matter


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [float("-inf")] * 3, [2.0, 1.0, 2.0]])

    assert sample(logits.bfloat16(), [row(temperature=0.0)] * 3).token_ids == [1, 0, 0]


def test_logits_in_bfloat16_give_what_they_give_in_float32() -> None:
    logits = torch.randn(6, 4096, generator=torch.Generator().manual_seed(3)).bfloat16()
    rows = [
        row(temperature=0.0),
        row(4, temperature=0.7, top_p=0.9),
        row(temperature=0.0, logit_bias={7: 50.0}),
        row(temperature=0.0, logprobs=3, logprob_token_ids=[5]),
        row(5, temperature=1.0, repetition_penalty=1.5, tokens=[0, 1, 2]),
        row(temperature=0.0, allowed_token_ids=[9, 90]),
    ]
    forbidden = torch.zeros(1, 4096, dtype=torch.bool)
    forbidden[0, logits[0].argmax()] = True

    for chosen, mask in ((rows, None), ([rows[0]] * 6, None), (rows, TokenMask([0], forbidden))):
        assert sample(logits, chosen, mask) == sample(logits.float(), chosen, mask)


def test_named_tokens_stand_behind_the_best_and_none_stands_twice(logits: torch.Tensor) -> None:
    best = logits.topk(2).indices.tolist()
    worst = int(logits.argmin())
    rows = [row(temperature=0.0, logprobs=2, logprob_token_ids=[worst, best[1]]), row(temperature=0.0)]

    found = sample(logits.expand(2, -1), rows).logprobs

    assert found[0] is not None
    assert found[0].token_ids == [best[0], *best, worst]
    expected = torch.log_softmax(logits, dim=-1)[found[0].token_ids]
    torch.testing.assert_close(torch.tensor(found[0].logprobs), expected)
    assert found[1] is None


def test_draws_follow_the_distribution(logits: torch.Tensor) -> None:
    counts = draws(logits, temperature=0.7)
    expected = torch.softmax(logits / 0.7, dim=-1) * 4000

    observed = torch.tensor([counts[i] for i in range(VOCAB)], dtype=torch.float64)
    chi_square = float(((observed - expected) ** 2 / expected.clamp(min=1)).sum())

    assert chi_square < 90  # 39 degrees of freedom: p < 1e-5


@pytest.mark.parametrize(
    ("fields", "support"),
    [
        ({"top_k": 3}, lambda p: p.topk(3).indices),
        ({"top_p": 0.6}, lambda p: _nucleus(p, 0.6)),
        ({"min_p": 0.3}, lambda p: (p >= 0.3 * p.max()).nonzero()[:, 0]),
        ({"top_k": 5, "top_p": 0.5}, lambda p: _nucleus(_top(p, 5), 0.5)),
        ({"allowed_token_ids": [3, 9]}, lambda p: torch.tensor([3, 9])),
        ({"logit_bias": {5: 100.0}}, lambda p: torch.tensor([5])),
        ({"top_k": VOCAB, "top_p": 0.0001}, lambda p: p.topk(1).indices),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_filters_leave_exactly_their_support(
    logits: torch.Tensor, fields: dict[str, Any], support: Any
) -> None:
    allowed = set(support(torch.softmax(logits, dim=-1)).tolist())

    assert set(draws(logits, **fields)) == allowed


def _nucleus(p: torch.Tensor, mass: float) -> torch.Tensor:
    probs, ids = (p / p.sum()).sort(descending=True)
    return ids[(probs.cumsum(0) - probs) < mass]


def _top(p: torch.Tensor, k: int) -> torch.Tensor:
    out = torch.zeros_like(p)
    ids = p.topk(k).indices
    out[ids] = p[ids]
    return out


def test_nucleus_wider_than_the_candidates_is_found() -> None:
    flat = torch.zeros(3000)

    counts = draws(flat, num=6000, top_p=0.9)

    assert 2300 < len(counts) <= 2700


def test_penalties_count_prompt_and_output_as_they_should() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 3.0]])
    tokens = [0, 1, 3, 3]  # prompt 0 1, output 3 3

    repeated = process_logits(logits, [row(tokens=tokens, num_prompt=2, repetition_penalty=2.0)])
    present = process_logits(logits, [row(tokens=tokens, num_prompt=2, presence_penalty=0.5)])
    frequent = process_logits(logits, [row(tokens=tokens, num_prompt=2, frequency_penalty=0.5)])

    assert repeated.tolist() == [[1.0, -4.0, 1.0, 1.5]]
    assert present.tolist() == [[2.0, -2.0, 1.0, 2.5]]
    assert frequent.tolist() == [[2.0, -2.0, 1.0, 2.0]]


def test_min_tokens_forbids_every_stop() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    early = row(tokens=[2], min_tokens=2, eos_token_ids=[0], stop_token_ids=[1], temperature=0.0)
    late = row(tokens=[2, 2, 2], min_tokens=2, eos_token_ids=[0], temperature=0.0)

    assert sample(logits.expand(2, -1), [early, late]).token_ids == [2, 0]


def test_bad_words_forbid_only_the_completing_token() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    words = [[2, 0]]

    inside = row(tokens=[1, 2], num_prompt=1, bad_words_token_ids=words, temperature=0.0)
    outside = row(tokens=[1, 1], num_prompt=1, bad_words_token_ids=words, temperature=0.0)
    single = row(tokens=[1], bad_words_token_ids=[[0]], temperature=0.0)

    assert sample(logits.expand(3, -1), [inside, outside, single]).token_ids == [1, 0, 1]


def test_input_logits_are_not_changed(logits: torch.Tensor) -> None:
    before = logits.clone()

    sample(logits[None], [row(logit_bias={1: 5.0}, presence_penalty=1.0, tokens=[0, 1])])

    assert torch.equal(logits, before)


def test_logprobs_are_of_the_raw_logits_and_ranks_are_right(logits: torch.Tensor) -> None:
    forced = row(logit_bias={7: 100.0}, temperature=0.0, logprobs=2)

    (found,) = sample(logits[None], [forced]).logprobs

    assert found is not None
    reference = torch.log_softmax(logits, dim=-1)
    assert found.token_ids == [7, *logits.topk(2).indices.tolist()]
    assert found.logprobs == pytest.approx([float(reference[i]) for i in found.token_ids])
    assert found.rank == int((logits > logits[7]).sum()) + 1


def test_logprobs_of_many_rows_keep_their_order() -> None:
    logits = torch.randn(600, VOCAB)
    targets = torch.randint(VOCAB, (600,)).tolist()

    found = token_logprobs(logits, targets, 0)

    assert [f.token_ids for f in found] == [[t] for t in targets]
    assert found[599].logprobs[0] == pytest.approx(
        float(torch.log_softmax(logits[599], 0)[targets[599]]), abs=1e-5
    )


def test_uniforms_are_spread_and_depend_on_seed_and_step() -> None:
    values = uniforms(list(range(1000)) * 2, [0] * 1000 + [1] * 1000)

    assert len(set(values.tolist())) == 2000
    assert 0.48 < values.mean() < 0.52
    assert ((values >= 0) & (values < 1)).all()


def only(*tokens: int) -> torch.Tensor:
    """A mask that forbids every other token."""
    forbidden = torch.ones(VOCAB, dtype=torch.bool)
    forbidden[list(tokens)] = False
    return forbidden


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.9}])
def test_a_mask_holds_for_its_rows_and_no_others(logits: torch.Tensor, fields: dict[str, Any]) -> None:
    rows = [row(seed, **fields) for seed in range(6)]
    free = sample(logits.expand(6, -1), rows)
    mask = TokenMask([1, 4], torch.stack([only(3), only(5, 6)]))

    held = sample(logits.expand(6, -1), rows, mask)

    assert held.token_ids[1] == 3
    assert held.token_ids[4] in (5, 6)
    assert [held.token_ids[i] for i in (0, 2, 3, 5)] == [free.token_ids[i] for i in (0, 2, 3, 5)]
    assert held.impossible == []


def test_a_mask_of_all_rows_leaves_the_logits_that_were_given(logits: torch.Tensor) -> None:
    given = logits.expand(2, -1).clone()
    rows = [
        row(temperature=0.0, logprobs=1, logit_bias={7: 100.0}),
        row(temperature=0.0, repetition_penalty=2.0),
    ]

    out = sample(given, rows, TokenMask([0, 1], torch.stack([only(3), only(4)])))

    assert out.token_ids == [3, 4]
    assert torch.equal(given, logits.expand(2, -1))
    assert out.logprobs[0] is not None
    assert out.logprobs[0].token_ids == [3, int(logits.argmax())]


@pytest.mark.parametrize(
    "fields",
    [{"allowed_token_ids": [1, 2]}, {"bad_words_token_ids": [[3]]}, {"min_tokens": 5, "eos_token_ids": [3]}],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_nothing_is_left_of_is_named(
    logits: torch.Tensor, fields: dict[str, Any], temperature: float
) -> None:
    rows = [row(temperature=temperature), row(temperature=temperature, **fields)]
    mask = TokenMask([0, 1], torch.stack([only(3), only(3)]))

    out = sample(logits.expand(2, -1), rows, mask)

    assert out.impossible == [1]
    assert out.token_ids[0] == 3
