"""`langchain-openai`: `ChatOpenAI` with the server's address."""

from __future__ import annotations

import functools
import json
import operator
from typing import Any, Literal

import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.clients import features
from tests.clients.features import ADAPTERS, CITIES, QUESTION, WEATHER_TOOL, World, check


class City(BaseModel):
    """Where it is."""

    city: Literal["Paris", "London"]
    is_capital: bool


def real(world: World, model: str = "smollm2", *, key: str | None = None, max_tokens: int = 16) -> Any:
    return ChatOpenAI(
        model=model,
        base_url=world.real_url,
        api_key=SecretStr(key or world.key),
        max_retries=0,
        temperature=0,
        max_completion_tokens=max_tokens,
    )


def echo(world: World) -> Any:
    return ChatOpenAI(
        model="echo", base_url=world.echo_url, api_key=SecretStr(world.key), max_retries=0, temperature=0
    )


def model_list(world: World) -> None:
    names = [card.id for card in real(world).root_client.models.list()]
    check(names == ["smollm2", *ADAPTERS], names)


def plain(world: World) -> None:
    answer = real(world).invoke(QUESTION)
    check("Paris" in answer.content, answer)
    check(answer.usage_metadata["output_tokens"] > 0, answer)


def streaming(world: World) -> None:
    whole = real(world).invoke(QUESTION)
    chunks = list(real(world).stream(QUESTION, stream_usage=True))
    joined = functools.reduce(operator.add, chunks)
    check(joined.content == whole.content, joined)
    check(joined.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"], joined)


def adapter_by_name(world: World) -> None:
    answer = json.loads(real(world, "json", max_tokens=48).invoke(QUESTION).content)
    check(set(answer) == {"answer", "confidence"}, answer)


def tool_call(world: World) -> None:
    model = echo(world).bind_tools([WEATHER_TOOL])
    messages: list[Any] = [HumanMessage(features.tool_call_text("Paris"))]
    answer = model.invoke(messages)
    check([call["args"] for call in answer.tool_calls] == [{"city": "Paris"}], answer)
    check(answer.response_metadata["finish_reason"] == "tool_calls", answer)
    messages += [answer, ToolMessage("22 C", tool_call_id=answer.tool_calls[0]["id"])]
    check(model.invoke(messages).content == "22 C", "round trip")


def streamed_tool_call(world: World) -> None:
    text = features.tool_call_text("Paris", "Let me look. ") + features.tool_call_text("London")
    chunks = list(echo(world).bind_tools([WEATHER_TOOL]).stream(text))
    joined = functools.reduce(operator.add, chunks)
    check([call["args"]["city"] for call in joined.tool_calls] == ["Paris", "London"], joined)
    check({call["name"] for call in joined.tool_calls} == {"get_weather"}, joined)


def required_tool(world: World) -> None:
    model = real(world, max_tokens=128).bind_tools([WEATHER_TOOL], tool_choice="required")
    answer = model.invoke(QUESTION)
    check(answer.tool_calls and answer.tool_calls[0]["args"]["city"] in CITIES, answer)


def named_tool(world: World) -> None:
    model = real(world, max_tokens=128).bind_tools([WEATHER_TOOL], tool_choice="get_weather")
    answer = model.invoke(QUESTION)
    check(answer.tool_calls and answer.tool_calls[0]["args"]["city"] in CITIES, answer)


def structured_output(world: World) -> None:
    model = real(world, max_tokens=64)
    for method in ("json_schema", "function_calling"):
        answer = model.with_structured_output(City, method=method).invoke(QUESTION)
        check(answer.city in CITIES, (method, answer))


def bad_key(world: World) -> None:
    try:
        real(world, key="wrong").invoke(QUESTION)
    except openai.AuthenticationError:
        return
    raise AssertionError("no error")


def unknown_model(world: World) -> None:
    try:
        real(world, "nobody").invoke(QUESTION)
    except openai.NotFoundError:
        return
    raise AssertionError("no error")


def context_overflow(world: World) -> None:
    try:
        real(world).invoke(features.TOO_LONG)
    except ContextOverflowError:
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
            "named_tool": named_tool,
            "structured_output": structured_output,
            "bad_key": bad_key,
            "unknown_model": unknown_model,
            "context_overflow": context_overflow,
        }
    )
