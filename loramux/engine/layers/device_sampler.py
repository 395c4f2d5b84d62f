"""Sampling without leaving the device: what the host prepares of it.

A request's parameters are translated once, when a step first names it, and kept in one of
`max_seqs` slots; a step gathers its rows' slots. Slots need no release: a new request takes that of
one that is not in its step, longest unused first. Counts and biases of requests that ask lie on the
device under the same slot. What forbids tokens (allowed_token_ids, bad words, min_tokens, a grammar)
becomes one bit mask a row.

The ids are `kernels/sampling.py`'s; a GPU takes those of `kernels/gpu/sampling.py`, which are the same.
Seeds give other tokens than `layers/sampler.py`, which draws on CPUs. Log-probabilities are taken from
the raw logits and the ids afterwards (`requested_logprobs` there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.engine.kernels import sampling as kernel
from loramux.engine.kernels.sampling import SamplerInput, SamplerTables, draw_tokens
from loramux.engine.layers.sampler import MIN_TEMPERATURE, has_filters, has_penalties
from loramux.engine.step_buffers import NUM_SLOTS, DeviceFields, Fields, HostFields, StepLimits
from loramux.engine.types import TokenSampling

INTS: Final = "sampling_ints"
FLOATS: Final = "sampling_floats"

_Words = npt.NDArray[np.uint32]


class DrawTokens(Protocol):
    """`kernels.sampling.draw_tokens`, or a kernel that does the same."""

    def __call__(self, logits: Tensor, inputs: SamplerInput, tables: SamplerTables, out: Tensor) -> None:
        """Write a token id for every row into `out`."""


class DeviceRow(NamedTuple):
    """A sequence that gets a token in this step."""

    request_id: str
    sampling: TokenSampling
    seed: int  # 64 bits
    token_ids: Sequence[int]  # prompt and output, as far as the host knows it
    num_prompt: int
    num_output: int  # tokens generated before this one, those counted that the host has not seen


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What a step's rows ask for."""

    mode: int  # GREEDY, DRAW or FULL
    mask_rows: dict[int, int]  # row -> row of the masks, of the rows that have one
    bans: dict[int, _Words | None]  # row -> what the request allows beside its grammar; None = everything


@dataclass(slots=True)
class _Known:
    """A request in its slot."""

    sampling: TokenSampling
    slot: int
    allowed: _Words | None  # what never changes of its mask


def fields(limits: StepLimits) -> Fields:
    """The sampler's fields of the step buffer."""
    return {
        INTS: ((limits.max_seqs, kernel.INT_COLUMNS), np.int32),
        FLOATS: ((limits.max_seqs, kernel.FLOAT_COLUMNS), np.float32),
    }


def view(device: DeviceFields, num_rows: int, mode: int) -> SamplerInput:
    """The first rows of the fields on the device."""
    return SamplerInput(device[INTS][:num_rows], device[FLOATS][:num_rows], mode)


def needs_tokens(sampling: TokenSampling) -> bool:
    """True if a row can be prepared only once the host knows all tokens before it."""
    return sampling.grammar is not None or any(len(word) > 1 for word in sampling.bad_words_token_ids)


class DeviceSampler:
    """Tables on the device, and the rows of each step."""

    def __init__(self, limits: StepLimits, device: torch.device, draw: DrawTokens = draw_tokens) -> None:
        """Allocate the tables: 8 bytes a token of the vocabulary for each sequence of a step, and masks.

        Args:
            draw: what chooses the tokens.
        """
        rows, vocab_size = limits.max_seqs, limits.vocab_size
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._device = device
        self._draw = draw
        self.tables = SamplerTables(
            torch.zeros((rows, vocab_size), dtype=torch.int32, device=device),
            torch.zeros((rows, vocab_size), dtype=torch.float32, device=device),
            torch.zeros((rows, self._num_words), dtype=torch.int32, device=device),
        )
        self._out = torch.zeros(rows, dtype=torch.int32, device=device)
        self._ints = np.zeros((rows, kernel.INT_COLUMNS), dtype=np.int32)  # by slot
        self._floats = np.zeros((rows, kernel.FLOAT_COLUMNS), dtype=np.float32)
        self._known: dict[str, _Known] = {}  # longest unused first
        self._free = list(range(rows - 1, -1, -1))
        is_cuda = device.type == "cuda"
        self._bits = [
            torch.zeros((rows, self._num_words), dtype=torch.int32, pin_memory=is_cuda)
            for _ in range(NUM_SLOTS)
        ]
        self._sent = [torch.cuda.Event() if is_cuda else None for _ in range(NUM_SLOTS)]  # type: ignore[no-untyped-call]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.tables.nbytes + self._out.nbytes

    def fill(self, host: HostFields, rows: Sequence[DeviceRow], num_rows: int | None = None) -> SamplingPlan:
        """Write the fields of a step whose rows of logits belong to these sequences.

        What new requests need on the device is sent in order with what the current stream computes.

        Args:
            num_rows: of the step with its padding; default as many as there are sequences
        """
        ints, floats = host[INTS], host[FLOATS]
        count = len(rows)
        slots = self._slots(rows)
        ints[:count] = self._ints[slots]
        floats[:count] = self._floats[slots]
        ints[count : num_rows or count] = 0
        ints[:count, kernel.POSITION] = [row.num_output for row in rows]
        bans = {}
        for index in np.flatnonzero(ints[:count, kernel.FLAGS] & kernel.MASKED).tolist():
            row = rows[index]
            allowed = self._allowed(row)
            if allowed is not None or row.sampling.grammar is not None:
                bans[index] = allowed
            else:
                ints[index, kernel.FLAGS] &= ~kernel.MASKED
        mask_rows = {index: place for place, index in enumerate(bans)}
        ints[list(mask_rows), kernel.MASK_ROW] = list(mask_rows.values())
        return SamplingPlan(_mode(ints[:count, kernel.FLAGS]), mask_rows, bans)

    def send_masks(self, plan: SamplingPlan, forbidden: dict[int, npt.NDArray[np.bool_]]) -> list[int]:
        """Send the masks of a step to the device, before its tokens are drawn.

        Args:
            forbidden: [vocab_size], by row, what the grammars forbid.

        Returns:
            Rows with a grammar of which no token is left: what is drawn there means nothing.
        """
        if not plan.bans:
            return []
        self._turn = (self._turn + 1) % NUM_SLOTS
        sent, bits = self._sent[self._turn], self._bits[self._turn]
        if sent is not None:
            sent.synchronize()  # of the step before the last
        words = bits.numpy().view(np.uint32)
        impossible = []
        for index, allowed in plan.bans.items():
            target = words[plan.mask_rows[index]]
            grammar = forbidden.get(index)
            if grammar is None:
                target[:] = self._everything() if allowed is None else allowed
                continue
            target[:] = _packed(~grammar, self._num_words)
            if allowed is not None:
                target &= allowed
                if not target.any():
                    impossible.append(index)
        used = len(plan.bans)
        self.tables.masks[:used].copy_(bits[:used], non_blocking=True)
        if sent is not None:
            sent.record()
        return impossible

    def sample(self, logits: Tensor, inputs: SamplerInput) -> Tensor:
        """Draw a token for every row; neither allocates nor waits, but in plain torch.

        Args:
            logits: [num_rows, vocab_size], any float dtype; not changed

        Returns:
            [num_rows] int32, overwritten by the next call.
        """
        out = self._out[: logits.shape[0]]
        self._draw(logits, inputs, self.tables, out)
        return out

    def warm_up(self, logits: Tensor) -> None:
        """Compile whatever a step may ask for, so that no request waits for it.

        Args:
            logits: [1, vocab_size], as those of steps
        """
        ints = torch.zeros((1, kernel.INT_COLUMNS), dtype=torch.int32, device=self._device)
        floats = torch.zeros((1, kernel.FLOAT_COLUMNS), dtype=torch.float32, device=self._device)
        for mode in (kernel.GREEDY, kernel.DRAW, kernel.FULL):
            self.sample(logits, SamplerInput(ints, floats, mode))

    def _slots(self, rows: Sequence[DeviceRow]) -> list[int]:
        """The slot of each row; those of new requests are filled."""
        slots = []
        fresh = []
        for row in rows:
            known = self._known.pop(row.request_id, None)
            if known is not None and known.sampling is not row.sampling:
                self._free.append(known.slot)  # an id that came back
                known = None
            if known is None:
                fresh.append(row)
                continue
            self._known[row.request_id] = known
            slots.append(known.slot)
        if not fresh:
            return slots
        for row in fresh:
            self._known[row.request_id] = self._admit(row)
        return [self._known[row.request_id].slot for row in rows]

    def _admit(self, row: DeviceRow) -> _Known:
        """Give a request a slot and write there what does not change."""
        if not self._free:
            oldest = next(iter(self._known))  # not of this step: its rows have moved to the end
            self._free.append(self._known.pop(oldest).slot)
        slot = self._free.pop()
        s = row.sampling
        flags = kernel.ACTIVE
        if s.temperature >= MIN_TEMPERATURE:
            flags |= kernel.DRAWN | (kernel.FILTERED if has_filters(s, self._vocab_size) else 0)
        flags |= kernel.PENALISED if has_penalties(s) else 0
        flags |= kernel.BIASED if s.logit_bias else 0
        may_forbid = s.allowed_token_ids or s.bad_words_token_ids or s.min_tokens or s.grammar
        flags |= kernel.MASKED if may_forbid else 0
        ints, floats = self._ints[slot], self._floats[slot]
        ints[kernel.FLAGS] = flags
        ints[kernel.SLOT] = slot
        ints[kernel.TOP_K] = s.top_k if 0 < s.top_k < self._vocab_size else self._vocab_size
        seed = np.array([row.seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64).view(np.int32)
        ints[[kernel.SEED_LOW, kernel.SEED_HIGH]] = seed
        floats[kernel.INVERSE_TEMPERATURE] = 1.0 / max(s.temperature, MIN_TEMPERATURE)
        floats[kernel.TOP_P], floats[kernel.MIN_P] = s.top_p, s.min_p
        floats[kernel.REPETITION] = s.repetition_penalty
        floats[kernel.FREQUENCY], floats[kernel.PRESENCE] = s.frequency_penalty, s.presence_penalty
        if flags & kernel.PENALISED:
            self._write(self.tables.counts[slot], *_counts(row))
        if flags & kernel.BIASED:
            values = np.array(list(s.logit_bias.values()), dtype=np.float32)
            self._write(self.tables.biases[slot], np.array(list(s.logit_bias), dtype=np.int64), values)
        return _Known(s, slot, self._constant_mask(s))

    def _write(self, target: Tensor, ids: npt.NDArray[np.int64], values: npt.NDArray[np.generic]) -> None:
        """Make a row of a table zero but for some tokens."""
        target.zero_()
        target.index_copy_(0, self._to_device(ids), self._to_device(values))

    def _to_device(self, values: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _constant_mask(self, s: TokenSampling) -> _Words | None:
        """What allowed_token_ids and single-token bad words leave; None = everything."""
        banned = [word[0] for word in s.bad_words_token_ids if len(word) == 1]
        if not s.allowed_token_ids and not banned:
            return None
        allowed = np.full(self._vocab_size, not s.allowed_token_ids, dtype=np.bool_)
        allowed[s.allowed_token_ids or []] = True
        allowed[banned] = False
        return _packed(allowed, self._num_words)

    def _allowed(self, row: DeviceRow) -> _Words | None:
        """What the request itself allows in this step; None = everything."""
        s = row.sampling
        banned = []
        for *head, last in s.bad_words_token_ids:
            fits = 0 < len(head) <= row.num_output
            if fits and list(row.token_ids[len(row.token_ids) - len(head) :]) == head:
                banned.append(last)
        if row.num_output < s.min_tokens:
            banned += s.end_token_ids
        constant = self._known[row.request_id].allowed
        if not banned:
            return constant
        words = self._everything() if constant is None else constant.copy()
        ids = np.array(banned, dtype=np.uint32)
        np.bitwise_and.at(words, ids // 32, ~(np.uint32(1) << (ids % 32)))
        return words

    def _everything(self) -> _Words:
        return np.full(self._num_words, 0xFFFFFFFF, dtype=np.uint32)


def _counts(row: DeviceRow) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The tokens of a sequence, each once, and their entries of the count table."""
    prompt, output = row.token_ids[: row.num_prompt], row.token_ids[row.num_prompt :]
    tokens, place = np.unique(np.array([*prompt, *output], dtype=np.int64), return_inverse=True)
    values = np.bincount(place[row.num_prompt :], minlength=len(tokens)).astype(np.int32)
    values[place[: row.num_prompt]] |= kernel.IN_PROMPT
    return tokens, values


def _packed(allowed: npt.NDArray[np.bool_], num_words: int) -> _Words:
    """A bit a token, lowest first."""
    packed = np.packbits(allowed, bitorder="little")
    return np.pad(packed, (0, 4 * num_words - len(packed))).view(np.uint32)


def _mode(flags: npt.NDArray[np.int32]) -> int:
    asked = int(np.bitwise_or.reduce(flags, initial=0))
    if asked & ~(kernel.ACTIVE | kernel.DRAWN):
        return kernel.FULL
    return kernel.DRAW if asked & kernel.DRAWN else kernel.GREEDY
