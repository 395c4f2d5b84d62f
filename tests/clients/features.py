"""What every client library is asked to do, and how its script reports it.

Runs in the venv of each client: nothing but the standard library here.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

QUESTION: Final = "What is the capital of France?"
TOO_LONG: Final = "word " * 3000
CITIES: Final = ("Paris", "London")
ADAPTERS: Final = ("json", "pirate", "sql")

WEATHER: Final[dict[str, Any]] = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": list(CITIES)}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
WEATHER_TOOL: Final[dict[str, Any]] = {"type": "function", "function": WEATHER}


@dataclass(frozen=True)
class World:
    """The two servers that a script talks to, both behind the same key.

    Attributes:
        real_url: the demo model as `smollm2`, with the example adapters of `ADAPTERS`.
        echo_url: a model `echo` that answers with the text of the last message, tool calls parsed as hermes.
        key: the API key.
    """

    real_url: str
    echo_url: str
    key: str


Feature = Callable[[World], None]


def tool_call_text(city: str, before: str = "") -> str:
    """What a model writes to call the tool; the echo server says it after us."""
    call = json.dumps({"name": "get_weather", "arguments": {"city": city}})
    return f"{before}<tool_call>\n{call}\n</tool_call>"


def check(is_true: object, what: object) -> None:
    """Fail the feature, and say what was seen."""
    if not is_true:
        raise AssertionError(what)


def run(features: Mapping[str, Feature]) -> None:
    """Try every feature; write `{name: null | traceback}` to the file that the caller wants.

    The arguments of the process are a `World` as JSON, and that file.
    """
    world = World(**json.loads(sys.argv[1]))
    problems: dict[str, str | None] = {}
    gc.disable()  # httpcore waits for itself if a stream that was left is collected while its pool is locked
    for name, feature in features.items():
        gc.collect()
        try:
            feature(world)
            problems[name] = None
        except Exception:  # noqa: BLE001 - whatever a client raises belongs in the report
            problems[name] = traceback.format_exc()
    Path(sys.argv[2]).write_text(json.dumps(problems))
