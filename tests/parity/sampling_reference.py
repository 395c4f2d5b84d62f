"""Sampling, one row at a time and in plain Python: what each option means, in the order it applies."""

from __future__ import annotations

import math
from collections import Counter

import torch

from loramux.engine.types import TokenSampling

NEVER = -math.inf


def processed(
    logits: torch.Tensor, prompt: list[int], output: list[int], sampling: TokenSampling
) -> torch.Tensor:
    """Logits after everything that comes before the temperature."""
    row: list[float] = logits.tolist()
    if sampling.allowed_token_ids is not None:
        row = [x if token in sampling.allowed_token_ids else NEVER for token, x in enumerate(row)]
    for word in sampling.bad_words_token_ids:
        head, last = word[:-1], word[-1]
        if len(head) <= len(output) and output[len(output) - len(head) :] == head:
            row[last] = NEVER
    if len(output) < sampling.min_tokens:
        for token in (*sampling.eos_token_ids, *sampling.stop_token_ids):
            row[token] = NEVER
    for token, bias in sampling.logit_bias.items():
        row[token] += bias
    for token in {*prompt, *output}:
        strong = row[token] > 0
        row[token] *= 1 / sampling.repetition_penalty if strong else sampling.repetition_penalty
    for token, count in Counter(output).items():
        row[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return torch.tensor(row)


def probabilities(logits: torch.Tensor, sampling: TokenSampling) -> list[float]:
    """The distribution that is drawn from: temperature, then min_p, top_k and top_p."""
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept = [token for token in order if probs[token] >= sampling.min_p * probs[order[0]]]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    whole = sum(probs[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:  # the smallest set that reaches top_p
        nucleus.append(token)
        if sum(probs[t] for t in nucleus) >= sampling.top_p * whole:
            break
    total = sum(probs[token] for token in nucleus)
    return [probs[token] / total if token in nucleus else 0.0 for token in range(len(probs))]


def assert_drawn_from(drawn: list[int], expected: list[float]) -> None:
    """Chi-square test of `drawn` tokens against their probabilities, rare tokens pooled.

    The bound is about five standard deviations above the mean; seeds are fixed, so a failure stays.
    """
    counts = Counter(drawn)
    impossible = {token for token in counts if expected[token] == 0.0}
    assert not impossible, f"tokens {impossible} were drawn with probability 0"
    cells: list[tuple[int, float]] = []  # (seen, expected), at least 5 expected in each but the last
    seen, mean = 0, 0.0
    for token in sorted(range(len(expected)), key=lambda token: -expected[token]):
        seen, mean = seen + counts[token], mean + expected[token] * len(drawn)
        if mean >= 5:
            cells.append((seen, mean))
            seen, mean = 0, 0.0
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells) + (seen - mean) ** 2 / (mean + 1)
    freedom = max(len(cells) - 1, 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5, f"chi-square {statistic}, {freedom} degrees"
