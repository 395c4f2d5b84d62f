"""A model folder with text but no weights: a tokenizer whose ids are bytes, and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from loramux.server.tokenizer import Tokenizer

BOS, EOS, START, END = 256, 257, 258, 259
VOCAB_SIZE: Final = 260
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "<|start|>{{ message.role }}: {{ message.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte -> the byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Token id = byte; four special tokens above."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|bos|>", "<|eos|>", "<|start|>", "<|end|>")
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def tiny_tokenizer(**config: Any) -> Tokenizer:
    """The same, as the server wraps it."""
    return Tokenizer(byte_tokenizer(), {"bos_token": "<|bos|>", "eos_token": "<|eos|>", **config})


def write_text_model(folder: Path, **generation_config: Any) -> Path:
    """Everything of a model folder but weights."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    files = {
        "config.json": {"architectures": ["FakeForCausalLM"], "eos_token_id": EOS},
        "generation_config.json": {"eos_token_id": [EOS, END], **generation_config},
        "tokenizer_config.json": {
            "bos_token": "<|bos|>",
            "eos_token": {"content": "<|eos|>"},
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder
