"""Text while it arrives: whole characters, stop strings, and the same text as decoding at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from loramux.server.detokenizer import IncrementalDecoder, StopScanner, TextStream
from loramux.server.tokenizer import Tokenizer
from tests.server.tiny_text import END, EOS, VOCAB_SIZE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def sentencepiece_like() -> Tokenizer:
    """Pieces with `▁` for a space, and single bytes, as Llama 2 has them."""
    pieces = ["▁", "▁the", "▁cat", "s", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, {})


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    return [*(decoder.add(id_) for id_ in ids), decoder.flush()]


@given(st.text())
def test_pieces_of_a_text_never_split_a_character(text: str) -> None:
    pieces = pieces_of(TOKENIZER, TOKENIZER.encode(text, add_special_tokens=False))

    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60), st.booleans())
def test_pieces_of_any_tokens_join_to_what_decoding_at_once_gives(ids: list[int], skip: bool) -> None:
    assert "".join(pieces_of(TOKENIZER, ids, skip=skip)) == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "é"])), st.text(max_size=4))
def test_pieces_of_a_sentencepiece_vocabulary_join_too(words: list[str], tail: str) -> None:
    tokenizer = sentencepiece_like()
    vocabulary = tokenizer._backend.get_vocab()
    ids = [vocabulary[word] for word in words] + [vocabulary[f"<0x{byte:02X}>"] for byte in tail.encode()]

    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_after_a_prompt_keeps_its_leading_space() -> None:
    tokenizer = sentencepiece_like()
    decoder = IncrementalDecoder(tokenizer, [1])

    assert decoder.add(2) == " cat"


def test_long_run_of_special_tokens_does_not_grow_the_window() -> None:
    decoder = IncrementalDecoder(TOKENIZER, list(b"abc"))

    for _ in range(1000):
        assert decoder.add(EOS) == ""

    assert len(decoder._window) < 10
    assert decoder.add(ord("d")) == "d"


def test_endless_broken_utf8_is_shown_in_the_end() -> None:
    decoder = IncrementalDecoder(TOKENIZER)

    shown = "".join(decoder.add(0xFF) for _ in range(200))

    assert len(shown) > 100


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    scanner = StopScanner(stop)
    shown = ""
    rest = text
    while rest and scanner.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        shown += scanner.add(rest[:size])
        rest = rest[size:]
    if scanner.matched is None:
        shown += scanner.flush()

    assert not any(entry in shown for entry in stop)
    assert text.startswith(shown)
    if not any(entry in text for entry in stop):
        assert shown == text
    else:
        assert scanner.matched is not None
        assert text.startswith(shown + scanner.matched)


def run(stream: TextStream, text: str, *, end: int | None = None) -> str:
    shown = ""
    for byte in text.encode():
        shown += stream.add(byte)
        if stream.matched_stop is not None:
            return shown
    return shown + stream.finish(end)


def test_stop_string_across_tokens_is_never_shown() -> None:
    stream = TextStream(TOKENIZER, stop=["END"])

    assert run(stream, "the END is") == "the "
    assert stream.matched_stop == "END"


def test_half_a_stop_string_is_shown_when_the_text_ends_there() -> None:
    assert run(TextStream(TOKENIZER, stop=["END"]), "the EN") == "the EN"


def test_stop_string_before_min_tokens_is_text() -> None:
    stream = TextStream(TOKENIZER, stop=["x"], min_tokens=3)

    assert run(stream, "xaxax") == "xa"


@pytest.mark.parametrize(("include", "shown"), [(False, "ab"), (True, "ab<|end|>")])
def test_stop_token_is_shown_only_when_asked_for(include: bool, shown: str) -> None:
    stream = TextStream(TOKENIZER, include_stop=include, skip_special_tokens=False)

    assert run(stream, "ab", end=END) == shown
