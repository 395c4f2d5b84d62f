"""`--attention-backend` and `--kv-cache-dtype`: what each value gives on a CPU, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux.engine.attention_backend import make_attention, steps_in_triton
from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.errors import InvalidConfig
from loramux.engine.kernels.attention import Attention, AttentionShape, TorchAttention
from loramux.engine.kernels.cpu.backend import CpuAttention
from loramux.engine.step_buffers import StepLimits
from loramux.engine.types import Request, TokenSampling
from tests.tiny_models import make_tiny

LIMITS = StepLimits(max_tokens=8, max_seqs=2, max_blocks=4, block_size=16, num_lanes=0, vocab_size=8)
SHAPE = AttentionShape(
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    block_size=16,
    windows=(None,),
    dtype=torch.float32,
    device=torch.device("cpu"),
)


def make(backend: str, shape: AttentionShape = SHAPE, *, uses_triton: bool = False) -> Attention:
    config = EngineConfig(model="m", attention_backend=backend)
    return make_attention(config, shape, LIMITS, uses_triton=uses_triton)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", CpuAttention),
        ("AUTO", CpuAttention),
        ("torch", TorchAttention),
        ("TORCH_SDPA", TorchAttention),
    ],
)
def test_what_a_name_means_on_a_cpu(name: str, kind: type[Attention]) -> None:
    assert isinstance(make(name), kind)


@pytest.mark.parametrize("name", ["triton", "TRITON_ATTN", "varlen", "FLASHINFER"])
def test_what_needs_a_gpu_says_so(name: str) -> None:
    with pytest.raises(InvalidConfig, match=f"--attention-backend {name}: it needs a CUDA device") as caught:
        make(name)

    assert caught.value.param == "--attention-backend"


def test_a_name_that_nobody_knows_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InvalidConfig, match="one of auto, flashinfer, torch, triton, varlen, got 'xformers'"):
        EngineConfig(model="m", attention_backend="xformers")


def test_flash_attention_is_shown_its_way() -> None:
    with pytest.raises(InvalidConfig, match="got 'FLASH_ATTN'; varlen leads to FlashAttention"):
        EngineConfig(model="m", attention_backend="FLASH_ATTN")


def test_steps_in_triton_take_no_other_attention() -> None:
    with pytest.raises(InvalidConfig, match="does not go with --kernels triton"):
        make("torch", uses_triton=True)


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [
        ("cuda", "auto", True),
        ("cuda", "TRITON_ATTN", True),
        ("cuda", "flashinfer", False),
        ("cpu", "auto", False),
    ],
)
def test_steps_are_in_triton_on_a_gpu_unless_the_attention_is_not(
    device: str, backend: str, *, expected: bool
) -> None:
    config = EngineConfig(model="m", attention_backend=backend)

    assert steps_in_triton(config, torch.device(device)) is expected


def test_a_kv_cache_dtype_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="must be one of auto, fp8, fp8_e4m3, got 'fp8_e5m2'"):
        EngineConfig(model="m", kv_cache_dtype="fp8_e5m2")


def test_an_8_bit_cache_holds_four_times_the_tokens_of_a_32_bit_one(tmp_path: Path) -> None:
    folder, blocks = make_tiny("qwen3", tmp_path / "tiny"), []
    sampling = TokenSampling(temperature=0.0, max_tokens=6)
    for dtype in ("auto", "fp8"):
        config = EngineConfig(
            model=str(folder), dtype="float32", kv_cache_dtype=dtype, kv_cache_bytes=1 << 20
        )
        engine = Engine(config)
        try:
            engine.add_request(Request(request_id="a", prompt_token_ids=[5, 9, 11] * 9, sampling=sampling))
            answered = 0
            while engine.has_work():
                answered += sum(len(output.token_ids) for output in engine.step())
            blocks.append(engine.runner.num_kv_blocks)
        finally:
            engine.close()
        assert answered == 6

    assert blocks[1] == 4 * blocks[0]
