"""From a scheduled batch to the tensors of one step. Loops over sequences, never over tokens.

Token order: sequences that decode (one token each) first, sorted by lane so that an adapter's tokens
are consecutive, then prompt chunks, sorted likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from loramux.engine.kernels.attention import Attention, AttentionInput, BatchLayout
from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.kernels.cpu.lora import LoraKernel
from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.lora import GainSegment, LoraInput, Segment, plan_lora
from loramux.engine.kernels.tables import AdapterTables, TableSegment
from loramux.engine.step import SampledToken, ScheduledBatch, ScheduledSequence


@dataclass(frozen=True, slots=True)
class KeptRows:
    """What the last layer goes on with once every token's keys and values are stored."""

    index: Tensor  # [num_logits] int64: the tokens whose logits are wanted
    lora: LoraInput | None  # of these rows


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What `Decoder.forward` reads."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    rope_lengths: Tensor | None  # [num_tokens] int64, with dynamic RoPE only
    attention: AttentionInput
    lora: LoraInput | GpuLoraInput | None
    tables: list[TableSegment]  # tokens whose adapter changes a vocabulary table or has gains
    logits_index: Tensor  # [num_logits] int64: tokens whose logits are wanted
    order: list[ScheduledSequence]  # the sequences in token order
    logits_rows: list[tuple[int, int]]  # per sequence of `order`: its rows of the logits
    kept: KeptRows | None = None  # None where the last layer computes all tokens


class InputBuilder:
    """Builds a `ModelInput` a step; holds what does not change between steps."""

    def __init__(
        self,
        *,
        attention: Attention,
        needs_lengths: bool,
        lora_kernel: LoraKernel | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._attention = attention
        self._needs_lengths = needs_lengths
        self._lora_kernel = lora_kernel
        self._dtype = dtype
        self._device = device
        self._last_lora: tuple[list[Segment], int, LoraInput | None] = ([], 0, None)

    def build(
        self,
        batch: ScheduledBatch,
        tables: Mapping[str, AdapterTables] = MappingProxyType({}),
        last: Mapping[str, SampledToken] = MappingProxyType({}),
    ) -> ModelInput:
        """The tensors of one step.

        Args:
            tables: of the adapters on the device that have some, by digest
            last: what the step before sampled, by request id; sequences may not know of it yet
        """
        order, layout = arrange(batch)
        token_ids = np.concatenate(
            [
                np.array(
                    s.seq.token_ids[s.start : s.end] or [last[s.seq.request_id].token_id], dtype=np.int64
                )
                for s in order
            ]
        )
        logits_index, logits_rows = wanted_logits(order, layout.offsets)
        own_tables = table_segments(order, layout.offsets, logits_rows, tables) if tables else []
        return ModelInput(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(layout.positions),
            rope_lengths=self._tensor(rope_lengths(order, layout)) if self._needs_lengths else None,
            attention=self._attention.plan(layout),
            lora=self._lora(
                _segments(order, layout.offsets, layout.num_decode), layout.num_decode, own_tables
            ),
            tables=own_tables,
            logits_index=self._tensor(logits_index),
            order=order,
            logits_rows=logits_rows,
            kept=self._kept(order, logits_index, logits_rows, len(token_ids), own_tables),
        )

    def _lora(
        self, segments: list[Segment], num_decode: int, tables: list[TableSegment], *, of_logits: bool = False
    ) -> LoraInput | None:
        gains = [
            GainSegment(s.logits_begin, s.logits_end, s.tables.gains)
            if of_logits
            else GainSegment(s.begin, s.end, s.tables.gains)
            for s in tables
            if s.tables.gains
        ]
        last_segments, last_num_decode, plan = self._last_lora
        if segments == last_segments and num_decode == last_num_decode and not gains:
            return plan  # as in most steps: sequences go on decoding
        plan = plan_lora(
            segments,
            num_decode,
            dtype=self._dtype,
            device=self._device,
            kernel=self._lora_kernel,
            gains=gains,
        )
        self._last_lora = ([], 0, None) if gains else (segments, num_decode, plan)
        return plan

    def _kept(
        self,
        order: list[ScheduledSequence],
        logits_index: Ints,
        logits_rows: list[tuple[int, int]],
        num_tokens: int,
        tables: list[TableSegment],
    ) -> KeptRows | None:
        """None where all tokens are wanted, or so many that they need another plan."""
        if len(logits_index) == num_tokens or any(end - begin > 1 for begin, end in logits_rows):
            return None
        offsets = np.array([0, *(end for _, end in logits_rows)], dtype=np.int64)
        num_rows = len(logits_index)
        segments = [s for s in _segments(order, offsets, len(order)) if s.begin < s.end]
        return KeptRows(self._tensor(logits_index), self._lora(segments, num_rows, tables, of_logits=True))

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def arrange(batch: ScheduledBatch) -> tuple[list[ScheduledSequence], BatchLayout]:
    """The module's token order, and where everything lies in it."""
    order = sorted(batch.sequences, key=lambda s: (s.count > 1, s.seq.lanes.first if s.seq.lanes else -1))
    starts = np.array([s.start for s in order], dtype=np.int64)
    counts = np.array([s.count for s in order], dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(len(order)), counts)
    positions = np.arange(offsets[-1]) - offsets[:-1][owner] + starts[owner]
    blocks = [np.array(s.seq.block_ids, dtype=np.int64) for s in order]
    num_decode = int((counts == 1).sum())
    return order, BatchLayout(starts + counts, counts, offsets, owner, positions, blocks, num_decode)


def rope_lengths(order: list[ScheduledSequence], layout: BatchLayout) -> Ints:
    """[num_tokens]: the lengths whose frequencies dynamic RoPE uses, see `Rotary.angles`."""
    prompts = np.array([s.seq.num_prompt for s in order], dtype=np.int64)
    return np.maximum(prompts[layout.owner], layout.positions + 1)


def _segments(order: list[ScheduledSequence], offsets: Ints, num_decode: int) -> list[Segment]:
    """Maximal runs of one adapter, base tokens left out, cut where the prompt chunks begin."""
    segments: list[Segment] = []
    for index, item in enumerate(order):
        lanes = item.seq.lanes
        if lanes is None:
            continue
        begin, end = int(offsets[index]), int(offsets[index + 1])
        last = segments[-1] if segments else None
        joins = last is not None and last.end == begin and last.first_lane == lanes.first
        if last is not None and joins and index != num_decode:
            segments[-1] = Segment(last.begin, end, lanes.first, lanes.rank)
        else:
            segments.append(Segment(begin, end, lanes.first, lanes.rank))
    return segments


def table_segments(
    order: list[ScheduledSequence],
    offsets: Ints,
    logits_rows: list[tuple[int, int]],
    tables: Mapping[str, AdapterTables],
) -> list[TableSegment]:
    """Maximal runs of one adapter that has tables; they may cross into the prompt chunks."""
    segments: list[TableSegment] = []
    for index, (item, (logits_begin, logits_end)) in enumerate(zip(order, logits_rows, strict=True)):
        own = tables.get(item.seq.adapter) if item.seq.adapter is not None else None
        if own is None:
            continue
        begin, end = int(offsets[index]), int(offsets[index + 1])
        if segments and segments[-1].end == begin and segments[-1].tables is own:
            last = segments.pop()
            begin, logits_begin = last.begin, last.logits_begin
        segments.append(TableSegment(begin, end, logits_begin, logits_end, own))
    return segments


def wanted_logits(order: list[ScheduledSequence], offsets: Ints) -> tuple[Ints, list[tuple[int, int]]]:
    """Which tokens' logits are wanted, and each sequence's rows among them.

    A sequence that samples wants its last token; one that wants prompt log-probabilities wants
    every prompt token that predicts another prompt token, too.
    """
    wanted: list[Ints] = []
    rows: list[tuple[int, int]] = []
    total = 0
    for item, begin, end in zip(order, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        first = begin if item.wants_prompt_logprobs else (end - 1 if item.samples else end)
        wanted.append(np.arange(first, end, dtype=np.int64))
        rows.append((total, total + end - first))
        total += end - first
    return np.concatenate(wanted), rows
