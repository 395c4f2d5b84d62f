"""Grammars in a running engine: what is sampled, and who is left alone.

The tiny model's tokens are bytes, with more columns in its logits than its tokenizer has tokens; what
depends on how real models write is tried on the demo model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.errors import InvalidRequest, LoramuxError
from loramux.engine.types import GrammarSpec, Request, SequenceOutput, TokenSampling
from loramux.resolvers.inspect import inspect_adapter
from loramux.server.structured import (
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from loramux.server.tokenizer import Tokenizer
from tests.demo import demo_model_folder
from tests.server.tiny_text import EOS, VOCAB_SIZE, byte_tokenizer
from tests.tiny_models import make_adapter, make_tiny

DEMO_EOS = [2, 0]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
PROMPT = "A person as JSON:"


class Results:
    """What requests ended with, by id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.token_ids: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}
        self.outputs: dict[str, list[SequenceOutput]] = {}
        self.failures: dict[str, LoramuxError] = {}

    def text(self, name: str) -> str:
        """Everything that was generated, without end tokens."""
        return self._tokenizer.decode(
            [token for token in self.token_ids[name] if token not in (*DEMO_EOS, EOS)]
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny("llama", tmp_path_factory.mktemp("models") / "bytes", vocab_size=VOCAB_SIZE + 12)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    made = Engine(EngineConfig(model=str(folder), num_kv_blocks=400, enable_lora=True))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    made = Engine(EngineConfig(model=str(demo_model_folder()), max_model_len=256))
    yield made
    made.close()


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_model_folder())


@pytest.fixture(scope="module")
def adapter(engine: Engine, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make_adapter(folder, tmp_path_factory.mktemp("adapter") / "a", r=8, targets=["q_proj", "v_proj"])
    spec = inspect_adapter(made, engine.info.lora_sites, max_lora_rank=256)
    engine.load_adapter(spec)
    return spec.digest


def add(
    engine: Engine,
    tokenizer: Tokenizer,
    name: str,
    grammar: GrammarSpec | None,
    *,
    prompt: str = PROMPT,
    adapter: str | None = None,
    **sampling: Any,
) -> None:
    options = {"max_tokens": 48, "seed": 1, "eos_token_ids": [EOS], **sampling}
    engine.add_request(
        Request(
            request_id=name,
            prompt_token_ids=tokenizer.encode(prompt),
            sampling=TokenSampling(grammar=grammar, **options),
            adapter=adapter,
        )
    )


def run(engine: Engine, tokenizer: Tokenizer) -> Results:
    results = Results(tokenizer)
    while engine.has_work():
        for output in engine.step():
            results.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
            results.outputs.setdefault(output.request_id, []).append(output)
            if output.finish_reason is not None:
                results.reasons[output.request_id] = output.finish_reason
        results.failures |= dict(engine.take_failures())
        engine.scheduler.check_invariants()
    return results


def test_json_parses_whenever_it_ends_by_itself(demo: Engine, demo_tokenizer: Tokenizer) -> None:
    for seed in range(12):
        grammar = json_object_grammar()
        add(demo, demo_tokenizer, str(seed), grammar, seed=seed, max_tokens=48, eos_token_ids=DEMO_EOS)
    results = run(demo, demo_tokenizer)

    ended = [name for name, reason in results.reasons.items() if reason == "stop"]
    assert len(ended) >= 2
    for name in ended:
        assert isinstance(json.loads(results.text(name)), dict)


def test_answers_fit_their_schema(demo: Engine, demo_tokenizer: Tokenizer) -> None:
    for seed in range(8):
        grammar = json_schema_grammar(PERSON)
        add(demo, demo_tokenizer, str(seed), grammar, seed=seed, max_tokens=120, eos_token_ids=DEMO_EOS)
    results = run(demo, demo_tokenizer)

    ended = [name for name, reason in results.reasons.items() if reason == "stop"]
    assert len(ended) >= 6
    for name in ended:
        jsonschema.validate(json.loads(results.text(name)), PERSON)


def test_answers_of_a_model_that_knows_nothing_fit_their_schema(engine: Engine, tokenizer: Tokenizer) -> None:
    for seed in range(100):
        grammar = json_schema_grammar(PERSON, whitespace=None)
        add(engine, tokenizer, str(seed), grammar, seed=seed, max_tokens=200)
    results = run(engine, tokenizer)

    assert set(results.reasons.values()) == {"stop"}
    for name in results.reasons:
        jsonschema.validate(json.loads(results.text(name)), PERSON)


def test_regexes_choices_and_grammars_hold_in_one_batch(engine: Engine, tokenizer: Tokenizer) -> None:
    for seed in range(4):
        add(engine, tokenizer, f"regex{seed}", regex_grammar(r"\d{3}-\d{4}( ext \d)?"), seed=seed)
        add(engine, tokenizer, f"choice{seed}", choice_grammar(["yes", "no", "dünn\n"]), seed=seed)
        add(
            engine,
            tokenizer,
            f"lark{seed}",
            lark_grammar('start: W (" " W){2} "."\nW: /[a-z]{2,5}/'),
            seed=seed,
        )
    results = run(engine, tokenizer)

    assert set(results.reasons.values()) == {"stop"}
    for seed in range(4):
        assert re.fullmatch(r"\d{3}-\d{4}( ext \d)?", results.text(f"regex{seed}"))
        assert results.text(f"choice{seed}") in ("yes", "no", "dünn\n")
        assert re.fullmatch(r"[a-z]{2,5}( [a-z]{2,5}){2}\.", results.text(f"lark{seed}"))


def test_rows_without_grammar_answer_as_if_there_were_no_others(
    engine: Engine, tokenizer: Tokenizer, adapter: str
) -> None:
    def plain() -> None:
        add(engine, tokenizer, "greedy", None, temperature=0.0, logprobs=3)
        add(engine, tokenizer, "drawn", None, seed=5)
        add(engine, tokenizer, "adapter", None, adapter=adapter, seed=6)

    plain()
    alone = run(engine, tokenizer)
    for seed in range(5):
        add(engine, tokenizer, f"json{seed}", json_object_grammar(), seed=seed)
    plain()
    add(engine, tokenizer, "both", choice_grammar(["left", "right"]), adapter=adapter)
    mixed = run(engine, tokenizer)

    for name in ("greedy", "drawn", "adapter"):
        assert mixed.token_ids[name] == alone.token_ids[name]
    assert mixed.text("both") in ("left", "right")
    drawn = [out.logprobs[0].token_ids for out in mixed.outputs["greedy"] if out.logprobs]
    assert drawn == [out.logprobs[0].token_ids for out in alone.outputs["greedy"] if out.logprobs]


def test_a_preempted_sequence_goes_on_in_its_grammar(
    folder: Path, tokenizer: Tokenizer, engine: Engine
) -> None:
    def several(target: Engine) -> Results:
        for seed in range(6):
            add(target, tokenizer, str(seed), json_schema_grammar(PERSON, whitespace=None), seed=seed)
        return run(target, tokenizer)

    calm = several(engine)
    crowded = Engine(
        EngineConfig(model=str(folder), max_model_len=128, num_kv_blocks=12, max_num_batched_tokens=16)
    )
    try:
        squeezed = several(crowded)
        assert crowded.scheduler.num_preemptions > 0
    finally:
        crowded.close()

    assert squeezed.token_ids == calm.token_ids
    assert squeezed.reasons == calm.reasons


def test_a_bad_grammar_fails_its_own_request_only(engine: Engine, tokenizer: Tokenizer) -> None:
    add(engine, tokenizer, "before", choice_grammar(["yes", "no"]))
    add(engine, tokenizer, "bad", regex_grammar("("))
    add(engine, tokenizer, "plain", None, max_tokens=5)
    add(engine, tokenizer, "after", choice_grammar(["yes", "no"]), seed=2)
    results = run(engine, tokenizer)

    assert list(results.failures) == ["bad"]
    assert isinstance(results.failures["bad"], InvalidRequest)
    assert set(results.reasons) == {"before", "plain", "after"}


def test_a_grammar_that_gets_too_complex_fails_its_own_request_only(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    bomb = lark_grammar('start: x{0,1000}\nx: y{0,1000}\ny: z{0,1000}\nz: "a" | "b"')
    add(engine, tokenizer, "bomb", bomb)
    add(engine, tokenizer, "good", choice_grammar(["yes", "no"]))
    results = run(engine, tokenizer)

    assert results.text("good") in ("yes", "no")
    assert "bomb" in results.failures or set(results.text("bomb")) <= {"a", "b"}


def test_other_fields_that_leave_no_token_are_an_error(engine: Engine, tokenizer: Tokenizer) -> None:
    add(engine, tokenizer, "none", choice_grammar(["yes", "no"]), allowed_token_ids=tokenizer.encode("maybe"))
    add(engine, tokenizer, "some", choice_grammar(["yes", "no"]), allowed_token_ids=tokenizer.encode("no"))
    results = run(engine, tokenizer)

    assert "allowed_token_ids" in results.failures["none"].message
    assert results.text("some") == "no"


def test_a_bias_chooses_between_what_is_allowed(engine: Engine, tokenizer: Tokenizer) -> None:
    add(engine, tokenizer, "x", choice_grammar(["yes", "no"]), logit_bias={ord("n"): 50.0, ord("!"): 100.0})

    assert run(engine, tokenizer).text("x") == "no"


@pytest.mark.parametrize("eos", [[EOS], []])
def test_a_complete_text_ends_whatever_min_tokens_and_eos_say(
    engine: Engine, tokenizer: Tokenizer, eos: list[int]
) -> None:
    add(engine, tokenizer, "short", choice_grammar(["yes"]), min_tokens=20, eos_token_ids=eos)
    add(engine, tokenizer, "open", regex_grammar("(ab)+"), min_tokens=20, max_tokens=24, eos_token_ids=eos)
    add(engine, tokenizer, "empty", regex_grammar(""), eos_token_ids=eos)
    results = run(engine, tokenizer)

    assert (results.text("short"), results.reasons["short"]) == ("yes", "stop")
    assert (results.text("empty"), results.reasons["empty"]) == ("", "stop")
    assert len(results.token_ids["open"]) >= 20
    assert re.fullmatch(r"(ab)*a?", results.text("open"))


def test_a_stop_token_may_end_a_complete_text(engine: Engine, tokenizer: Tokenizer) -> None:
    dot = ord(".")
    add(engine, tokenizer, "x", regex_grammar("[0-9]+"), stop_token_ids=[dot], logit_bias={dot: 100.0})
    output = run(engine, tokenizer).outputs["x"]

    assert output[-1].finish_reason == "stop"
    assert output[-1].stop_reason == dot
    assert output[-1].token_ids == [dot]
    assert len(output) == 2  # one digit first: nothing is not a number


def test_log_probabilities_are_those_of_the_model(engine: Engine, tokenizer: Tokenizer) -> None:
    add(engine, tokenizer, "free", None, temperature=0.0, max_tokens=1, logprobs=5)
    (best,) = (out.token_ids[0] for out in run(engine, tokenizer).outputs["free"])
    other = "b" if best == ord("a") else "a"
    add(engine, tokenizer, "free", None, temperature=0.0, max_tokens=1, logprobs=5)
    add(engine, tokenizer, "held", regex_grammar(other), temperature=0.0, max_tokens=1, logprobs=5)
    results = run(engine, tokenizer)

    (free,) = results.outputs["free"][0].logprobs or []
    (held,) = results.outputs["held"][0].logprobs or []
    assert held.token_ids[1:] == free.token_ids[1:]
    assert held.token_ids[0] == ord(other)
    assert held.rank > 1


def test_choices_of_one_call_share_a_prompt_and_not_a_place_in_the_grammar(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    for seed in range(8):
        add(engine, tokenizer, str(seed), regex_grammar("[a-z]{12}"), prompt=PROMPT * 20, seed=seed)
    results = run(engine, tokenizer)

    texts = {results.text(str(seed)) for seed in range(8)}
    assert all(re.fullmatch("[a-z]{12}", text) for text in texts)
    assert len(texts) > 1


def test_a_model_without_tokenizer_fails_the_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    engine = Engine(EngineConfig(model=str(make_tiny("llama", tmp_path, vocab_size=VOCAB_SIZE))))
    try:
        add(engine, tokenizer, "x", choice_grammar(["yes"]), max_tokens=4)
        results = run(engine, tokenizer)
    finally:
        engine.close()

    assert "tokenizer.json" in results.failures["x"].message
