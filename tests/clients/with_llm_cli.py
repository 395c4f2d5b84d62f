"""The `llm` command, with models of its own in `extra-openai-models.yaml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients import features
from tests.clients.features import ADAPTERS, CITIES, QUESTION, World, check

TOOL = "def get_weather(city: str) -> str:\n    'The weather in a city.'\n    return '22 C in ' + city\n"


def llm(world: World, *arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a home of its own that knows our models."""
    names = {name: world.real_url for name in ("smollm2", *ADAPTERS, "nobody")} | {"echo": world.echo_url}
    models = [
        {
            "model_id": f"lm/{name}",
            "model_name": name,
            "api_base": url,
            "api_key_name": "loramux",
            "supports_schema": True,
            "supports_tools": True,
        }
        for name, url in names.items()
    ]
    with tempfile.TemporaryDirectory() as home:
        Path(home, "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
        Path(home, "keys.json").write_text(json.dumps({"loramux": key or world.key}))
        return subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            env={**os.environ, "LLM_USER_PATH": home},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )


def said(world: World, *arguments: str) -> str:
    """What it printed."""
    done = llm(world, *arguments)
    check(done.returncode == 0, done.stderr)
    return done.stdout.strip()


def short(count: int = 16) -> tuple[str, ...]:
    return ("-o", "temperature", "0", "-o", "max_tokens", str(count))


def model_list(world: World) -> None:
    listed = said(world, "models", "list")
    check("lm/json" in listed, listed)


def plain(world: World) -> None:
    text = said(world, "-m", "lm/smollm2", QUESTION, "--no-stream", *short())
    check("Paris" in text, text)


def streaming(world: World) -> None:
    text = said(world, "-m", "lm/smollm2", QUESTION, *short())
    check(text == said(world, "-m", "lm/smollm2", QUESTION, "--no-stream", *short()), text)


def adapter_by_name(world: World) -> None:
    answer = json.loads(said(world, "-m", "lm/json", QUESTION, *short(48)))
    check(set(answer) == {"answer", "confidence"}, answer)


def tool_call(world: World) -> None:
    text = said(world, "-m", "lm/echo", features.tool_call_text("Paris"), "--functions", TOOL, "--no-stream")
    check(text == "22 C in Paris", text)


def streamed_tool_call(world: World) -> None:
    text = said(world, "-m", "lm/echo", features.tool_call_text("London"), "--functions", TOOL)
    check(text == "22 C in London", text)


def structured_output(world: World) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": list(CITIES)}, "is_capital": {"type": "boolean"}},
        "required": ["city", "is_capital"],
        "additionalProperties": False,
    }
    answer = json.loads(said(world, "-m", "lm/smollm2", QUESTION, "--schema", json.dumps(schema), *short(64)))
    check(answer["city"] in CITIES, answer)


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    """It failed, and said why in the server's words."""
    check(done.returncode != 0, done.stdout)
    check(words in done.stderr, done.stderr)
    check("Traceback" not in done.stderr, done.stderr)


def bad_key(world: World) -> None:
    refused(llm(world, "-m", "lm/smollm2", QUESTION, key="wrong"), "Incorrect API key provided")


def unknown_model(world: World) -> None:
    refused(llm(world, "-m", "lm/nobody", QUESTION), "does not exist")


def context_overflow(world: World) -> None:
    refused(llm(world, "-m", "lm/smollm2", features.TOO_LONG), "maximum context length is")


if __name__ == "__main__":
    features.run(
        {
            "model_list": model_list,
            "plain": plain,
            "streaming": streaming,
            "adapter_by_name": adapter_by_name,
            "tool_call": tool_call,
            "streamed_tool_call": streamed_tool_call,
            "structured_output": structured_output,
            "bad_key": bad_key,
            "unknown_model": unknown_model,
            "context_overflow": context_overflow,
        }
    )
