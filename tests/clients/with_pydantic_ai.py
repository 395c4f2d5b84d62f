"""`pydantic-ai-slim[openai]`: agents with the server as their provider."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelContextWindowExceededError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients import features
from tests.clients.features import ADAPTERS, CITIES, QUESTION, World, check


class City(BaseModel):
    """Where it is."""

    city: Literal["Paris", "London"]
    is_capital: bool


def model(url: str, name: str, key: str) -> Any:
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=url, api_key=key))


def agent(world: World, name: str = "smollm2", *, max_tokens: int = 16, **options: Any) -> Any:
    settings: Any = {"temperature": 0.0, "max_tokens": max_tokens}
    return Agent(model(world.real_url, name, world.key), model_settings=settings, **options)


def weather_agent(world: World) -> tuple[Any, list[str]]:
    asked: list[str] = []
    echo: Any = Agent(model(world.echo_url, "echo", world.key))

    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "22 C"

    echo.tool_plain(get_weather)
    return echo, asked


def model_list(world: World) -> None:
    async def names() -> list[str]:
        client = model(world.real_url, "smollm2", world.key).client
        return [card.id async for card in client.models.list()]

    seen = asyncio.run(names())
    check(seen == ["smollm2", *ADAPTERS], seen)


def plain(world: World) -> None:
    result = agent(world).run_sync(QUESTION)
    check("Paris" in result.output, result)
    check(result.usage.output_tokens > 0, result.usage)


def streaming(world: World) -> None:
    async def ask() -> tuple[str, int]:
        async with agent(world).run_stream(QUESTION) as result:
            text = "".join([delta async for delta in result.stream_text(delta=True, debounce_by=None)])
            return text, result.usage.output_tokens

    text, tokens = asyncio.run(ask())
    whole = agent(world).run_sync(QUESTION)
    check(text == whole.output, text)
    check(tokens == whole.usage.output_tokens, tokens)


def adapter_by_name(world: World) -> None:
    answer = json.loads(agent(world, "json", max_tokens=48).run_sync(QUESTION).output)
    check(set(answer) == {"answer", "confidence"}, answer)


def tool_call(world: World) -> None:
    echo, asked = weather_agent(world)
    result = echo.run_sync(features.tool_call_text("Paris"))
    check(asked == ["Paris"], asked)
    check(result.output == "22 C", result)


def streamed_tool_call(world: World) -> None:
    echo, asked = weather_agent(world)

    async def ask() -> str:
        async with echo.run_stream(features.tool_call_text("London")) as result:
            output: str = await result.get_output()
            return output

    output = asyncio.run(ask())
    check(asked == ["London"], asked)
    check(output == "22 C", output)


def required_tool(world: World) -> None:
    output = agent(world, max_tokens=128, output_type=ToolOutput(City)).run_sync(QUESTION).output
    check(output.city in CITIES, output)


def structured_output(world: World) -> None:
    output = agent(world, max_tokens=64, output_type=NativeOutput(City)).run_sync(QUESTION).output
    check(output.city in CITIES, output)


def bad_key(world: World) -> None:
    refused(Agent(model(world.real_url, "smollm2", "wrong")), 401)


def unknown_model(world: World) -> None:
    refused(agent(world, "nobody"), 404)


def refused(asked: Any, status: int) -> None:
    try:
        asked.run_sync(QUESTION)
    except ModelHTTPError as error:
        check(error.status_code == status, error)
        return
    raise AssertionError("no error")


def context_overflow(world: World) -> None:
    try:
        agent(world).run_sync(features.TOO_LONG)
    except ModelContextWindowExceededError:
        return
    raise AssertionError("no error")


if __name__ == "__main__":
    features.run(
        {
            "model_list": model_list,
            "plain": plain,
            "streaming": streaming,
            "adapter_by_name": adapter_by_name,
            "tool_call": tool_call,
            "streamed_tool_call": streamed_tool_call,
            "required_tool": required_tool,
            "structured_output": structured_output,
            "bad_key": bad_key,
            "unknown_model": unknown_model,
            "context_overflow": context_overflow,
        }
    )
