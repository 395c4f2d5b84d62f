"""What the device's sampler gives, held against the one that serves CPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loramux.engine.kernels.sampling import DRAW, FULL, GREEDY, draw_tokens, gumbel_noise, kept_tokens
from loramux.engine.layers import device_sampler
from loramux.engine.layers.device_sampler import DeviceRow, DeviceSampler, DrawTokens, needs_tokens
from loramux.engine.layers.sampler import SamplingRow, TokenMask, sample
from loramux.engine.step_buffers import StepBuffers, StepLimits
from loramux.engine.types import GrammarSpec, TokenSampling

VOCAB = 75
ROWS = 6
CPU = torch.device("cpu")


class Stepper:
    """A sampler with its step buffer."""

    def __init__(
        self,
        vocab_size: int = VOCAB,
        max_seqs: int = ROWS,
        device: torch.device = CPU,
        draw: DrawTokens = draw_tokens,
    ) -> None:
        limits = StepLimits(
            max_tokens=8, max_seqs=max_seqs, max_blocks=1, block_size=16, num_lanes=0, vocab_size=vocab_size
        )
        self.sampler = DeviceSampler(limits, device, draw)
        self.buffers = StepBuffers(device_sampler.fields(limits), device)
        self.mode = -1
        self.impossible: list[int] = []

    def __call__(
        self, logits: torch.Tensor, rows: list[DeviceRow], forbidden: dict[int, Any] | None = None
    ) -> list[int]:
        return self.launch(logits, rows, forbidden).tolist()

    def launch(
        self, logits: torch.Tensor, rows: list[DeviceRow], forbidden: dict[int, Any] | None = None
    ) -> torch.Tensor:
        """The ids on the device; waits for nothing there."""
        plan = self.sampler.fill(self.buffers.next_slot(), rows, num_rows=len(logits))
        self.buffers.upload()
        self.impossible = self.sampler.send_masks(plan, forbidden or {})
        self.mode = plan.mode
        inputs = device_sampler.view(self.buffers.device, len(logits), plan.mode)
        return self.sampler.sample(logits, inputs)


def row(name: str, tokens: list[int], num_prompt: int = 1, seed: int = 1, **fields: Any) -> DeviceRow:
    fields.setdefault("max_tokens", 99)
    s = TokenSampling(**fields)
    return DeviceRow(name, s, seed, tokens, num_prompt, len(tokens) - num_prompt)


def on_cpu(rows: list[DeviceRow]) -> list[SamplingRow]:
    return [SamplingRow(r.sampling, r.seed, list(r.token_ids), r.num_prompt) for r in rows]


def random_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(seed)) * 2


EDITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.4},
    "frequency and presence": {"frequency_penalty": 0.7, "presence_penalty": 0.3},
    "bias": {"logit_bias": {3: 5.0, 70: -100.0, 74: 4.5}},
    "allowed": {"allowed_token_ids": [1, 33, 74], "repetition_penalty": 3.0},
    "bad words": {"bad_words_token_ids": [[5], [74], [6, 7]], "logit_bias": {5: 99.0, 7: 20.0, 6: 19.0}},
    "min_tokens": {
        "min_tokens": 5,
        "eos_token_ids": [2],
        "stop_token_ids": [3],
        "logit_bias": {2: 50, 3: 40},
    },
}


def follow_the_cpu_sampler(stepper: Stepper, turns: int, device: torch.device = CPU) -> None:
    """Greedy rows of every kind get the tokens of the CPU's sampler, step by step."""
    tokens = {name: [4, 9, 9, 2, 50] for name in EDITS}
    params = {name: TokenSampling(max_tokens=99, temperature=0.0, **fields) for name, fields in EDITS.items()}
    for turn in range(turns):
        rows = [DeviceRow(n, params[n], 0, tokens[n], 4, len(tokens[n]) - 4) for n in EDITS]
        logits = random_logits(len(rows), turn)
        if turn % 3 == 1:
            rows, logits = rows[::-2], logits.flip(0)[::2]  # some wait, and the order changes

        found = stepper(logits.to(device), rows)

        assert found == sample(logits, on_cpu(rows)).token_ids
        for one, token in zip(rows, found, strict=True):
            tokens[one.request_id] = [*tokens[one.request_id], token]


def test_greedy_rows_get_the_tokens_of_the_cpu_sampler_step_by_step() -> None:
    follow_the_cpu_sampler(Stepper(max_seqs=len(EDITS)), 12)


def test_a_request_that_lost_its_slot_is_counted_again() -> None:
    stepper = Stepper(max_seqs=2)
    fields: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 2.0, "presence_penalty": 1.0}
    logits = random_logits(1).expand(2, -1)
    tokens = {name: [1, 2] for name in "abcd"}
    params = {name: TokenSampling(max_tokens=99, **fields) for name in "abcd"}
    for pair in ("ab", "cd", "ac", "ab", "db", "ca"):
        rows = [DeviceRow(n, params[n], 0, tokens[n], 1, len(tokens[n]) - 1) for n in pair]
        found = stepper(logits, rows)
        assert found == sample(logits, on_cpu(rows)).token_ids
        for name, token in zip(pair, found, strict=True):
            tokens[name] = [*tokens[name], token]


def test_an_id_that_comes_back_is_another_request() -> None:
    stepper = Stepper()
    logits = random_logits(1)
    best = int(logits.argmax())

    assert stepper(logits, [row("a", [1], temperature=0.0)]) == [best]
    assert stepper(logits, [row("a", [1], temperature=0.0, bad_words_token_ids=[[best]])]) != [best]


def test_a_grammar_and_the_request_forbid_together() -> None:
    stepper = Stepper()
    grammar = GrammarSpec("regex", "a")
    rows = [
        row("a", [1], temperature=0.0, grammar=grammar),
        row("b", [1], temperature=0.0),
        row("c", [1], temperature=0.0, grammar=grammar, bad_words_token_ids=[[8]]),
        row("d", [1], temperature=0.0, grammar=grammar, allowed_token_ids=[3]),
    ]
    forbidden = np.ones((3, VOCAB), dtype=np.bool_)
    forbidden[:, [8, 9, VOCAB - 1]] = False
    logits = random_logits(4)
    mask = TokenMask([0, 2, 3], torch.from_numpy(forbidden))

    found = stepper(logits, rows, dict(zip(mask.rows, forbidden, strict=True)))

    assert found[:3] == sample(logits, on_cpu(rows), mask).token_ids[:3]
    assert stepper.impossible == [3]
    assert needs_tokens(rows[0].sampling)
    assert not needs_tokens(rows[1].sampling)


def test_steps_say_what_they_need() -> None:
    stepper = Stepper()
    logits = random_logits(3)
    greedy, drawn = row("g", [1], temperature=0.0, top_p=0.5), row("d", [1])

    modes = []
    for rows in (
        [greedy],
        [greedy, drawn],
        [drawn, row("f", [1], top_k=3)],
        [row("m", [1], min_tokens=1, eos_token_ids=[2])],
    ):
        stepper(logits, rows)
        modes.append(stepper.mode)

    assert modes == [GREEDY, DRAW, FULL, FULL]


def test_warming_up_changes_nothing() -> None:
    stepper = Stepper()
    logits = random_logits(1)
    one = row("a", [1, 2], temperature=0.0, presence_penalty=1.0)
    first = stepper(logits, [one])
    counts = stepper.sampler.tables.counts.clone()

    stepper.sampler.warm_up(logits)

    assert torch.equal(stepper.sampler.tables.counts, counts)
    assert first == [int(logits.argmax())]


def test_seeds_do_not_depend_on_the_batch() -> None:
    logits = random_logits(1).expand(4, -1)
    mine = row("mine", [1, 2, 3], seed=2**63 + 7, temperature=1.1, top_p=0.9)
    others = [row(str(i), [1] * (i + 1), seed=i) for i in range(3)]

    alone = Stepper()(logits[:1], [mine])[0]

    assert Stepper()(logits, [*others, mine])[3] == alone
    again = Stepper()(logits, [mine, *others])
    assert again[0] == alone
    assert len({*again}) > 1


def draws(logits: torch.Tensor, num: int, **fields: Any) -> torch.Tensor:
    """How often each token is drawn over seeds and positions; [vocab_size]."""
    side = 50
    stepper = Stepper(logits.shape[0], max_seqs=side)
    sampling = TokenSampling(max_tokens=99, **fields)
    found: list[int] = []
    for position in range(num // side):
        rows = [DeviceRow(str(seed), sampling, seed, [0], 1, position) for seed in range(side)]
        found += stepper(logits.expand(side, -1), rows)
    return torch.bincount(torch.tensor(found), minlength=logits.shape[0]).double()


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = random_logits(1, vocab_size=40)[0]
    num = 10_000
    expected = torch.softmax(logits.double() / temperature, dim=-1) * num

    observed = draws(logits, num, temperature=temperature)

    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    chi_square = float(((observed - expected) ** 2 / expected.clamp(min=1)).sum())
    assert chi_square < 90  # at most 40 degrees of freedom: p < 1e-5


def test_noise_is_gumbel_and_tokens_rows_and_positions_are_independent() -> None:
    ints = torch.zeros((64, 8), dtype=torch.int32)
    ints[:, 4] = torch.arange(64) // 8  # seeds
    ints[:, 6] = torch.arange(64) % 8  # positions
    noise = gumbel_noise(ints, 4096).double()

    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 0.02
    uniform = torch.exp(-torch.exp(-noise))
    bins = torch.histc(uniform, bins=64, min=0, max=1)
    assert float(((bins - 4096) ** 2 / 4096).sum()) < 130  # 63 degrees of freedom: p < 1e-6
    correlation = torch.corrcoef(uniform) - torch.eye(64)
    assert float(correlation.abs().max()) < 5.5 / 64  # of 64 rows of 4096: standard deviation 1 / 64
    shifted = torch.corrcoef(torch.stack((uniform[:, :-1].flatten(), uniform[:, 1:].flatten())))
    assert abs(float(shifted[0, 1])) < 0.01


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.5}, {"top_p": 0.8, "min_p": 0.1}],
    ids=str,
)
def test_filters_leave_what_the_cpu_sampler_leaves(fields: dict[str, Any]) -> None:
    logits = random_logits(1, seed=3, vocab_size=40)[0] / 2
    rows = [SamplingRow(TokenSampling(max_tokens=9, **fields), seed, [0], 1) for seed in range(4000)]
    allowed = set(sample(logits.expand(4000, -1), rows).token_ids)
    filters = [
        torch.tensor([[fields.get(name, off)]])
        for name, off in (("top_k", 40), ("top_p", 1.0), ("min_p", 0.0))
    ]

    kept = kept_tokens(logits[None], *filters)[0]

    assert set(kept.nonzero()[:, 0].tolist()) == allowed
    assert set(draws(logits, 3000, **fields).nonzero()[:, 0].tolist()) == allowed
