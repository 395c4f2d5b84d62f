"""`llama-index-llms-openai-like`: chats and completions, tools, structured answers."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from tests.clients import features
from tests.clients.features import ADAPTERS, CITIES, QUESTION, World, check


class City(BaseModel):
    """Where it is."""

    city: Literal["Paris", "London"]
    is_capital: bool


def real(world: World, model: str = "smollm2", **options: Any) -> Any:
    given: dict[str, Any] = {
        "api_base": world.real_url,
        "api_key": world.key,
        "is_chat_model": True,
        "is_function_calling_model": True,
        "context_window": 1024,
        "max_tokens": 16,
        "temperature": 0.0,
        "max_retries": 0,
    }
    return OpenAILike(model=model, **{**given, **options})


def echo(world: World) -> Any:
    return real(world, "echo", api_base=world.echo_url, max_tokens=400)


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "London"]


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"22 C in {city}"


def weather_tool() -> Any:
    return FunctionTool.from_defaults(fn=get_weather, fn_schema=Weather)


def question(content: str = QUESTION) -> list[Any]:
    return [ChatMessage(role=MessageRole.USER, content=content)]


def model_list(world: World) -> None:
    names = [card.id for card in real(world)._get_client().models.list()]
    check(names == ["smollm2", *ADAPTERS], names)


def plain(world: World) -> None:
    check("Paris" in real(world).chat(question()).message.content, "chat")
    completed = real(world, is_chat_model=False).complete("The capital of France is")
    check("Paris" in completed.text, completed)


def streaming(world: World) -> None:
    whole = real(world).chat(question()).message.content
    parts = list(real(world).stream_chat(question()))
    check("".join(part.delta for part in parts) == whole, parts)
    parts = list(real(world, is_chat_model=False).stream_complete("The capital of France is"))
    check("Paris" in parts[-1].text, parts)


def adapter_by_name(world: World) -> None:
    answer = json.loads(real(world, "json", max_tokens=48).chat(question()).message.content)
    check(set(answer) == {"answer", "confidence"}, answer)


def tool_call(world: World) -> None:
    llm = echo(world)
    answer = llm.chat_with_tools([weather_tool()], user_msg=features.tool_call_text("Paris"))
    calls = llm.get_tool_calls_from_response(answer)
    check(
        [(call.tool_name, call.tool_kwargs) for call in calls] == [("get_weather", {"city": "Paris"})], calls
    )
    result = llm.predict_and_call([weather_tool()], user_msg=features.tool_call_text("London"))
    check(result.response == "22 C in London", result)


def streamed_tool_call(world: World) -> None:
    llm = echo(world)
    text = features.tool_call_text("Paris") + features.tool_call_text("London")
    tools = [weather_tool()]
    parts = list(llm.stream_chat_with_tools(tools, user_msg=text, allow_parallel_tool_calls=True))
    calls = llm.get_tool_calls_from_response(parts[-1])
    check([call.tool_kwargs for call in calls] == [{"city": "Paris"}, {"city": "London"}], calls)


def required_tool(world: World) -> None:
    llm = real(world, max_tokens=128)
    answer = llm.chat_with_tools([weather_tool()], user_msg=QUESTION, tool_required=True)
    calls = llm.get_tool_calls_from_response(answer)
    check(calls[0].tool_kwargs["city"] in CITIES, calls)


def structured_output(world: World) -> None:
    for by_schema in (True, False):
        llm = real(world, max_tokens=128, should_use_structured_outputs=by_schema)
        answer = llm.structured_predict(City, PromptTemplate(QUESTION))
        check(answer.city in CITIES, (by_schema, answer))


def bad_key(world: World) -> None:
    refused(world, openai.AuthenticationError, api_key="wrong")


def unknown_model(world: World) -> None:
    refused(world, openai.NotFoundError, model="nobody")


def context_overflow(world: World) -> None:
    error = refused(world, openai.BadRequestError, content=features.TOO_LONG)
    check(error.code == "context_length_exceeded", error)


def refused(world: World, kind: type[Exception], content: str = QUESTION, **options: Any) -> Any:
    try:
        real(world, **options).chat(question(content))
    except kind as error:
        return error
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
