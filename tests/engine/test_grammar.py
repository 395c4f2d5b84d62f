"""Grammars over a tokenizer whose tokens are bytes: masks, walks, compilation beside the step loop."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import tokenizers
from llguidance import LLTokenizer
from tokenizers import decoders, models

from loramux.engine.errors import InvalidRequest, LoramuxError
from loramux.engine.grammar import (
    FilledMasks,
    GrammarMasks,
    GrammarMatcher,
    MaskRow,
    compile_grammar,
    load_tokenizer,
)
from loramux.engine.grammar_compiler import CACHE_TEXT_BYTES, GrammarCompiler
from loramux.engine.types import GrammarSpec
from tests.server.tiny_text import EOS, VOCAB_SIZE, byte_tokenizer

PERSON: dict[str, Any] = {
    "$defs": {
        "tag": {"type": "string", "maxLength": 4},
        "tree": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tag"}]},
    },
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", 3, None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        "either": {
            "anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]
        },
        "tree": {"$ref": "#/$defs/tree"},
    },
    "required": ["name", "age", "kind", "tags", "either", "tree"],
    "additionalProperties": False,
}
SLOW = GrammarSpec("json_schema", '{"type": "integer", "multipleOf": 99991}')  # compiles for almost a second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> LLTokenizer:
    return load_tokenizer(folder)


def schema(value: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


def start(spec: GrammarSpec, tokenizer: LLTokenizer) -> GrammarMatcher:
    matcher = GrammarMatcher("x")
    matcher.start(compile_grammar(spec, tokenizer))
    return matcher


def mask(matcher: GrammarMatcher, tokenizer: LLTokenizer, vocab_size: int = VOCAB_SIZE) -> FilledMasks:
    return GrammarMasks(vocab_size).fill([MaskRow(matcher, [EOS])], tokenizer)


def allowed(filled: FilledMasks) -> list[int]:
    return [int(token) for token in np.flatnonzero(~filled.forbidden[0])]


def walk(spec: GrammarSpec, tokenizer: LLTokenizer, seed: int) -> str:
    """A text of the grammar, each byte drawn at random from those that may follow."""
    draw = random.Random(seed)
    matcher = start(spec, tokenizer)
    text = bytearray()
    while not matcher.is_finished:
        filled = mask(matcher, tokenizer)
        assert not filled.failed
        if filled.ended:
            break
        token = draw.choice(allowed(filled))
        if token == EOS:
            break
        text.append(token)
        matcher.accept(token)
        assert len(text) < 5000
    return text.decode()


@pytest.mark.parametrize("seed", range(12))
def test_every_walk_through_a_schema_is_json_that_fits_it(tokenizer: LLTokenizer, seed: int) -> None:
    text = walk(schema({**PERSON, "x-guidance": {"whitespace_flexible": False}}), tokenizer, seed)

    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-[a-c]+", r"(yes|no)( (yes|no)){2}", r"[^\x00-\x7f]{2}x?", r"^a*$"]
)
def test_every_walk_through_a_regex_matches_it(tokenizer: LLTokenizer, pattern: str) -> None:
    for seed in range(5):
        assert re.fullmatch(pattern, walk(GrammarSpec("regex", pattern), tokenizer, seed))


@pytest.mark.parametrize(
    "grammar", ['root ::= "a" tail\ntail ::= [0-9]{2} "."', 'start: "a" TAIL\nTAIL: /[0-9]{2}\\./']
)
def test_gbnf_and_lark_are_told_apart(tokenizer: LLTokenizer, grammar: str) -> None:
    text = walk(GrammarSpec("ebnf", grammar), tokenizer, 0)

    assert re.fullmatch(r"a\d\d\.", text)


def test_end_tokens_are_allowed_exactly_where_the_text_may_end(tokenizer: LLTokenizer) -> None:
    matcher = start(GrammarSpec("regex", "ab?"), tokenizer)
    before = mask(matcher, tokenizer)
    matcher.accept(ord("a"))
    after = mask(matcher, tokenizer)

    assert allowed(before) == [ord("a")]
    assert allowed(after) == [ord("b"), EOS]
    matcher.accept(ord("b"))
    assert matcher.is_finished
    assert mask(matcher, tokenizer).ended == [0]


def test_special_tokens_are_never_text(tokenizer: LLTokenizer) -> None:
    filled = mask(start(GrammarSpec("regex", r"[\s\S]+"), tokenizer), tokenizer)

    assert max(allowed(filled)) < 256


@pytest.mark.parametrize("vocab_size", [100, VOCAB_SIZE, VOCAB_SIZE + 1, 300, 512])
def test_logits_may_have_more_or_fewer_columns_than_there_are_tokens(
    tokenizer: LLTokenizer, vocab_size: int
) -> None:
    matcher = start(GrammarSpec("regex", "[a-z]+"), tokenizer)
    filled = GrammarMasks(vocab_size).fill([MaskRow(matcher, [])], tokenizer)

    assert filled.forbidden.shape == (1, vocab_size)
    assert allowed(filled) == [token for token in range(ord("a"), ord("z") + 1) if token < vocab_size]


def test_masks_of_many_rows_equal_those_of_each(tokenizer: LLTokenizer) -> None:
    specs = [GrammarSpec("regex", chr(ord("a") + i) + "+") for i in range(20)] + [schema(PERSON)]
    rows = [MaskRow(start(spec, tokenizer), [EOS]) for spec in specs]
    masks = GrammarMasks(VOCAB_SIZE, num_threads=2)

    together = masks.fill(rows, tokenizer).forbidden
    alone = np.concatenate([masks.fill([row], tokenizer).forbidden for row in rows])

    assert np.array_equal(together, alone)


def test_a_row_that_cannot_go_on_harms_no_other(tokenizer: LLTokenizer) -> None:
    dead, alive = (start(GrammarSpec("regex", "ab+"), tokenizer) for _ in range(2))
    dead.accept(ord("z"))
    filled = GrammarMasks(VOCAB_SIZE).fill([MaskRow(dead, [EOS]), MaskRow(alive, [EOS])], tokenizer)

    assert list(filled.failed) == [0]
    assert np.flatnonzero(~filled.forbidden[1]).tolist() == [ord("a")]


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        (GrammarSpec("regex", "("), "unclosed group"),
        (GrammarSpec("regex", r"[^\s\S]"), "no text can match"),
        (GrammarSpec("regex", "(" * 5000 + ")" * 5000), "invalid regex"),
        (GrammarSpec("lark", "start: missing"), "missing"),
        (GrammarSpec("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
        (GrammarSpec("ebnf", "root ::= missing"), "missing"),
        (GrammarSpec("json_schema", "{"), "cannot be used"),
        (schema({"type": "strange"}), "strange"),
        (schema({"$ref": "#"}), "no text can match"),
        (schema({"$ref": "http://example.com/schema.json"}), "example.com"),
        (schema({"$ref": "file:///etc/passwd"}), "passwd"),
        (schema({"type": "string", "minLength": 5, "maxLength": 3}), "minLength"),
        (schema({"type": "string", "not": {"const": "x"}}), "not"),
        (schema({"type": "string", "pattern": "("}), "unclosed"),
        (GrammarSpec("json_schema", '{"items":' * 1000 + "{}" + "}" * 1000), "recursion"),
    ],
)
def test_a_bad_grammar_is_refused_with_a_reason(
    tokenizer: LLTokenizer, spec: GrammarSpec, fragment: str
) -> None:
    with pytest.raises(InvalidRequest, match=fragment) as caught:
        compile_grammar(spec, tokenizer)

    assert len(caught.value.message) < 400


def test_a_model_without_tokenizer_refuses_grammars(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cuts_or_pads_makes_no_difference(folder: Path, tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))

    cut = load_tokenizer(tmp_path)

    assert (cut.vocab_size, cut.eos_token) == (VOCAB_SIZE + 1, VOCAB_SIZE)
    assert walk(GrammarSpec("regex", "(ab){40}"), cut, 0) == "ab" * 40


def piece_vocabulary() -> dict[str, int]:
    """Pieces as SentencePiece writes them, and a byte for everything else."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcd",
        "ab",
        "cd",
        "\u2581cd",
    ]
    return {piece: index for index, piece in enumerate(pieces)}


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(
            vocab=piece_vocabulary(), merges=[("a", "b"), ("c", "d")], byte_fallback=True, unk_token="<unk>"
        ),
        models.Unigram([(piece, -1.0) for piece in piece_vocabulary()], unk_id=0, byte_fallback=True),
    ],
)
def test_tokenizers_of_pieces_work_like_those_of_bytes(tmp_path: Path, model: Any) -> None:
    backend = tokenizers.Tokenizer(model)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    matcher = start(GrammarSpec("regex", "ab cd é{2}"), tokenizer)
    token_ids: list[int] = []

    while not matcher.is_finished:
        token_ids.append(allowed(mask(matcher, tokenizer, len(piece_vocabulary())))[-1])
        matcher.accept(token_ids[-1])

    assert backend.decode(token_ids) == "ab cd éé"
    assert max(token_ids) > 258  # pieces, not only bytes


def test_a_tokenizer_that_grammars_cannot_read_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(InvalidRequest, match="cannot be used for grammars"):
        load_tokenizer(tmp_path)


class Waiting:
    """A compiler, and what its step loop would see."""

    def __init__(self, folder: Path, timeout_s: float = 30.0) -> None:
        self.compiler = GrammarCompiler(folder, timeout_s=timeout_s)
        self.failures: list[tuple[str, LoramuxError]] = []

    def until(self, *matchers: GrammarMatcher) -> None:
        """Step until each matcher is ready or has failed."""
        for _ in range(3000):
            self.failures += self.compiler.advance()
            failed = {request_id for request_id, _ in self.failures}
            if all(matcher.is_ready or matcher.request_id in failed for matcher in matchers):
                return
            self.compiler.wait(0.02)
        raise AssertionError("nothing came of it")


@pytest.fixture
def waiting(folder: Path) -> Iterator[Waiting]:
    made = Waiting(folder)
    yield made
    made.compiler.close()


def test_a_grammar_becomes_ready_in_the_background_and_is_known_afterwards(waiting: Waiting) -> None:
    spec = GrammarSpec("regex", "a+")
    first, second = waiting.compiler.open("1", spec), waiting.compiler.open("2", spec)
    was_ready = first.is_ready
    waiting.until(first, second)
    third = waiting.compiler.open("3", spec)

    assert not was_ready
    assert third.is_ready
    assert waiting.compiler.advance() == []


def test_copies_of_one_grammar_go_their_own_ways(waiting: Waiting) -> None:
    spec = GrammarSpec("regex", "ab|cd")
    first, second = waiting.compiler.open("1", spec), waiting.compiler.open("2", spec)
    waiting.until(first, second)
    tokenizer = waiting.compiler.tokenizer
    assert tokenizer is not None

    first.accept(ord("a"))

    assert allowed(mask(first, tokenizer)) == [ord("b")]
    assert allowed(mask(second, tokenizer)) == [ord("a"), ord("c")]


def test_a_bad_grammar_fails_those_who_asked_for_it_only(waiting: Waiting) -> None:
    good = waiting.compiler.open("good", GrammarSpec("regex", "a+"))
    bad = [waiting.compiler.open(name, GrammarSpec("regex", "(")) for name in ("bad1", "bad2")]
    waiting.until(good, *bad)
    after = waiting.compiler.open("after", GrammarSpec("regex", "b+"))
    waiting.until(after)

    assert good.is_ready
    assert after.is_ready
    assert sorted(request_id for request_id, _ in waiting.failures) == ["bad1", "bad2"]
    assert all(isinstance(error, InvalidRequest) for _, error in waiting.failures)


def test_a_slow_grammar_is_given_up_and_others_go_on(folder: Path) -> None:
    waiting = Waiting(folder, timeout_s=0.1)
    slow = [
        waiting.compiler.open(f"slow{i}", msgspec.structs.replace(SLOW, text=SLOW.text + " " * i))
        for i in range(2)
    ]
    waiting.until(*slow)
    after = waiting.compiler.open("after", GrammarSpec("regex", "b+"))
    waiting.until(after)
    waiting.compiler.close()

    assert after.is_ready
    assert [request_id for request_id, _ in waiting.failures] == ["slow0", "slow1"]
    assert "--grammar-compile-timeout" in waiting.failures[0][1].message


def test_known_grammars_are_bounded(waiting: Waiting) -> None:
    size = CACHE_TEXT_BYTES // 4
    specs = [
        GrammarSpec("json_schema", json.dumps({"type": "null", "title": str(i) * size})) for i in range(6)
    ]
    for spec in specs:
        waiting.until(waiting.compiler.open("x", spec))

    assert waiting.compiler.open("new", specs[-1]).is_ready
    assert not waiting.compiler.open("old", specs[0]).is_ready
