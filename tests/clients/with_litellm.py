"""`litellm` with its provider for servers of this kind, `hosted_vllm`."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import litellm
from litellm.caching.in_memory_cache import InMemoryCache
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
from litellm.llms.openai_like.model_info import get_openai_compatible_model_info
from pydantic import BaseModel

from tests.clients import features
from tests.clients.features import ADAPTERS, CITIES, QUESTION, WEATHER_TOOL, World, check

litellm.suppress_debug_info = True


class City(BaseModel):
    """Where it is."""

    city: Literal["Paris", "London"]
    is_capital: bool


def ask(world: World, model: str = "smollm2", content: str = QUESTION, **options: Any) -> Any:
    given = {"max_tokens": 16, "temperature": 0, "api_key": world.key, "api_base": world.real_url, **options}
    messages = [{"role": "user", "content": content}]
    return litellm.completion(model=f"hosted_vllm/{model}", messages=messages, num_retries=0, **given)


def ask_echo(world: World, content: str, **options: Any) -> Any:
    return ask(
        world, "echo", content, api_base=world.echo_url, max_tokens=400, tools=[WEATHER_TOOL], **options
    )


def model_list(world: World) -> None:
    """The router's discovery of limits; the library's plain list knows no keys for such servers."""

    async def limits(model: str) -> dict[str, int]:
        found = await get_openai_compatible_model_info(
            model=model,
            api_base=world.real_url,
            headers={"Authorization": f"Bearer {world.key}"},
            client=AsyncHTTPHandler(),
            cache=InMemoryCache(),
        )
        return dict(found)

    for name in ("smollm2", *ADAPTERS):
        found = asyncio.run(limits(name))
        check(found.get("max_input_tokens") == 1024, (name, found))


def plain(world: World) -> None:
    answer = ask(world)
    check("Paris" in answer.choices[0].message.content, answer)
    check(answer.usage.completion_tokens > 0, answer)


def streaming(world: World) -> None:
    whole = ask(world)
    chunks = list(ask(world, stream=True, stream_options={"include_usage": True}))
    joined = litellm.stream_chunk_builder(chunks)
    check(joined.choices[0].message.content == whole.choices[0].message.content, joined)
    check(joined.usage.completion_tokens == whole.usage.completion_tokens, joined)


def adapter_by_name(world: World) -> None:
    answer = json.loads(ask(world, "json", max_tokens=48).choices[0].message.content)
    check(set(answer) == {"answer", "confidence"}, answer)


def tool_call(world: World) -> None:
    answer = ask_echo(world, features.tool_call_text("Paris"))
    calls = answer.choices[0].message.tool_calls
    check(json.loads(calls[0].function.arguments) == {"city": "Paris"}, answer)
    check(answer.choices[0].finish_reason == "tool_calls", answer)


def streamed_tool_call(world: World) -> None:
    text = features.tool_call_text("Paris") + features.tool_call_text("London")
    joined = litellm.stream_chunk_builder(list(ask_echo(world, text, stream=True)))
    calls = joined.choices[0].message.tool_calls
    check([json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "London"], joined)
    check([call.function.name for call in calls] == ["get_weather"] * 2, joined)


def required_tool(world: World) -> None:
    answer = ask(world, tools=[WEATHER_TOOL], tool_choice="required", max_tokens=128)
    calls = answer.choices[0].message.tool_calls
    check(calls and json.loads(calls[0].function.arguments)["city"] in CITIES, answer)


def named_tool(world: World) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = ask(world, tools=[WEATHER_TOOL], tool_choice=choice, max_tokens=128)
    calls = answer.choices[0].message.tool_calls
    check(calls and json.loads(calls[0].function.arguments)["city"] in CITIES, answer)


def structured_output(world: World) -> None:
    answer = ask(world, response_format=City, max_tokens=64)
    check(City.model_validate_json(answer.choices[0].message.content).city in CITIES, answer)


def bad_key(world: World) -> None:
    try:
        ask(world, api_key="wrong")
    except litellm.AuthenticationError:
        return
    raise AssertionError("no error")


def unknown_model(world: World) -> None:
    try:
        ask(world, "nobody")
    except litellm.NotFoundError:
        return
    raise AssertionError("no error")


def context_overflow(world: World) -> None:
    for is_stream in (False, True):
        try:
            ask(world, content=features.TOO_LONG, stream=is_stream)
        except litellm.ContextWindowExceededError:
            continue
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
            "named_tool": named_tool,
            "structured_output": structured_output,
            "bad_key": bad_key,
            "unknown_model": unknown_model,
            "context_overflow": context_overflow,
        }
    )
