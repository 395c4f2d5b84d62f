"""The official `openai` client: sync, async, and its helpers."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pydantic

from tests.clients import features
from tests.clients.features import ADAPTERS, CITIES, QUESTION, WEATHER_TOOL, World, check

ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 16,
}


class City(pydantic.BaseModel):
    """The answer of structured output."""

    city: Literal["Paris", "London"]
    is_capital: bool


def real(world: World) -> Any:
    return openai.OpenAI(base_url=world.real_url, api_key=world.key, max_retries=0)


def echo(world: World) -> Any:
    return openai.OpenAI(base_url=world.echo_url, api_key=world.key, max_retries=0)


def model_list(world: World) -> None:
    client = real(world)
    names = [card.id for card in client.models.list()]
    check(names == ["smollm2", *ADAPTERS], names)
    check(client.models.retrieve("sql").id == "sql", "retrieve")


def plain(world: World) -> None:
    answer = real(world).chat.completions.create(model="smollm2", **ASKED)
    check("Paris" in (answer.choices[0].message.content or ""), answer)
    check(answer.usage is not None and answer.usage.completion_tokens > 0, answer)


def streaming(world: World) -> None:
    client = real(world)
    whole = client.chat.completions.create(model="smollm2", **ASKED).choices[0].message.content
    stream = client.chat.completions.create(
        model="smollm2", stream=True, stream_options={"include_usage": True}, **ASKED
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check(text == whole, (text, whole))
    check(chunks[-1].usage is not None, chunks[-1])


def async_plain(world: World) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=world.real_url, api_key=world.key, max_retries=0) as client:
            answer = await client.chat.completions.create(model="smollm2", **ASKED)
            return answer.choices[0].message.content or ""

    check("Paris" in asyncio.run(ask()), "async")


def async_streaming(world: World) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=world.real_url, api_key=world.key, max_retries=0) as client:
            stream = await client.chat.completions.create(model="smollm2", stream=True, **ASKED)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    check("Paris" in asyncio.run(ask()), "async stream")


def stream_helper(world: World) -> None:
    with real(world).chat.completions.stream(model="smollm2", **{**ASKED, "max_tokens": 64}) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message.content
    check("".join(deltas) == final, (deltas, final))


def legacy_completion(world: World) -> None:
    answer = real(world).completions.create(
        model="smollm2", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    check("Paris" in answer.choices[0].text, answer)


def adapter_by_name(world: World) -> None:
    raw = real(world).chat.completions.with_raw_response.create(model="json", **{**ASKED, "max_tokens": 48})
    answer = json.loads(raw.parse().choices[0].message.content or "")
    check(set(answer) == {"answer", "confidence"}, answer)
    check(raw.headers["x-loramux-adapter"].startswith("json@1 "), raw.headers)


def tool_call(world: World) -> None:
    client = echo(world)
    messages: list[Any] = [
        {"role": "user", "content": features.tool_call_text("Paris") + features.tool_call_text("London")}
    ]
    answer = client.chat.completions.create(model="echo", messages=messages, tools=[WEATHER_TOOL])
    choice = answer.choices[0]
    check(choice.finish_reason == "tool_calls", choice)
    calls: list[Any] = list(choice.message.tool_calls or [])
    cities = [json.loads(call.function.arguments)["city"] for call in calls]
    check(cities == ["Paris", "London"], calls)
    check(calls[0].id != calls[1].id, calls)

    messages.append(choice.message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "22 C"} for call in calls]
    answer = client.chat.completions.create(model="echo", messages=messages, tools=[WEATHER_TOOL])
    check(answer.choices[0].message.content == "22 C", answer)
    check(not answer.choices[0].message.tool_calls, answer)


def streamed_tool_call(world: World) -> None:
    text = features.tool_call_text("Paris", "Let me look. ") + features.tool_call_text("London")
    with echo(world).chat.completions.stream(
        model="echo",
        messages=[{"role": "user", "content": text}],
        tools=[WEATHER_TOOL],
    ) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    calls: list[Any] = list(choice.message.tool_calls or [])
    cities = [json.loads(call.function.arguments)["city"] for call in calls]
    check(cities == ["Paris", "London"], choice)
    check({call.function.name for call in calls} == {"get_weather"}, choice)
    check(choice.finish_reason == "tool_calls", choice)


def required_tool(world: World) -> None:
    answer = real(world).chat.completions.create(
        model="smollm2",
        tools=[WEATHER_TOOL],
        tool_choice="required",
        **{**ASKED, "max_tokens": 128},
    )
    calls: list[Any] = list(answer.choices[0].message.tool_calls or [])
    check(calls and calls[0].function.name == "get_weather", answer)
    check(json.loads(calls[0].function.arguments)["city"] in CITIES, answer)
    check(answer.choices[0].finish_reason == "tool_calls", answer)


def named_tool(world: World) -> None:
    answer = real(world).chat.completions.create(
        model="smollm2",
        tools=[WEATHER_TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        **{**ASKED, "max_tokens": 128},
    )
    calls: list[Any] = list(answer.choices[0].message.tool_calls or [])
    check(len(calls) == 1, answer)
    check(json.loads(calls[0].function.arguments)["city"] in CITIES, answer)


def structured_output(world: World) -> None:
    answer = real(world).chat.completions.parse(
        model="smollm2", response_format=City, **{**ASKED, "max_tokens": 64}
    )
    parsed = answer.choices[0].message.parsed
    check(parsed is not None and parsed.city in CITIES, answer)


def structured_stream(world: World) -> None:
    with real(world).chat.completions.stream(
        model="smollm2", response_format=City, **{**ASKED, "max_tokens": 64}
    ) as stream:
        for _ in stream:
            pass
        parsed = stream.get_final_completion().choices[0].message.parsed
    check(parsed is not None and parsed.city in CITIES, parsed)


def bad_key(world: World) -> None:
    client = openai.OpenAI(base_url=world.real_url, api_key="wrong", max_retries=0)
    try:
        client.chat.completions.create(model="smollm2", **ASKED)
    except openai.AuthenticationError as error:
        check(error.code == "invalid_api_key", error.body)
    else:
        raise AssertionError("no error")


def unknown_model(world: World) -> None:
    for is_stream in (False, True):
        try:
            real(world).chat.completions.create(model="nobody", stream=is_stream, **ASKED)
        except openai.NotFoundError as error:
            check((error.code, error.param) == ("model_not_found", "model"), error.body)
        else:
            raise AssertionError("no error")


def context_overflow(world: World) -> None:
    try:
        real(world).chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": features.TOO_LONG}]
        )
    except openai.BadRequestError as error:
        check(error.code == "context_length_exceeded", error.body)
        check("maximum context length is" in error.message, error.message)
    else:
        raise AssertionError("no error")


if __name__ == "__main__":
    features.run(
        {
            "model_list": model_list,
            "plain": plain,
            "streaming": streaming,
            "async_plain": async_plain,
            "async_streaming": async_streaming,
            "stream_helper": stream_helper,
            "legacy_completion": legacy_completion,
            "adapter_by_name": adapter_by_name,
            "tool_call": tool_call,
            "streamed_tool_call": streamed_tool_call,
            "required_tool": required_tool,
            "named_tool": named_tool,
            "structured_output": structured_output,
            "structured_stream": structured_stream,
            "bad_key": bad_key,
            "unknown_model": unknown_model,
            "context_overflow": context_overflow,
        }
    )
