"""Made-up tables, the questions one can ask about them, and the queries that answer those.

Kept out on purpose, as the held-out questions ask about them: books, employees, movies, and others
in `data/held_out.json`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """One table: `key` names a row to a person; numbers and words are the columns to filter on."""

    name: str  # plural noun, as used in a question
    key: str
    numbers: dict[str, tuple[int, int]]  # column -> range of values
    words: dict[str, list[str]]  # column -> values

    @property
    def signature(self) -> str:
        """`name(id, column, ...)` as it stands in a question."""
        return f"{self.name}({', '.join(['id', self.key, *self.words, *self.numbers])})"


TABLES = [
    Table("students", "name", {"age": (10, 20), "grade": (1, 12)}, {"city": ["Oslo", "Rome", "Lima"]}),
    Table(
        "customers",
        "name",
        {"age": (20, 80), "balance": (100, 9000)},
        {"country": ["Spain", "Peru", "Kenya"]},
    ),
    Table(
        "products", "name", {"price": (5, 500), "stock": (1, 200)}, {"category": ["toys", "garden", "food"]}
    ),
    Table(
        "orders", "number", {"total": (10, 900), "items": (1, 20)}, {"status": ["paid", "open", "shipped"]}
    ),
    Table(
        "cars", "model", {"year": (1990, 2024), "price": (900, 60000)}, {"color": ["red", "blue", "black"]}
    ),
    Table(
        "cities", "name", {"population": (1000, 900000), "area": (10, 900)}, {"country": ["Italy", "Chile"]}
    ),
    Table("songs", "title", {"length": (90, 400), "plays": (10, 9000)}, {"artist": ["Mira", "The Owls"]}),
    Table("players", "name", {"goals": (0, 40), "age": (17, 39)}, {"team": ["Lions", "Sharks", "Bears"]}),
    Table("hotels", "name", {"stars": (1, 5), "rooms": (5, 400)}, {"city": ["Berlin", "Cairo", "Quito"]}),
    Table("flights", "number", {"price": (40, 900), "duration": (40, 800)}, {"airline": ["Skyway", "Polar"]}),
    Table("pets", "name", {"age": (1, 15), "weight": (1, 60)}, {"species": ["dog", "rabbit", "parrot"]}),
    Table(
        "houses", "address", {"price": (50000, 900000), "rooms": (1, 9)}, {"town": ["Elmville", "Westport"]}
    ),
    Table("doctors", "name", {"experience": (1, 40), "patients": (5, 300)}, {"specialty": ["eyes", "heart"]}),
    Table(
        "courses", "title", {"credits": (1, 10), "seats": (10, 200)}, {"teacher": ["Brown", "Ito", "Khan"]}
    ),
    Table("invoices", "number", {"amount": (20, 5000), "year": (2015, 2024)}, {"client": ["Acme", "Nordex"]}),
    Table("plants", "name", {"height": (5, 400), "price": (2, 90)}, {"color": ["green", "white", "purple"]}),
    Table("mountains", "name", {"height": (800, 8800), "climbs": (0, 500)}, {"range": ["Alps", "Andes"]}),
    Table("ships", "name", {"length": (10, 400), "crew": (2, 900)}, {"port": ["Lisbon", "Bergen", "Osaka"]}),
    Table("recipes", "title", {"minutes": (5, 180), "calories": (90, 1200)}, {"cuisine": ["thai", "greek"]}),
    Table("teachers", "name", {"salary": (20000, 70000), "age": (23, 66)}, {"subject": ["art", "physics"]}),
    Table("phones", "model", {"price": (80, 1500), "memory": (4, 512)}, {"brand": ["Nova", "Pixelon"]}),
    Table("games", "title", {"score": (1, 100), "year": (1985, 2024)}, {"genre": ["puzzle", "racing"]}),
    Table("farms", "name", {"area": (1, 900), "cows": (0, 400)}, {"region": ["north", "south", "coast"]}),
    Table("tickets", "code", {"price": (5, 300), "seat": (1, 900)}, {"event": ["opera", "derby"]}),
    Table("lakes", "name", {"depth": (2, 1600), "area": (1, 9000)}, {"country": ["Canada", "Finland"]}),
    Table("trains", "number", {"speed": (60, 320), "wagons": (2, 30)}, {"line": ["A", "B", "C"]}),
    Table("members", "name", {"points": (0, 5000), "age": (18, 90)}, {"level": ["gold", "silver", "basic"]}),
    Table(
        "projects", "title", {"budget": (1000, 90000), "days": (5, 400)}, {"owner": ["Lena", "Omar", "Yuki"]}
    ),
]

OVER = [
    "Which {t} have {n} above {v}?",
    "Show the {k} of all {t} with {n} greater than {v}.",
    "List {t} whose {n} is more than {v}.",
    "Find the {t} with {n} over {v}.",
]
# What people say instead of naming the column.
SPOKEN = {
    "price": "cost more than",
    "age": "are older than",
    "year": "were made after",
    "height": "are taller than",
    "length": "are longer than",
    "salary": "earn more than",
    "weight": "weigh more than",
}
NEVER_SUMMED = {"year", "age", "height", "speed", "score", "stars", "grade", "seat", "depth"}
UNDER = [
    "Which {t} have {n} below {v}?",
    "List {t} whose {n} is less than {v}.",
    "Find the {t} with {n} under {v}.",
]
EQUAL = [
    "Which {t} have {w} {x}?",
    "List the {k} of all {t} where the {w} is {x}.",
    "Show all {t} with {w} {x}.",
    "Find the {t} whose {w} is {x}.",
]


def queries(table: Table, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about one table with their queries; more than are needed, to choose from."""
    pairs = [("How many {t} are there?", "SELECT COUNT(*) FROM {t};")]
    pairs += [
        ("List all {t}.", "SELECT * FROM {t};"),
        ("Show the {k} of every one of the {t}.", "SELECT {k} FROM {t};"),
    ]
    found = [(q.format(t=table.name, k=table.key), s.format(t=table.name, k=table.key)) for q, s in pairs]
    for number, (low, high) in table.numbers.items():
        found += number_queries(table, number, round_number(low, high, rng), rng)
    for word, values in table.words.items():
        found += word_queries(table, word, rng.choice(values), rng)
        for number, (low, high) in table.numbers.items():
            found += mixed_queries(table, word, rng.choice(values), number, round_number(low, high, rng))
    return found


def number_queries(table: Table, number: str, value: int, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about one number column."""
    t, k, n, v = table.name, table.key, number, value
    top = rng.randint(3, 10)
    pairs = [(text, "SELECT {k} FROM {t} WHERE {n} > {v};") for text in rng.sample(OVER, 2)]
    pairs += [
        (rng.choice(UNDER), "SELECT {k} FROM {t} WHERE {n} < {v};"),
        ("What is the average {n} of the {t}?", "SELECT AVG({n}) FROM {t};"),
        ("What is the highest {n}?", "SELECT MAX({n}) FROM {t};"),
        ("What is the lowest {n}?", "SELECT MIN({n}) FROM {t};"),
        ("How many {t} have {n} above {v}?", "SELECT COUNT(*) FROM {t} WHERE {n} > {v};"),
        ("Which of the {t} has the highest {n}?", "SELECT {k} FROM {t} ORDER BY {n} DESC LIMIT 1;"),
        ("Which of the {t} has the lowest {n}?", "SELECT {k} FROM {t} ORDER BY {n} LIMIT 1;"),
        ("Show the {top} {t} with the highest {n}.", "SELECT {k} FROM {t} ORDER BY {n} DESC LIMIT {top};"),
        ("List all {t} sorted by {n}.", "SELECT * FROM {t} ORDER BY {n};"),
    ]
    if number not in NEVER_SUMMED:
        pairs.append(("What is the total {n} of all {t}?", "SELECT SUM({n}) FROM {t};"))
    if number in SPOKEN:
        pairs += [("Which {t} " + SPOKEN[number] + " {v}?", "SELECT {k} FROM {t} WHERE {n} > {v};")] * 2
    return [(q.format(t=t, k=k, n=n, v=v, top=top), s.format(t=t, k=k, n=n, v=v, top=top)) for q, s in pairs]


def word_queries(table: Table, word: str, value: str, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about one text column."""
    t, k, w, x = table.name, table.key, word, value
    pairs = [(text, "SELECT {k} FROM {t} WHERE {w} = '{x}';") for text in rng.sample(EQUAL, 2)]
    pairs += [
        ("How many {t} have {w} {x}?", "SELECT COUNT(*) FROM {t} WHERE {w} = '{x}';"),
        ("How many {t} are there for each {w}?", "SELECT {w}, COUNT(*) FROM {t} GROUP BY {w};"),
        ("Which different values of {w} are there?", "SELECT DISTINCT {w} FROM {t};"),
    ]
    return [(q.format(t=t, k=k, w=w, x=x), s.format(t=t, k=k, w=w, x=x)) for q, s in pairs]


def mixed_queries(table: Table, word: str, value: str, number: str, limit: int) -> list[tuple[str, str]]:
    """Questions about a text column and a number column together."""
    t, k, w, x, n, v = table.name, table.key, word, value, number, limit
    pairs = [
        ("What is the average {n} for each {w}?", "SELECT {w}, AVG({n}) FROM {t} GROUP BY {w};"),
        ("What is the highest {n} of {t} with {w} {x}?", "SELECT MAX({n}) FROM {t} WHERE {w} = '{x}';"),
        (
            "Which {t} have {w} {x} and {n} above {v}?",
            "SELECT {k} FROM {t} WHERE {w} = '{x}' AND {n} > {v};",
        ),
    ]
    return [
        (q.format(t=t, k=k, w=w, x=x, n=n, v=v), s.format(t=t, k=k, w=w, x=x, n=n, v=v)) for q, s in pairs
    ]


def round_number(low: int, high: int, rng: random.Random) -> int:
    """A number such as people ask for: at most two digits that are not zero."""
    number = rng.randint(low, high)
    unit = int(10 ** max(0, len(str(number)) - 2)) if number < 1900 or number > 2030 else 1
    return number // unit * unit
