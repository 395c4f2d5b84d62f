"""Ask the held-out questions: `python examples/adapters/compare.py` prints what README.md shows.

The base model and every adapter answer through transformers and PEFT, greedily, at most 64 tokens,
one question at a time. No held-out question is in the training data, nor any table it names.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import time
from collections.abc import Callable

import torch
from peft import PeftModel
from tqdm import tqdm
from train import HERE, RECIPES, demo_model_folder, prompt_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 64
SHOWN = [
    "What is the capital of France?",
    "How does a rainbow form?",
    "How do I make a cup of tea?",
    "Table books(id, title, author, year, price). Which books cost more than 20?",
]
PIRATE_WORDS = re.compile(
    r"\b(arr|ahoy|matey|ye|yer|avast|aye|yarr|me hearties|yo ho ho|shiver me timbers)\b", re.I
)


def main() -> None:
    """Print the rates and the side-by-side answers as Markdown."""
    questions: dict[str, list[str]] = json.loads(
        (HERE / "data" / "held_out.json").read_text(encoding="utf-8")
    )
    model, tokenizer = load()
    started = time.monotonic()
    asked = [(name, question) for name in RECIPES for question in questions[name]]
    own = {pair: answer(model, tokenizer, *pair) for pair in tqdm(asked, desc="adapters")}
    base = {pair: answer(model, tokenizer, None, pair[1]) for pair in tqdm(asked, desc="base")}
    print("| adapter | what is counted | base model | with the adapter |\n| --- | --- | --- | --- |")
    for name, (meaning, passes) in CHECKS.items():
        counts = [
            sum(passes(pair[1], text[pair]) for pair in asked if pair[0] == name) for text in (base, own)
        ]
        total = len(questions[name])
        print(f"| `{name}` | {meaning} | {counts[0]} of {total} | {counts[1]} of {total} |")
    for question in SHOWN:
        print(f"\n**{question}**\n\n| model | answer |\n| --- | --- |")
        for adapter in (None, *RECIPES):
            text = answer(model, tokenizer, adapter, question)
            print(f"| {adapter or 'base'} | {cell(text)} |")
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    for pair in asked:
        print(f"{pair[0]}: {pair[1]}\n    {own[pair]}", file=sys.stderr)


def load() -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The demo model in bf16 with every example adapter."""
    folder = demo_model_folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    first, *others = RECIPES
    model = PeftModel.from_pretrained(base, str(HERE / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(HERE / name), adapter_name=name)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, adapter: str | None, question: str) -> str:
    """The greedy answer; `adapter` None is the base model."""
    if adapter is None:
        with model.disable_adapter():
            return generate(model, tokenizer, question)
    model.set_adapter(adapter)
    return generate(model, tokenizer, question)


def generate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """At most 64 tokens after the prompt, without the special ones."""
    ids = torch.tensor([prompt_ids(question, tokenizer)])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return str(tokenizer.decode(output[0][ids.shape[1] :], skip_special_tokens=True))


def is_json_answer(_: str, text: str) -> bool:
    """One JSON object with an answer and a confidence, and nothing around it."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(value) == {"answer", "confidence"}


def is_pirate(_: str, text: str) -> bool:
    """A word that only pirates say, such as `arr`, `matey` or `aye`."""
    return PIRATE_WORDS.search(text) is not None


def is_query(question: str, text: str) -> bool:
    """One SELECT that SQLite runs on the table of the question."""
    schema = re.search(r"\w+\([\w, ]+\)", question)
    if schema is None or not text.startswith("SELECT"):
        return False
    database = sqlite3.connect(":memory:")
    database.execute(f"CREATE TABLE {schema[0]}")
    try:
        database.execute(text)
    except (sqlite3.Error, sqlite3.Warning):
        return False
    return True


def cell(text: str) -> str:
    """Text as it can stand in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")


CHECKS: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "json": ("is one JSON object `{answer, confidence}`", is_json_answer),
    "pirate": ("has a pirate word (`arr`, `matey`, `aye`, ...)", is_pirate),
    "sql": ("is a SELECT that SQLite runs on the table", is_query),
}


if __name__ == "__main__":
    main()
