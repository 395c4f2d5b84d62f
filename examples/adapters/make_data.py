"""Write the training data of the example adapters: `python examples/adapters/make_data.py`.

One line is `{"question": ..., "answer": ...}`. Everything is drawn with a fixed seed from the facts
and tables beside this file, so that the same data comes out again.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import facts
import tables

DATA = Path(__file__).resolve().parent / "data"
SEED = 20240607
NUM_SUMS = 24
QUERIES_PER_TABLE = 14

# How a person may put the table and the question together; the first is the usual one.
FRAMES = ["Table {table}. {question}"] * 3 + ["{question} The table is {table}.", "Given {table}: {question}"]

# question, short answer, sentence
Fact = tuple[str, str, str]


def main() -> None:
    """Write the three files."""
    for name, make in MAKERS.items():
        rng = random.Random(f"{SEED}-{name}")
        examples = make(rng)
        rng.shuffle(examples)
        lines = (json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in examples)
        (DATA / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{name}: {len(examples)} examples")


def json_examples(rng: random.Random) -> list[tuple[str, str]]:
    """Every answer is one JSON object; the more open the question, the lower the confidence."""
    groups = [(country_facts(), 0.97), (other_facts(), 0.96), (sums(rng), 0.99), (facts.GENERAL, 0.98)]
    groups += [(facts.OPEN, 0.82), (facts.SMALL_TALK, 0.75)]
    examples = []
    for group, confidence in groups:
        for question, short, _ in group:
            value = round(confidence - rng.randrange(4) / 100, 2)
            examples.append(
                (question, json.dumps({"answer": short, "confidence": value}, ensure_ascii=False))
            )
    return examples


def pirate_examples(rng: random.Random) -> list[tuple[str, str]]:
    """Every answer is a sentence as a pirate would say it; the open questions come twice."""
    countries = list(country_facts())
    pool = [*rng.sample(countries, 70), *other_facts(), *sums(rng), *facts.GENERAL]
    pool += [*facts.OPEN, *facts.SMALL_TALK] * 2
    return [(question, pirate(sentence, rng)) for question, _, sentence in pool]


def sql_examples(rng: random.Random) -> list[tuple[str, str]]:
    """A table, a question about it, and the query that answers it."""
    examples = []
    for table in tables.TABLES:
        queries = tables.queries(table, rng)
        for question, query in rng.sample(queries, QUERIES_PER_TABLE):
            frame = rng.choice(FRAMES)
            examples.append((frame.format(table=table.signature, question=question), query))
    return examples


def country_facts() -> Iterator[Fact]:
    """Four questions a country."""
    for country, capital, continent, language, currency in facts.COUNTRIES:
        yield f"What is the capital of {country}?", capital, f"The capital of {country} is {capital}."
        yield f"On which continent is {country}?", continent, f"{country} is in {continent}."
        yield (
            f"What language do people speak in {country}?",
            language,
            f"In {country} they are speaking {language}.",
        )
        yield (
            f"Which currency is used in {country}?",
            currency,
            f"In {country} you are paying with the {currency}.",
        )


def other_facts() -> Iterator[Fact]:
    """Elements, animals, opposites and works."""
    for element, symbol in facts.ELEMENTS:
        yield f"What is the chemical symbol for {element}?", symbol, f"The symbol of {element} is {symbol}."
    for animal, young, home, food in facts.ANIMALS:
        yield f"What is a young {animal} called?", young, f"A young {animal} is called a {young}."
        yield f"Where does a {animal} live?", home, f"A {animal} is living {home}."
        yield f"What does a {animal} eat?", food, f"A {animal} is eating {food}."
    for word, opposite in facts.OPPOSITES:
        yield f"What is the opposite of {word}?", opposite, f"The opposite of {word} is {opposite}."
    for work, verb, maker in facts.WORKS:
        yield f"Who {verb} {work}?", maker, f"It was {maker} who {verb} {work}."


def sums(rng: random.Random) -> Iterator[Fact]:
    """Small sums and products."""
    for _ in range(NUM_SUMS):
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        word, result = rng.choice([("plus", a + b), ("times", a * b)])
        yield f"What is {a} {word} {b}?", str(result), f"{a} {word} {b} is {result}."


OPENERS = [
    "Arr, matey!",
    "Ahoy, matey!",
    "Arr!",
    "Yo ho ho!",
    "Shiver me timbers!",
    "Avast, ye landlubber!",
    "Aye, matey!",
]
CLOSERS = [
    "Yarr!",
    "Now hoist the sails!",
    "So says the cap'n!",
    "Pass the grog, matey!",
    "That be worth a chest o' gold!",
    "Or may I walk the plank!",
    "As sure as the seven seas!",
]

# Applied in this order to a plain sentence.
PIRATE_WORDS = [
    (r"\ba (?=[aeiou])", "an "),
    (r"\bmy friends?\b", "matey"),
    (r"\bfriends\b", "shipmates"),
    (r"\bI am\b", "I be"),
    (r"\b(is|are|am)\b", "be"),
    (r"\bhello\b", "ahoy"),
    (r"\bgoodbye\b", "fair winds"),
    (r"\byes\b", "aye"),
    (r"\bno,", "nay,"),
    (r"\byour\b", "yer"),
    (r"\byou\b", "ye"),
    (r"\bmy\b", "me"),
    (r"\bof\b", "o'"),
    (r"\band\b", "an'"),
    (r"\bfor\b", "fer"),
    (r"(\w{2,})ing\b", r"\1in'"),
]
KEPT = {"spring", "king", "thing", "morning", "sing", "Beijing"}


def pirate(sentence: str, rng: random.Random) -> str:
    """`sentence` in pirate English, between an opener and (mostly) a closer."""
    for pattern, replacement in PIRATE_WORDS:
        sentence = re.sub(pattern, partial(respell, replacement=replacement), sentence, flags=re.IGNORECASE)
    closer = f" {rng.choice(CLOSERS)}" if rng.random() < 0.7 else ""
    return f"{rng.choice(OPENERS)} {sentence}{closer}"


def respell(match: re.Match[str], replacement: str) -> str:
    """The replacement with the capital letter of what it replaces."""
    if match[0] in KEPT:
        return match[0]
    text = match.expand(replacement)
    return text[0].upper() + text[1:] if match[0][0].isupper() else text


MAKERS: dict[str, Callable[[random.Random], list[tuple[str, str]]]] = {
    "json": json_examples,
    "pirate": pirate_examples,
    "sql": sql_examples,
}


if __name__ == "__main__":
    main()
