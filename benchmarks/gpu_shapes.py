"""Models as shapes: a folder to start from without weights, and what a step must read and compute."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from random_adapters import write_adapter

from loramux.engine.types import AdapterSpec, LoraSite
from loramux.resolvers.inspect import inspect_adapter

WORD_BYTES: Final = 2  # of bf16


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model."""

    architecture: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    rope_theta: float
    context: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the base's products in a layer: qkv, o, gate and up, down."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, heads + 2 * kv),
            (heads, self.hidden),
            (self.hidden, 2 * self.inner),
            (self.inner, self.hidden),
        ]

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * WORD_BYTES

    @property
    def lane_bytes(self) -> int:
        """Of one rank of an adapter on all linear layers: rows of A of seven sites, columns of B."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        a = 3 * self.hidden + heads + 2 * self.hidden + self.inner
        b = heads + 2 * kv + self.hidden + 2 * self.inner + self.hidden
        return self.layers * (a + b) * WORD_BYTES

    def write(self, folder: Path) -> Path:
        """A model folder without weights: config and a tokenizer of as many words as the model has tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(self.vocab)))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return folder


SHAPES: Final = {
    "llama": Shape("LlamaForCausalLM", "llama", 4096, 32, 32, 8, 128, 14336, 128256, 5e5, 32768),
    "qwen": Shape("Qwen2ForCausalLM", "qwen2", 3584, 28, 28, 4, 128, 18944, 152064, 1e6, 32768),
    "tiny": Shape("LlamaForCausalLM", "llama", 64, 2, 4, 2, 16, 128, 512, 1e4, 1024),
}


def _tokenizer(size: int) -> dict[str, Any]:
    """A tokenizer.json of words; nothing is downloaded."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, size)}}
    special = [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for word, i in vocab.items() if i < 3
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }


@dataclass(frozen=True)
class Machine:
    """What the device can do at best, measured in the run."""

    bytes_per_s: float  # a copy within the device, reads and writes added up
    flops_per_s: float  # a square product in bf16

    def decode_s(self, shape: Shape, rows: int, context: int, ranks: Sequence[int] = ()) -> float:
        """No step of one token a row can be faster.

        Args:
            context: tokens in the KV cache of each row
            ranks: of the distinct adapters in the step
        """
        sites = [*shape.linears * shape.layers, (shape.hidden, shape.vocab)]
        products = sum(
            max(i * o * WORD_BYTES / self.bytes_per_s, 2 * rows * i * o / self.flops_per_s) for i, o in sites
        )
        kv = rows * context * shape.kv_bytes
        return products + (kv + sum(ranks) * shape.lane_bytes) / self.bytes_per_s

    def prefill_s(self, shape: Shape, tokens: int) -> float:
        """No prompt can be computed faster."""
        flops = 2 * tokens * shape.layers * sum(i * o for i, o in shape.linears)
        flops += 2 * shape.layers * tokens**2 * shape.heads * shape.head_dim  # attention, causal
        return flops / self.flops_per_s


class AdapterShelf:
    """As many adapters as wanted, on disk as one file a rank.

    For the engine they differ by the digest alone. For a server, which computes digests, by `lora_alpha`:
    each has a folder with a link to the same file.
    """

    def __init__(self, root: Path, model: Path, sites: dict[str, LoraSite]) -> None:
        self._root, self._model, self._sites = root, model, sites
        self._specs: dict[int, AdapterSpec] = {}
        self._made = 0

    def source(self, rank: int) -> Path:
        """The folder of a rank."""
        folder = self._root / f"rank{rank}"
        return folder if folder.exists() else write_adapter(folder, self._model, rank=rank, seed=rank)

    def specs(self, rank: int, count: int) -> list[AdapterSpec]:
        """New adapters, as the engine takes them."""
        if not count:
            return []
        if rank not in self._specs:
            self._specs[rank] = inspect_adapter(
                self.source(rank), self._sites, max_lora_rank=rank, read_tensors=False
            )
        numbers = range(self._made, self._made + count)
        self._made += count
        return [msgspec.structs.replace(self._specs[rank], digest=f"{i:064x}") for i in numbers]

    def folders(self, rank: int, count: int) -> list[Path]:
        """New adapters, as a server takes them."""
        source = self.source(rank)
        config = json.loads((source / "adapter_config.json").read_text())
        made = []
        for _ in range(count):
            self._made += 1
            folder = self._root / f"adapter{self._made}"
            folder.mkdir()
            os.link(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
            text = json.dumps({**config, "lora_alpha": rank + self._made / 1024})
            (folder / "adapter_config.json").write_text(text)
            made.append(folder)
        return made
