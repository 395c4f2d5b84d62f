"""The tokenizer's wrapper: BOS, special tokens, bytes of tokens, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend

from loramux.engine.errors import InvalidConfig
from loramux.server.tokenizer import Tokenizer
from tests.server.tiny_text import BOS, END, EOS, START, byte_tokenizer, tiny_tokenizer, write_text_model


def test_folder_gives_ids_of_named_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_text_model(tmp_path))

    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    assert tokenizer.vocab_size == 260


def test_special_tokens_in_a_text_are_encoded_as_such() -> None:
    assert tiny_tokenizer().encode("<|start|>a<|end|>") == [START, 97, END]


@pytest.mark.parametrize(("add_bos", "ids"), [(None, [97]), (True, [BOS, 97]), (False, [97])])
def test_add_bos_token_of_the_config_is_obeyed(add_bos: bool | None, ids: list[int]) -> None:
    tokenizer = tiny_tokenizer() if add_bos is None else tiny_tokenizer(add_bos_token=add_bos)

    assert tokenizer.encode("a") == ids
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_bos_of_the_post_processor_is_neither_doubled_nor_kept_against_the_config() -> None:
    backend = byte_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    config = {"bos_token": "<|bos|>"}

    assert Tokenizer(backend, config).encode("a") == [BOS, 97]
    assert Tokenizer(backend, {**config, "add_bos_token": True}).encode("a") == [BOS, 97]
    assert Tokenizer(backend, {**config, "add_bos_token": False}).encode("a") == [97]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))

    assert len(Tokenizer.from_folder(tmp_path).encode("abcdefgh")) == 8


def test_bytes_of_byte_level_tokens_join_to_the_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "a é\n🌿 \t"

    assert b"".join(tokenizer.token_bytes(id_) for id_ in tokenizer.encode(text)).decode() == text
    assert tokenizer.token_bytes(END) == b"<|end|>"
    assert tokenizer.token_text(0xC3) == "\ufffd"
    assert tokenizer.token_bytes(99999) == b""


def test_bytes_of_sentencepiece_tokens_keep_the_space() -> None:
    backend = Backend(models.BPE(vocab={"▁the": 0, "<0xC3>": 1, "x": 2}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.add_tokens([AddedToken("new word")])
    tokenizer = Tokenizer(backend, {})

    assert [tokenizer.token_bytes(id_) for id_ in range(4)] == [b" the", b"\xc3", b"x", b"new word"]


@pytest.mark.parametrize(
    ("file", "fragment"),
    [
        (None, "no tokenizer.json"),
        ("tokenizer.model", "save_pretrained"),
        ("adapter_config.json", "LoRA adapter"),
        ("tokenizer.json", "cannot be read"),
    ],
)
def test_folder_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, file: str | None, fragment: str
) -> None:
    if file is not None:
        (tmp_path / file).write_text("no")

    with pytest.raises(InvalidConfig, match=fragment):
        Tokenizer.from_folder(tmp_path)
