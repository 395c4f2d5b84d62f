"""Which attention serves a model: `--attention-backend` and `--kv-cache-dtype`, and what each needs.

A backend that this machine lacks something for is refused at the start, by name; none replaces another
silently. Backends with dependencies of their own lie in files of their own and are imported when they
are asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Final, NoReturn

import torch

from loramux.engine.config import EngineConfig
from loramux.engine.errors import InvalidConfig
from loramux.engine.kernels.attention import Attention, AttentionShape, TorchAttention
from loramux.engine.kernels.attention_varlen import VarlenAttention, varlen_refusal
from loramux.engine.kernels.cpu.backend import CpuAttention, supports
from loramux.engine.models.families import ModelConfig
from loramux.engine.step_buffers import StepLimits

BACKEND_FLAG: Final = "--attention-backend"
KV_DTYPE_FLAG: Final = "--kv-cache-dtype"
FP8_CAPABILITY: Final = (8, 9)  # from which on an NVIDIA GPU converts 8-bit floats


def steps_in_triton(config: EngineConfig, device: torch.device) -> bool:
    """Whether the kernels of a step, attention among them, are in Triton; captured steps need that."""
    if config.kernels == "auto":
        return device.type == "cuda" and config.attention in ("auto", "triton")
    return config.kernels == "triton"


def attention_shape(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> AttentionShape:
    """What an attention must know of the model.

    Raises:
        InvalidConfig: this device cannot read a cache of that dtype.
    """
    kv_dtype = None if config.kv_cache_dtype == "auto" else torch.float8_e4m3fn
    if kv_dtype is not None and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            needed, got = (".".join(map(str, pair)) for pair in (FP8_CAPABILITY, capability))
            message = (
                f"{KV_DTYPE_FLAG} {config.kv_cache_dtype} needs compute capability {needed}, here it is {got}"
            )
            raise InvalidConfig(message, param=KV_DTYPE_FLAG)
    return AttentionShape(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        windows=tuple(dict.fromkeys(model.windows)),
        dtype=dtype,
        device=device,
        kv_dtype=kv_dtype,
    )


def make_attention(
    config: EngineConfig, shape: AttentionShape, limits: StepLimits, *, uses_triton: bool
) -> Attention:
    """The attention that is asked for; with auto the fastest one that serves this model on this device.

    Args:
        uses_triton: the steps' other kernels are in Triton.

    Raises:
        InvalidConfig: says what is missing.
    """
    backend = config.attention
    if backend == "auto":
        backend = "triton" if uses_triton else "cpu" if supports(shape) else "torch"
    elif uses_triton and backend != "triton":
        _refuse(config, "it does not go with --kernels triton, leave that at auto")
    if backend == "triton":
        return _triton(config, shape, limits, uses_triton=uses_triton)
    if backend == "varlen":
        if (missing := varlen_refusal(shape)) is not None:
            _refuse(config, missing)
        return VarlenAttention(shape)
    if backend == "flashinfer":
        return _flashinfer(config, shape)
    return CpuAttention(shape) if backend == "cpu" else TorchAttention(shape)


def _triton(
    config: EngineConfig, shape: AttentionShape, limits: StepLimits, *, uses_triton: bool
) -> Attention:
    if shape.device.type != "cuda" and not uses_triton:
        _refuse(config, f"it needs a CUDA device, --device is {shape.device.type}")
    if importlib.util.find_spec("triton") is None:
        _refuse(config, "the package triton is not installed")
    made: Attention = importlib.import_module("loramux.engine.gpu_start").GpuAttention(shape, limits)
    return made


def _flashinfer(config: EngineConfig, shape: AttentionShape) -> Attention:
    if shape.device.type != "cuda":
        _refuse(config, f"it needs a CUDA device, --device is {shape.device.type}")
    if shape.dtype == torch.float32:
        _refuse(config, "it computes in float16 or bfloat16, --dtype is float32")
    if importlib.util.find_spec("flashinfer") is None:
        _refuse(config, "FlashInfer is not installed: pip install 'loramux[flashinfer]'")
    module = importlib.import_module("loramux.engine.kernels.attention_flashinfer")
    made: Attention = module.FlashInferAttention(shape)
    return made


def _refuse(config: EngineConfig, why: str) -> NoReturn:
    raise InvalidConfig(f"{BACKEND_FLAG} {config.attention_backend}: {why}", param=BACKEND_FLAG)
