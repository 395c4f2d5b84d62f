"""From logits to tokens, vectorised over the batch; a row pays only for what it asks.

Order of processing, as users of such servers know it: allowed_token_ids, bad_words, min_tokens and
logit_bias; repetition, presence and frequency penalties; the grammar's mask; temperature; min_p; top_k;
top_p; draw.
Log-probabilities are taken from the raw logits, before any of it.

A draw uses one uniform number a row, hashed from the request's seed and the index of the token to
come, so a seeded request gives the same tokens alone, in any batch and after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.engine.kernels.cpu.best import best_tokens
from loramux.engine.kernels.cpu.dtypes import TAGS, takes
from loramux.engine.types import TokenLogprobs, TokenSampling

NEG_INF = float("-inf")
CANDIDATES = 512  # top-k/top-p look at this many best tokens first; more only where it is not enough
MIN_TEMPERATURE = 1e-5  # below it a row is greedy
_LOGPROB_ROWS = 256  # rows of log-softmax at once: bounds memory for long prompts


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs to know of one sequence in one step."""

    sampling: TokenSampling
    seed: int  # 64 bits
    token_ids: list[int]  # prompt and output so far; not kept
    num_prompt: int
    num_pending: int = 0  # output tokens that only the device knows; nothing may be asked of them

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt + self.num_pending

    @property
    def is_greedy(self) -> bool:
        """True if the best token is taken."""
        return self.sampling.temperature < MIN_TEMPERATURE


@dataclass(frozen=True, slots=True)
class TokenMask:
    """What the grammars of some rows forbid."""

    rows: list[int]  # which
    forbidden: Tensor  # [len(rows), vocab_size] bool, on the device of the logits


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token a row, and log-probabilities for the rows that asked."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    impossible: list[int] = field(default_factory=list)  # rows that nothing is left of: no token is right


def sample(logits: Tensor, rows: list[SamplingRow], mask: TokenMask | None = None) -> SamplerOutput:
    """Choose the next token of every row.

    Args:
        logits: [num_rows, vocab_size], any float dtype; not changed
        mask: of the rows that have a grammar
    """
    processed = process_logits(logits, rows, mask)
    token_ids = _best(processed)
    drawing = [i for i, row in enumerate(rows) if not row.is_greedy]
    if drawing:
        token_ids[drawing] = _draw(processed[drawing].float(), [rows[i] for i in drawing])
    ids = token_ids.tolist()
    return SamplerOutput(ids, requested_logprobs(logits, ids, rows), _impossible(processed, rows, mask))


def process_logits(raw: Tensor, rows: list[SamplingRow], mask: TokenMask | None = None) -> Tensor:
    """Apply everything that comes before the temperature, in float32. `raw` itself if no row asks for any."""
    changed = [i for i, row in enumerate(rows) if _is_changed(row)]
    if not changed and mask is None:
        return raw
    logits = raw.to(torch.float32, copy=True)
    for i in changed:
        _edit(logits[i], rows[i])
    penalised = [i for i in changed if has_penalties(rows[i].sampling)]
    if penalised:
        logits[penalised] = _penalise(logits[penalised], [rows[i] for i in penalised])
    if mask is not None and len(mask.rows) == len(rows):
        logits.masked_fill_(mask.forbidden, NEG_INF)
    elif mask is not None:
        logits[mask.rows] = logits[mask.rows].masked_fill_(mask.forbidden, NEG_INF)
    return logits


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability of one token a row and of the `num_top` best.

    Args:
        logits: [num_rows, vocab_size] float, raw
        token_ids: one a row
    """
    out: list[TokenLogprobs] = []
    for begin in range(0, len(token_ids), _LOGPROB_ROWS):
        part = logits[begin : begin + _LOGPROB_ROWS].float()
        ids = torch.tensor(token_ids[begin : begin + _LOGPROB_ROWS], device=part.device)
        logprobs = torch.log_softmax(part, dim=-1)
        chosen = logprobs.gather(1, ids[:, None])
        ranks = (logprobs > chosen).sum(dim=-1).add_(1).tolist()
        top, top_ids = logprobs.topk(num_top, dim=-1)
        all_ids = torch.cat((ids[:, None], top_ids), dim=1).tolist()
        values = torch.cat((chosen, top), dim=1).tolist()
        out += [TokenLogprobs(*row) for row in zip(all_ids, values, ranks, strict=True)]
    return out


def uniforms(seeds: list[int], steps: list[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) a row, a hash of (seed, step).

    Source: the splitmix64 finaliser, Steele et al. 2014, applied twice.
    """
    mix = np.array(seeds, dtype=np.uint64)
    for value in (np.zeros(len(seeds), dtype=np.uint64), np.array(steps, dtype=np.uint64)):
        mix = mix + value + np.uint64(0x9E3779B97F4A7C15)
        mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mix = mix ^ (mix >> np.uint64(31))
    return (mix >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _best(logits: Tensor) -> Tensor:
    """The first of the best tokens of every row; [num_rows] int64."""
    num_rows, width = logits.shape
    if takes(logits, width) and logits.is_contiguous():
        best = np.empty(num_rows, dtype=np.int64)
        best_tokens(TAGS[logits.dtype], logits.data_ptr(), width, best)
        return torch.from_numpy(best)
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))  # a seventh of the time of torch's
    return logits.argmax(dim=-1)


def _impossible(processed: Tensor, rows: list[SamplingRow], mask: TokenMask | None) -> list[int]:
    """Rows whose grammar forbids every token that the request's other fields leave."""
    if mask is None:
        return []
    doubtful = [i for i in mask.rows if _forbids(rows[i])]
    if not doubtful:
        return []
    none_left = torch.isneginf(processed[doubtful].amax(dim=-1)).tolist()
    return [i for i, is_none in zip(doubtful, none_left, strict=True) if is_none]


def _forbids(row: SamplingRow) -> bool:
    """True if fields of the request forbid tokens."""
    s = row.sampling
    return bool(s.allowed_token_ids or s.bad_words_token_ids or row.num_output < s.min_tokens)


def has_penalties(s: TokenSampling) -> bool:
    """True if tokens that have occurred are treated differently."""
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


def _is_changed(row: SamplingRow) -> bool:
    s = row.sampling
    return bool(
        s.logit_bias
        or s.allowed_token_ids
        or s.bad_words_token_ids
        or row.num_output < s.min_tokens
        or has_penalties(s)
    )


def _edit(logits: Tensor, row: SamplingRow) -> None:
    """Forbid and bias tokens of one row, in place."""
    s = row.sampling
    if s.allowed_token_ids:
        allowed = logits[s.allowed_token_ids]
        logits.fill_(NEG_INF)
        logits[s.allowed_token_ids] = allowed
    banned: list[int] = []
    for *head, last in s.bad_words_token_ids:
        tail = row.token_ids[len(row.token_ids) - len(head) :] if len(head) <= row.num_output else None
        if tail == head:
            banned.append(last)
    if row.num_output < s.min_tokens:
        banned += s.eos_token_ids + s.stop_token_ids
    if banned:
        logits[banned] = NEG_INF
    if s.logit_bias:
        ids = torch.tensor(list(s.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(s.logit_bias.values()), device=logits.device)


def _penalise(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Repetition (prompt and output), then frequency and presence (output only)."""
    num_rows, vocab_size = logits.shape
    seen = torch.zeros((num_rows, vocab_size), dtype=torch.bool, device=logits.device)
    counts = torch.zeros((num_rows, vocab_size), device=logits.device)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.token_ids, device=logits.device)
        seen[i, ids] = True
        output = ids[row.num_prompt :]
        counts[i].index_add_(0, output, torch.ones(len(output), device=logits.device))

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    repetition = column([row.sampling.repetition_penalty for row in rows])
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, penalised, logits)
    logits = logits - counts * column([row.sampling.frequency_penalty for row in rows])
    return logits - (counts > 0) * column([row.sampling.presence_penalty for row in rows])


def _draw(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Sample every row from its filtered distribution; [num_rows] int64."""
    temperature = torch.tensor([row.sampling.temperature for row in rows], device=logits.device)
    scaled = logits / temperature[:, None]
    steps = [row.num_output for row in rows]
    u = torch.from_numpy(uniforms([row.seed for row in rows], steps)).to(logits.device)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    plain = [i for i, row in enumerate(rows) if not has_filters(row.sampling, logits.shape[1])]
    filtered = [i for i in range(len(rows)) if i not in set(plain)]
    if plain:
        tokens[plain] = _pick(torch.softmax(scaled[plain], dim=-1), u[plain])
    if filtered:
        tokens[filtered] = _draw_filtered(scaled[filtered], [rows[i].sampling for i in filtered], u[filtered])
    return tokens


def has_filters(s: TokenSampling, vocab_size: int) -> bool:
    """True if a draw is among the best tokens only."""
    return 0 < s.top_k < vocab_size or s.top_p < 1.0 or s.min_p > 0.0


def _draw_filtered(scaled: Tensor, params: list[TokenSampling], u: Tensor) -> Tensor:
    """min_p, top_k and top_p over tokens sorted best first, then one draw."""
    vocab_size = scaled.shape[1]
    device = scaled.device
    top_k = torch.tensor([s.top_k if s.top_k > 0 else vocab_size for s in params], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in params], device=device)[:, None]
    min_p = torch.tensor([s.min_p for s in params], device=device)[:, None]
    log_total = torch.logsumexp(scaled, dim=-1, keepdim=True)
    only_top_p = ((top_k >= vocab_size) & (min_p == 0.0))[:, 0]  # nothing else cuts: the total is 1

    def filtered(num_candidates: int) -> tuple[Tensor, Tensor, bool]:
        best, ids = scaled.topk(num_candidates, dim=-1)
        probs = (best - log_total).exp()
        order = torch.arange(num_candidates, device=device)
        keep = (order < top_k) & (probs >= min_p * probs[:, :1])
        # top_p works on what top_k and min_p left over, renormalised
        mass = keep.sum(-1) == num_candidates  # the cut may lie beyond the candidates
        probs = probs * keep
        total = torch.where(mass[:, None], torch.ones_like(top_p), probs.sum(-1, keepdim=True))
        before = probs.cumsum(-1) - probs
        inside = before < top_p * total
        inside[:, 0] = True
        complete = ~mass | (only_top_p & ~inside[:, -1])
        return ids, probs * inside, bool(complete.all())

    ids, probs, complete = filtered(min(CANDIDATES, vocab_size))
    if not complete and vocab_size > CANDIDATES:
        ids, probs, _ = filtered(vocab_size)
    return ids.gather(1, _pick(probs, u)[:, None])[:, 0]


def _pick(weights: Tensor, u: Tensor) -> Tensor:
    """Index by inverse transform: the first whose running total exceeds u times the whole.

    Args:
        weights: [num_rows, n], non-negative, need not sum to one
        u: [num_rows] float64 in [0, 1)
    """
    running = weights.double().cumsum(dim=-1)
    target = u[:, None] * running[:, -1:]
    return torch.searchsorted(running, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


def requested_logprobs(
    raw: Tensor, token_ids: list[int], rows: list[SamplingRow]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the rows that ask for them.

    Args:
        raw: [num_rows, vocab_size] logits, not processed
        token_ids: what was chosen in each row
    """
    out: list[TokenLogprobs | None] = [None] * len(rows)
    wanting = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if wanting:
        num_top = max(rows[i].sampling.logprobs or 0 for i in wanting)
        found = token_logprobs(raw[wanting], [token_ids[i] for i in wanting], num_top)
        for i, full in zip(wanting, found, strict=True):
            keep = 1 + (rows[i].sampling.logprobs or 0)
            entry = TokenLogprobs(full.token_ids[:keep], full.logprobs[:keep], full.rank)
            named = rows[i].sampling.logprob_token_ids
            out[i] = _with_named(entry, raw[i], named) if named else entry
    return out


def _with_named(found: TokenLogprobs, raw: Tensor, token_ids: list[int]) -> TokenLogprobs:
    """The same with the tokens that the request names, but for those that are among the best anyway.

    Args:
        found: the chosen token and the best.
        raw: [vocab_size] the row's logits.
        token_ids: what the request names.
    """
    best = set(found.token_ids[1:])
    named = [token_id for token_id in token_ids if token_id not in best]
    values = torch.log_softmax(raw.float(), dim=-1)[named].tolist()
    return TokenLogprobs([*found.token_ids, *named], [*found.logprobs, *values], found.rank)
