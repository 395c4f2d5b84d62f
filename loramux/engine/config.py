"""The engine's configuration. Pure values: nothing here reads a file, the environment or torch."""

from __future__ import annotations

import math

import msgspec

from loramux.engine.errors import InvalidConfig

SCHEDULING_POLICIES = ("fcfs", "priority")
DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")  # half and float: vLLM's names, too
LOAD_FORMATS = ("auto", "safetensors", "dummy")
QUANTIZATIONS = (None, "fp8", "int8")
KERNELS = ("auto", "torch", "triton")
ATTENTION_BACKENDS = {  # in any case, vLLM's names too: what each means here
    "auto": "auto",
    "triton": "triton",
    "triton_attn": "triton",
    "torch": "torch",
    "torch_sdpa": "torch",
    "varlen": "varlen",
    "flashinfer": "flashinfer",
}
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
LANE_GROUP = 8  # ranks handed out together; an adapter takes ceil(rank / 8) groups


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process is started with."""

    model: str  # local folder
    dtype: str = "auto"  # auto = the checkpoint's, with float16 run as bfloat16 on a CPU
    device: str = "auto"  # auto | cpu | cuda
    load_format: str = "auto"  # auto and safetensors read files; dummy = random weights of the right shapes
    tensor_parallel_size: int = 1  # ranks: processes with a part of the model each, on a device of its own
    quantization: str | None = None  # of the base weights: fp8 (with fp8 activations) | int8 (weights only)
    kernels: str = "auto"  # auto | torch | triton; auto = triton on a GPU
    attention_backend: str = "auto"  # a key of ATTENTION_BACKENDS, in any case
    kv_cache_dtype: str = "auto"  # auto = the model's; fp8 = fp8_e4m3, with a scale of 1
    max_model_len: int | None = None  # tokens; None = the model's own limit
    max_num_seqs: int = 128  # sequences that run at the same time
    max_num_batched_tokens: int = 2048  # tokens computed in one step
    block_size: int = 16  # tokens a KV block
    num_kv_blocks: int | None = None  # None = from kv_cache_bytes
    kv_cache_bytes: int = 1 << 30  # CPU only; a GPU takes what gpu_memory_utilization leaves
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False  # GPU only: no CUDA graphs
    cudagraph_capture_sizes: list[int] | None = None  # tokens of a step; None = built-in
    max_cudagraph_capture_size: int | None = None  # no graph for steps of more tokens
    enable_prefix_caching: bool = True
    tokenizer: str | None = None  # folder with tokenizer.json, for grammars; None = the model's
    grammar_compile_timeout_s: float = 10.0  # one grammar; its request fails
    scheduling_policy: str = "fcfs"  # fcfs | priority
    async_scheduling: bool | None = None  # plan a step while the last one runs; None = on a GPU
    seed: int = 0  # for requests that bring none
    num_threads: int | None = None  # CPU compute threads of all ranks; None = see cores.py
    enable_lora: bool = False
    max_loras: int = 8  # with default_pool_rank, the size of the lane pool
    max_lora_rank: int = 256  # an adapter above it is refused
    num_lanes: int | None = None  # None = max_loras * LANE_POOL_RANK
    lora_dtype: str = "auto"  # auto = the model's
    max_cpu_loras: int | None = None  # adapters in host memory; None = as many as host_lora_bytes holds
    host_lora_bytes: int = 4 << 30  # of adapter weights in host memory
    log_format: str = "text"  # of the process's log lines, see log_format.py

    def __post_init__(self) -> None:
        positive = (
            ("tensor_parallel_size", "--tensor-parallel-size"),
            ("max_num_seqs", "--max-num-seqs"),
            ("max_num_batched_tokens", "--max-num-batched-tokens"),
            ("block_size", "--block-size"),
            ("max_loras", "--max-loras"),
            ("max_lora_rank", "--max-lora-rank"),
            ("max_model_len", "--max-model-len"),
            ("num_kv_blocks", "--num-gpu-blocks-override"),
            ("num_threads", "--num-threads"),
            ("kv_cache_bytes", "--kv-cache-bytes"),
            ("max_cpu_loras", "--max-cpu-loras"),
            ("max_cudagraph_capture_size", "--max-cudagraph-capture-size"),
            ("host_lora_bytes", "--host-lora-bytes"),
        )
        for field, flag in positive:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InvalidConfig(f"{flag} must be at least 1, got {value}", param=flag)
        choices: tuple[tuple[str, str, tuple[str | None, ...]], ...] = (
            ("dtype", "--dtype", DTYPES),
            ("lora_dtype", "--lora-dtype", DTYPES),
            ("load_format", "--load-format", LOAD_FORMATS),
            ("quantization", "--quantization", QUANTIZATIONS),
            ("kv_cache_dtype", "--kv-cache-dtype", KV_CACHE_DTYPES),
        )
        for field, flag, allowed in choices:
            value = getattr(self, field)
            if value not in allowed:
                names = ", ".join(name for name in allowed if name is not None)
                raise InvalidConfig(f"{flag} must be one of {names}, got {value!r}", param=flag)
        if self.kernels not in KERNELS:
            message = f"--kernels must be one of {', '.join(KERNELS)}, got {self.kernels!r}"
            raise InvalidConfig(message, param="--kernels")
        if self.attention_backend.lower() not in ATTENTION_BACKENDS:
            names = ", ".join(sorted(set(ATTENTION_BACKENDS.values())))
            message = f"--attention-backend must be one of {names}, got {self.attention_backend!r}"
            if "flash_attn" in self.attention_backend.lower():
                message += "; varlen leads to FlashAttention"
            raise InvalidConfig(message, param="--attention-backend")
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            names, got = " or ".join(SCHEDULING_POLICIES), self.scheduling_policy
            message = f"--scheduling-policy must be {names}, got {got!r}"
            raise InvalidConfig(message, param="--scheduling-policy")
        if not 0.0 < self.grammar_compile_timeout_s < math.inf:
            raise InvalidConfig(
                f"--grammar-compile-timeout must be above 0 seconds, got {self.grammar_compile_timeout_s}",
                param="--grammar-compile-timeout",
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise InvalidConfig(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}",
                param="--gpu-memory-utilization",
            )

    @property
    def attention(self) -> str:
        """auto, triton, torch, varlen or flashinfer."""
        return ATTENTION_BACKENDS[self.attention_backend.lower()]

    @property
    def lane_pool(self) -> int:
        """Lanes (rank rows) of the device pool, a multiple of LANE_GROUP; 0 without LoRA."""
        if not self.enable_lora:
            return 0
        wanted = self.num_lanes or self.max_loras * min(LANE_POOL_RANK, self.max_lora_rank)
        largest = max(wanted, self.max_lora_rank if self.num_lanes is None else LANE_GROUP)
        return -(-largest // LANE_GROUP) * LANE_GROUP


LANE_POOL_RANK = 64  # the pool holds max_loras adapters of this rank; smaller ones pack tighter
