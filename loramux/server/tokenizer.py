"""Text to token ids and back, from a model folder's tokenizer.json.

Special tokens that stand in a text as plain characters are encoded as special tokens, as Hugging Face
tokenizers do: the chat template needs it for its own marks. `plain_text` keeps messages from using it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec
import tokenizers

from loramux.engine.errors import InvalidConfig
from loramux.server.generation_config import read_json_object

_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PIECE_CACHE: Final = 65536

_LONG: Final = 4096  # characters or ids; handling more takes milliseconds


def encode_text(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text. Only a batch lets other threads run meanwhile: a megabyte takes a second."""
    if len(text) <= _LONG:
        short: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return short
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


class Tokenizer:
    """A model's tokenizer with what tokenizer_config.json adds to it."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._add_bos: bool | None = config.get("add_bos_token")
        self.config = config  # tokenizer_config.json
        self.special_tokens = _special_tokens(config)  # bos_token, eos_token, ... -> text
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.control_tokens = {  # text -> id
            token.content: id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._special_ids = frozenset(self.control_tokens.values())
        self._is_byte_level = (
            '"ByteLevel"'
            in msgspec.json.encode(msgspec.json.decode(backend.to_str()).get("decoder")).decode()
        )
        self.token_bytes = lru_cache(_PIECE_CACHE)(self._token_bytes)
        longest = max((len(piece) for piece in backend.get_vocab()), default=1)
        self.max_token_chars = max(longest, 1)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json.

        Raises:
            InvalidConfig: there is no tokenizer.json, or it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            hint = ""
            if (folder / "adapter_config.json").is_file():
                hint = "; the folder holds a LoRA adapter, not a model"
            elif any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
                hint = "; convert the tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            raise InvalidConfig(f"no tokenizer.json in {folder}{hint}", param="--tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InvalidConfig(f"{path} cannot be read: {error}", param="--tokenizer") from error
        return cls(backend, read_json_object(folder / "tokenizer_config.json"))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def definition(self) -> str:
        """What tokenizer.json says, as its JSON text."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts what the model expects around it (BOS)."""
        ids = encode_text(self._backend, text, add_special_tokens=add_special_tokens)
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and self._add_bos is not None:
            has_bos = ids[:1] == [bos]
            if self._add_bos and not has_bos:
                return [bos, *ids]
            if not self._add_bos and has_bos and not text.startswith(self.special_tokens["bos_token"]):
                return ids[1:]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids without a token give nothing, broken UTF-8 gives U+FFFD."""
        ids = list(token_ids)
        if len(ids) <= _LONG:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, such as the end of a turn."""
        return token_id in self._special_ids

    def token_id(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary writes it."""
        return self._backend.token_to_id(piece)

    def token(self, token_id: int) -> str:
        """The piece as the vocabulary writes it, "" for an id without one."""
        return self._backend.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        """The text that one token stands for; U+FFFD where it is only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text, a leading space included."""
        piece = self.token(token_id)
        if token_id in self._special_ids or not piece:
            return piece.encode()
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in piece):
                return bytes(_BYTE_OF_CHAR[char] for char in piece)
            return piece.encode()  # an added token, written as it is
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json, each a text or an object with one."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, reversed.

    Printable bytes stand for themselves, the others for U+0100 onwards. Source: GPT-2's encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR: Final = _byte_alphabet()
