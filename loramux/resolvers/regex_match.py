"""Match regular expressions; also run as a program of its own, by path and without loramux.

An adapter brings its own regular expressions, and one such as `(a+)+$` keeps Python's matcher busy
for ever, with the interpreter's lock held. `module_patterns` therefore runs every expression that
is more than a plain name in a child process, which limits its own CPU time and memory: this file,
with a JSON `Query` on its standard input and a JSON `Answer` on its standard output. Standard
library only.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from typing import Final, NamedTuple, TypedDict

_MAX_MEMORY_BYTES: Final = 512 << 20
_MAX_CPU_S: Final = 1  # CPU time, so a busy machine refuses nothing; real adapters take milliseconds


class Query(TypedDict):
    """Which names do these expressions match?"""

    regexes: list[str]
    names: list[str]
    is_full: bool  # the whole name must match, not only its beginning


class Match(NamedTuple):
    """The first expression that matches a name."""

    position: int  # in the list of expressions
    layer: str | None  # what the group `idx` holds, where the expression has one


class Answer(TypedDict):
    """One entry a name, None where nothing matches; or what is wrong with an expression."""

    matches: list[Match | None]
    error: str | None


def answer(query: Query) -> Answer:
    """Try the expressions in order on every name."""
    compiled = []
    for regex in query["regexes"]:
        try:
            compiled.append(re.compile(regex))
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            return {"matches": [], "error": f"{regex[:200]!r} is not a valid regular expression: {error}"}
    return {"matches": [_first(compiled, name, query["is_full"]) for name in query["names"]], "error": None}


def _first(compiled: list[re.Pattern[str]], name: str, is_full: bool) -> Match | None:
    for index, regex in enumerate(compiled):
        match = regex.fullmatch(name) if is_full else regex.match(name)
        if match:
            return Match(index, match.groupdict().get("idx"))
    return None


def main() -> None:
    """Answer one query; past the CPU limit the process ends by SIGXCPU."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_S, _MAX_CPU_S))
    json.dump(answer(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
