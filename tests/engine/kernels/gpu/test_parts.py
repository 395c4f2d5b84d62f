"""The decoder with the parts of a GPU equals the decoder in plain torch, whatever the sites' plans are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loramux.engine.adapters.lane_memory import LaneLayout
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.weights import HostAdapter, LanePool, ModuleWeights
from loramux.engine.kernels.attention import (
    Angles,
    AttentionInput,
    AttentionShape,
    BatchLayout,
    KVCache,
    TorchAttention,
    token_slots,
)
from loramux.engine.kernels.gpu import lora_input
from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.gpu.parts import GpuParts
from loramux.engine.kernels.gpu.qkv import store_qkv
from loramux.engine.kernels.gpu.site_plan import PlanTable, Shrink, SitePlan, always, read_plans
from loramux.engine.kernels.lora import GainSegment, LoraInput, OutputGain, Segment, plan_lora
from loramux.engine.layers.norm import RMSNorm
from loramux.engine.layers.parts import Parts, TorchParts
from loramux.engine.model_input import ModelInput
from loramux.engine.models.decoder import Decoder
from loramux.engine.models.families import ModelConfig, load_model_config
from loramux.engine.models.weights import Checkpoint
from loramux.engine.parallel.shard import whole_model
from loramux.engine.step_buffers import StepBuffers, StepLimits
from tests.engine.kernels.gpu.lora_sites import DEVICE
from tests.tiny_models import make_tiny

POOL = 96
SPANS = [None, LaneSpan(0, 8, 4), LaneSpan(0, 8, 4), LaneSpan(72, 24, 17)]  # of the sequences
CHUNKS = [2, 3, 2, 2]  # tokens of their prompts
FEW_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
BLOCK = 4
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", FEW_HEADS),
    "qwen2, biases": ("qwen2", FEW_HEADS),
    "qwen3, head norms": ("qwen3", FEW_HEADS),
    "opt, layer norms": ("opt", {"num_attention_heads": 2}),
    "opt, norms after the addition": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "num_attention_heads": 2},
    ),
}
PLANS = {
    "augmented, fused": SitePlan(shrink=Shrink.AUGMENTED, is_fused=True, by_tile=False),
    "augmented, separate expand": SitePlan(shrink=Shrink.AUGMENTED, is_fused=False, by_tile=True),
    "a product of its own": SitePlan(shrink=Shrink.PRODUCT, is_fused=True, by_tile=False),
    "tiles, in planes": SitePlan(shrink=Shrink.TILES, is_fused=True, by_tile=False, planes=2),
    "tiles": SitePlan(shrink=Shrink.TILES, is_fused=True, by_tile=True),
}


@dataclass(frozen=True)
class _StoredInput(AttentionInput):
    plain: AttentionInput
    slots: Tensor


class StoringAttention(TorchAttention):
    """Attends in plain torch; stores with the kernel."""

    def plan(self, layout: BatchLayout) -> Any:
        slots = torch.from_numpy(token_slots(layout, BLOCK)).int().to(DEVICE)
        return _StoredInput(super().plan(layout), slots)

    def store(
        self,
        qkv: Any,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        plan: AttentionInput,
    ) -> Tensor:
        assert isinstance(plan, _StoredInput)
        return store_qkv(qkv, angles, norms, cache, plan.slots, num_heads=self._shape.num_heads)

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        assert isinstance(plan, _StoredInput)
        return super().attend(q, cache, plan.plain, window=window)


class Machine:
    """A decoder with two adapters in its lanes, for steps by hand."""

    def __init__(
        self, folder: Path, parts: Parts, layout: LaneLayout, attention: type[TorchAttention]
    ) -> None:
        config = load_model_config(folder)
        self.pool = LanePool(config, POOL, dtype=torch.float32, device=DEVICE, layout=layout)
        for span in {span for span in SPANS if span is not None}:
            self.pool.write(_adapter(config, span), span)
        shape = AttentionShape(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=BLOCK,
            windows=tuple(dict.fromkeys(config.windows)),
            dtype=torch.float32,
            device=DEVICE,
        )
        self.attention = attention(shape)
        self.caches = [self.attention.empty_cache(2 * len(SPANS)) for _ in range(config.num_layers)]
        with Checkpoint(folder, dtype=torch.float32, device=DEVICE) as checkpoint:
            self.model = Decoder(
                whole_model(config),
                checkpoint,
                self.pool,
                self.attention,
                parts=parts,
                max_len=32,
                dtype=torch.float32,
                device=DEVICE,
            )
        self.is_fused = isinstance(parts, GpuParts)

    def step(self, starts: list[int], counts: list[int], gains: list[GainSegment]) -> Tensor:
        """The logits of each sequence's last token."""
        offsets = np.concatenate(([0], np.cumsum(counts)))
        owner = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(offsets[-1]) - offsets[owner] + np.array(starts)[owner]
        num_decode = sum(count == 1 for count in counts)
        blocks = [np.array([2 * i, 2 * i + 1]) for i in range(len(counts))]
        ends = np.array(starts) + np.array(counts)
        layout = BatchLayout(ends, np.array(counts), offsets, owner, positions, blocks, num_decode)
        batch = ModelInput(
            token_ids=torch.from_numpy((7 * positions + 13 * owner) % 97 + 3).to(DEVICE),
            positions=torch.from_numpy(positions).to(DEVICE),
            rope_lengths=None,
            attention=self.attention.plan(layout),
            lora=self._lora(counts, offsets, num_decode, gains),
            tables=[],
            logits_index=torch.from_numpy(offsets[1:] - 1).to(DEVICE),
            order=[],
            logits_rows=[],
        )
        with torch.inference_mode():
            return self.model.logits(self.model.forward(batch, self.caches), [])

    def _lora(
        self, counts: list[int], offsets: Any, num_decode: int, gains: list[GainSegment]
    ) -> LoraInput | GpuLoraInput | None:
        if not self.is_fused:
            segments = [
                Segment(int(offsets[i]), int(offsets[i + 1]), span.first, span.rank)
                for i, span in enumerate(SPANS)
                if span is not None
            ]
            return plan_lora(segments, num_decode, dtype=torch.float32, device=DEVICE, gains=gains)
        limits = StepLimits(
            max_tokens=64, max_seqs=8, max_blocks=2, block_size=BLOCK, num_lanes=POOL, vocab_size=1
        )
        buffers = StepBuffers(lora_input.fields(limits), DEVICE)
        num_tokens = int(offsets[-1])
        lora_input.fill(buffers.host, SPANS, offsets, num_tokens)
        buffers.upload()
        return lora_input.view(
            buffers.device,
            num_tokens,
            len(SPANS),
            num_lanes=lora_input.lanes_in_use(SPANS, POOL),
            decode_only=num_decode == len(counts),
            gains=gains,
        )


def _adapter(config: ModelConfig, span: LaneSpan) -> HostAdapter:
    """Changes every linear layer but the MLP of the last one."""
    random = torch.Generator().manual_seed(span.rank)
    modules = {
        config.layer_prefix(layer) + part.module: ModuleWeights(
            torch.randn(span.rank, site.in_features, generator=random) / site.in_features**0.5,
            torch.randn(span.rank, part.out_features, generator=random) / span.rank**0.5,
        )
        for layer in range(config.num_layers)
        for site in config.sites
        for part in site.parts
        if layer + 1 < config.num_layers or not site.name.startswith("mlp")
    }
    return HostAdapter(f"rank {span.rank}", span.rank, modules)


def _both(folder: Path, plans: PlanTable) -> tuple[Machine, Machine]:
    plain = Machine(folder, TorchParts(), LaneLayout.APART, TorchAttention)
    return plain, Machine(folder, GpuParts(plans), LaneLayout.BEHIND_WEIGHT, StoringAttention)


def _assert_same_steps(plain: Machine, fused: Machine, gains: list[GainSegment] | None = None) -> None:
    for starts, counts in (([0] * 4, CHUNKS), (CHUNKS, [1] * 4)):
        own = [] if gains is None or counts is not CHUNKS else gains
        expected = plain.step(starts, counts, own)
        torch.testing.assert_close(fused.step(starts, counts, own), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"), **FEW_HEADS)


@pytest.mark.parametrize("model", MODELS)
def test_every_family_with_the_plans_of_the_table(model: str, tmp_path: Path) -> None:
    family, fields = MODELS[model]
    _assert_same_steps(*_both(make_tiny(family, tmp_path, **fields), read_plans()))


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan: str, llama: Path) -> None:
    _assert_same_steps(*_both(llama, always(PLANS[plan])))


def test_weights_that_cannot_hold_lanes(llama: Path) -> None:
    plain = Machine(llama, TorchParts(), LaneLayout.APART, TorchAttention)
    plans = always(PLANS["augmented, fused"])  # which such a site cannot follow
    fused = Machine(llama, GpuParts(plans), LaneLayout.JOINED, StoringAttention)

    _assert_same_steps(plain, fused)


def test_plain_torch_takes_lanes_behind_the_weight(llama: Path) -> None:
    plain = Machine(llama, TorchParts(), LaneLayout.APART, TorchAttention)
    behind = Machine(llama, TorchParts(), LaneLayout.BEHIND_WEIGHT, TorchAttention)

    _assert_same_steps(plain, behind)


@pytest.mark.parametrize("plan", ["augmented, fused", "tiles"])
def test_gains_of_dora_adapters(plan: str, llama: Path) -> None:
    config = load_model_config(llama)
    gains = {
        index: OutputGain(torch.rand(site.out_features, device=DEVICE) + 0.5, None)
        for index, site in enumerate(config.sites)
    }
    own = [GainSegment(CHUNKS[0], CHUNKS[0] + CHUNKS[1], gains)]

    _assert_same_steps(*_both(llama, always(PLANS[plan])), gains=own)


def test_a_step_without_adapters_reads_the_weight_alone(llama: Path) -> None:
    plain, fused = _both(llama, read_plans())
    for machine in (plain, fused):
        machine._lora = lambda *_: None  # type: ignore[method-assign]
    for layer in range(2):
        for name in ("qkv", "attn_out", "mlp_in", "mlp_out"):
            lanes = fused.pool.site(layer, name)
            assert lanes is not None
            lanes.a.fill_(float("nan"))

    _assert_same_steps(plain, fused)
