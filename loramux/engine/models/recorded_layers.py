"""All layers of a decode step in one call, where the CPU kernels know each part of them.

The same kernels as layer by layer, so the same bits; Python's part of each falls away, in which the other
threads wait (ADR 0018). Steps with prompts, and models with other parts, are
computed layer by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from loramux.engine.kernels.attention import Angles, Attention, KVCache
from loramux.engine.kernels.cpu.backend import CpuAttention
from loramux.engine.kernels.cpu.product import scratch
from loramux.engine.kernels.cpu.recording import Operation, Recording
from loramux.engine.kernels.cpu.threads import is_alone
from loramux.engine.kernels.cpu.vector_ir import LANES
from loramux.engine.kernels.lora import LoraInput
from loramux.engine.layers.activation import Activation
from loramux.engine.layers.linear import LoraLinear
from loramux.engine.layers.norm import RMSNorm
from loramux.engine.layers.parts import Gate, ResidualNorm
from loramux.engine.model_input import ModelInput
from loramux.engine.models.layer import DecoderLayer

MOST_ROWS: Final = 128  # with more of them Python's part is nothing


class RecordedLayers:
    """The layers, pre-norm, and the norm behind them, as operations on buffers of their own."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norm: ResidualNorm | None,
        gate: Gate,
        attention: Attention,
        caches: Sequence[KVCache],
    ) -> None:
        """Of parts that `can_record`."""
        assert isinstance(norm, RMSNorm)
        assert isinstance(gate, Activation)
        assert isinstance(attention, CpuAttention)
        self._attention = attention
        qkv, attn_out, mlp_in, mlp_out = _sites(layers[0])
        hidden_size = norm.weight.shape[0]
        self._x, self._hidden, normed, delta = (_buffer(hidden_size) for _ in range(4))
        projected, attended = _buffer(_width(qkv)), _buffer(attention.out_features)
        gate_up, gated = _buffer(_width(mlp_in)), _buffer(_width(mlp_in) // 2)
        num_threads = torch.get_num_threads()
        room = scratch(num_threads)
        buffers = (normed, delta, projected, attended, gate_up, gated)
        self._keep = (buffers, room, caches)  # operations have addresses
        self._recordings: list[Recording] = []  # of the base, and with lanes
        for with_lora in (False, True) if qkv.lanes is not None else (False,):
            operations: list[Operation] = []
            for layer, cache in zip(layers, caches, strict=True):
                qkv, attn_out, mlp_in, mlp_out = _sites(layer)
                before, between = _norms(layer)
                operations += (
                    before.operation(self._x, delta if operations else None, normed),
                    qkv.operation("qkv", normed, projected, with_lora=with_lora),
                    *attention.operations(projected, layer.head_norms, cache, attended, layer.window),
                    attn_out.operation("attn_out", attended, delta, with_lora=with_lora),
                    between.operation(self._x, delta, normed),
                    mlp_in.operation("mlp_in", normed, gate_up, with_lora=with_lora),
                    gate.operation(gate_up, gated),
                    mlp_out.operation("mlp_out", gated, delta, with_lora=with_lora),
                )
            self._per_layer = len(operations) // len(layers)
            operations.append(norm.operation(self._x, delta, self._hidden))
            recording = Recording(operations, num_threads)
            recording.state.product_room = room.data_ptr()
            self._recordings.append(recording)

    def takes(self, batch: ModelInput) -> bool:
        """True if it can compute this step: each sequence decodes, and adapters change nothing but lanes."""
        rows = len(batch.token_ids)
        if rows > MOST_ROWS or len(batch.order) != rows or len(batch.logits_index) != rows:
            return False
        lora = batch.lora
        assert lora is None or isinstance(lora, LoraInput)
        return lora is None or (lora.rows is not None and lora.prompts is None and not lora.gains)

    def __call__(self, x: Tensor, angles: Angles | None, batch: ModelInput) -> Tensor:
        """Of a step that it `takes`.

        Args:
            x: [num_tokens, hidden_size], the embeddings

        Returns:
            The same behind all layers and the norm; overwritten by the next call.
        """
        rows = x.shape[0]
        lora = batch.lora
        recording = self._recordings[0 if lora is None else 1]
        state = recording.state
        self._x[:rows] = x
        state.rows = rows
        state.cos, state.sin = (angles[0].data_ptr(), angles[1].data_ptr()) if angles is not None else (0, 0)
        self._attention.describe(batch.attention, state)
        if lora is not None:
            assert isinstance(lora, LoraInput)
            assert lora.rows is not None
            state.lora = lora.rows.address
        done = 0
        while done + self._per_layer < len(recording) and is_alone(rows):
            recording.walk(done, done + self._per_layer, alone=True)
            done += self._per_layer
        recording.walk(done, len(recording))
        return self._hidden[:rows]

    def take_cycles(self) -> Counter[str]:
        """Cycles by kind of operation since the last call, the first thread's."""
        return sum((Counter(recording.take_cycles()) for recording in self._recordings), Counter())


def can_record(
    layers: Sequence[DecoderLayer], norm: ResidualNorm | None, gate: Gate, attention: Attention
) -> bool:
    """True if all of these have compiled operations, in bfloat16."""
    return (
        isinstance(norm, RMSNorm)
        and isinstance(gate, Activation)
        and gate.is_silu_gate
        and isinstance(attention, CpuAttention)
        and all(_has_operations(layer) for layer in layers)
    )


def _has_operations(layer: DecoderLayer) -> bool:
    norms = (layer.norm_1, layer.norm_2)
    sites = (layer.qkv, layer.attn_out, layer.mlp_in, layer.mlp_out)
    return (
        all(isinstance(norm, RMSNorm) and norm.is_compiled for norm in norms)
        and all(isinstance(s, LoraLinear) and s.packed is not None and s.peers is None for s in sites)
        and _width(_sites(layer)[2]) % (2 * LANES) == 0
    )


def _sites(layer: DecoderLayer) -> tuple[LoraLinear, LoraLinear, LoraLinear, LoraLinear]:
    sites = (layer.qkv, layer.attn_out, layer.mlp_in, layer.mlp_out)
    qkv, attn_out, mlp_in, mlp_out = (site for site in sites if isinstance(site, LoraLinear))
    return qkv, attn_out, mlp_in, mlp_out


def _norms(layer: DecoderLayer) -> tuple[RMSNorm, RMSNorm]:
    assert isinstance(layer.norm_1, RMSNorm)
    assert isinstance(layer.norm_2, RMSNorm)
    return layer.norm_1, layer.norm_2


def _width(site: LoraLinear) -> int:
    assert site.packed is not None
    return site.packed.out_features


def _buffer(width: int) -> Tensor:
    return torch.empty((MOST_ROWS, width), dtype=torch.bfloat16)
