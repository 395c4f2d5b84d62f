"""From a scheduled batch to the fields of the step buffers, and from these to a step's tensors.

The same token order as everywhere (`model_input.arrange`). A token that the step before samples is not
known to the host when the next step is filled: its field says in which row of that step it is drawn,
and the device takes it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from loramux.engine.cuda_graph import StepGraphs, StepShape, eager_shape
from loramux.engine.kernels.attention import AttentionInput, BatchLayout
from loramux.engine.kernels.gpu import lora_input
from loramux.engine.kernels.lora import GainSegment
from loramux.engine.kernels.tables import AdapterTables, TableSegment
from loramux.engine.model_input import ModelInput, arrange, rope_lengths, table_segments, wanted_logits
from loramux.engine.step import ScheduledBatch, ScheduledSequence
from loramux.engine.step_buffers import DeviceFields, Fields, HostFields, StepBuffers, StepLimits


class Planner(Protocol):
    """The fields of an attention; see `kernels/gpu/attention_input.py`."""

    @property
    def fields(self) -> Fields:
        """Of the step buffers."""
        ...

    def fill(self, host: HostFields, layout: BatchLayout) -> Mapping[str, int]:
        """Write a step's fields; returns the rows of large ones that matter."""
        ...

    def view(
        self, device: DeviceFields, num_tokens: int, num_seqs: int, *, has_decode: bool, has_prompts: bool
    ) -> AttentionInput:
        """The attention's input."""
        ...


@dataclass(frozen=True, slots=True)
class GpuStepPlan:
    """What the host knows of a step that it has filled."""

    shape: StepShape
    is_recorded: bool  # there is a graph of this shape, and it computes this step
    order: list[ScheduledSequence]  # in token order
    logits_rows: list[tuple[int, int]]  # per sequence of `order`
    num_logits: int  # rows of logits that are wanted; the others are padding
    has_decode: bool  # some sequence computes one token
    tables: list[TableSegment]
    rows: Mapping[str, int]  # of large fields, the rows to upload

    @property
    def sampling(self) -> list[tuple[ScheduledSequence, int]]:
        """The sequences that get a token, and the row of the logits that it is drawn from."""
        pairs = zip(self.order, self.logits_rows, strict=True)
        return [(item, end - 1) for item, (_, end) in pairs if item.samples]


class GpuInputs:
    """The step buffers of a model, filled from batches."""

    def __init__(
        self,
        planner: Planner,
        limits: StepLimits,
        device: torch.device,
        *,
        others: Fields = MappingProxyType({}),
        needs_lengths: bool = False,
    ) -> None:
        """Allocate the buffers.

        Args:
            planner: of the attention.
            others: fields that somebody else fills.
            needs_lengths: the model has dynamic RoPE.
        """
        self._planner = planner
        self._limits = limits
        self._needs_lengths = needs_lengths
        token = ((limits.max_tokens,), np.int64)
        fields: dict[str, tuple[tuple[int, ...], type]] = {
            "token_ids": token,
            "positions": token,
            "last_row": token,  # of the step before, where it draws the token; if
            "is_pending": ((limits.max_tokens,), np.bool_),
            "logits_index": token,
        }
        if needs_lengths:
            fields["rope_lengths"] = token
        parts = (fields, planner.fields, lora_input.fields(limits), others)
        self.buffers = StepBuffers({name: field for part in parts for name, field in part.items()}, device)
        self.pad()

    def fill(
        self,
        batch: ScheduledBatch,
        last_rows: Mapping[str, int],
        graphs: StepGraphs,
        tables: Mapping[str, AdapterTables] = MappingProxyType({}),
    ) -> GpuStepPlan:
        """Write a step into the next slot; it is not uploaded yet.

        Args:
            last_rows: by request id, the rows in which the step before drew tokens.
            graphs: those that may compute it.
            tables: of the adapters on the device that have some, by digest.
        """
        host = self.buffers.next_slot()
        order, layout = arrange(batch)
        logits_index, logits_rows = wanted_logits(order, layout.offsets)
        own_tables = table_segments(order, layout.offsets, logits_rows, tables) if tables else []
        num_tokens, num_seqs, num_logits = len(layout.positions), len(order), len(logits_index)
        spans = [item.seq.lanes for item in order]
        num_lanes = lora_input.lanes_in_use(spans, self._limits.num_lanes)
        decode_only = layout.num_decode == num_seqs
        recorded = None
        of_prompts = any(item.wants_prompt_logprobs for item in order)
        if not own_tables and not self._needs_lengths and not of_prompts:
            recorded = graphs.find(num_tokens, num_seqs, num_lanes, decode_only=decode_only)
        shape = recorded or eager_shape(num_tokens, num_seqs, num_lanes, decode_only=decode_only)
        self._fill_tokens(host, order, layout, last_rows)
        host["positions"][:num_tokens] = layout.positions
        host["positions"][num_tokens : shape.num_tokens] = 0
        host["logits_index"][:num_logits] = logits_index
        host["logits_index"][num_logits : shape.num_seqs] = 0
        if self._needs_lengths:
            host["rope_lengths"][:num_tokens] = rope_lengths(order, layout)
            host["rope_lengths"][num_tokens : shape.num_tokens] = 1
        rows = self._planner.fill(host, layout)
        if num_lanes:
            lora_input.fill(host, spans, layout.offsets, shape.num_tokens)
        return GpuStepPlan(
            shape,
            recorded is not None,
            order,
            logits_rows,
            num_logits,
            layout.num_decode > 0,
            own_tables,
            rows,
        )

    def view(self, shape: StepShape, last_ids: Tensor, plan: GpuStepPlan | None = None) -> ModelInput:
        """The tensors of a step, in the current stream.

        Args:
            last_ids: [max_seqs], what the step before drew.
            plan: of a step that is not recorded; None = whatever fits into the shape.
        """
        device, num_tokens = self.buffers.device, shape.num_tokens
        pending, last_row = device["is_pending"][:num_tokens], device["last_row"][:num_tokens]
        tables = plan.tables if plan else []
        return ModelInput(
            token_ids=torch.where(pending, last_ids[last_row], device["token_ids"][:num_tokens]),
            positions=device["positions"][:num_tokens],
            rope_lengths=device["rope_lengths"][:num_tokens] if self._needs_lengths else None,
            attention=self._planner.view(
                device,
                num_tokens,
                shape.num_seqs,
                has_decode=plan is None or plan.has_decode,
                has_prompts=not shape.decode_only,
            ),
            lora=lora_input.view(
                device,
                num_tokens,
                shape.num_seqs,
                num_lanes=shape.num_lanes,
                decode_only=shape.decode_only,
                gains=[GainSegment(s.begin, s.end, s.tables.gains) for s in tables if s.tables.gains],
            ),
            tables=tables,
            logits_index=device["logits_index"][: plan.num_logits if plan else shape.num_seqs],
            order=plan.order if plan else [],
            logits_rows=plan.logits_rows if plan else [],
        )

    def pad(self) -> None:
        """Make the device's fields a step of padding only, which reads and writes nothing of anybody."""
        host = self.buffers.next_slot()
        for name, array in host.items():
            array.fill(-1 if name in ("slots", "token_lane") else 0)
        self.buffers.upload()

    def _fill_tokens(
        self,
        host: HostFields,
        order: list[ScheduledSequence],
        layout: BatchLayout,
        last_rows: Mapping[str, int],
    ) -> None:
        ids, num_tokens = host["token_ids"], len(layout.positions)
        host["is_pending"][:] = False
        pending: list[tuple[int, int]] = []  # token of this step, row of the one before
        num_decode = layout.num_decode
        own = []
        for token, item in enumerate(order[:num_decode]):
            known = item.seq.token_ids[item.start : item.end]
            own.append(known[0] if known else 0)
            if not known:
                pending.append((token, last_rows[item.seq.request_id]))
        ids[:num_decode] = own
        for item, begin in zip(order[num_decode:], layout.offsets[num_decode:-1].tolist(), strict=True):
            ids[begin : begin + item.count] = item.seq.token_ids[item.start : item.end]
        ids[num_tokens:] = 0
        host["last_row"][:] = 0
        if pending:
            tokens, rows = np.array(pending).T
            host["is_pending"][tokens] = True
            host["last_row"][tokens] = rows
