"""`instructor` over the official client: typed answers by tools, JSON and JSON schema."""

from __future__ import annotations

import json
from typing import Any, Literal

import instructor
import openai
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from pydantic import BaseModel

from tests.clients import features
from tests.clients.features import ADAPTERS, CITIES, QUESTION, World, check


class City(BaseModel):
    """Where it is."""

    city: Literal["Paris", "London"]
    is_capital: bool


def plain_client(world: World, key: str | None = None) -> openai.OpenAI:
    return openai.OpenAI(base_url=world.real_url, api_key=key or world.key, max_retries=0)


def ask(
    world: World,
    mode: instructor.Mode,
    *,
    model: str = "smollm2",
    content: str = QUESTION,
    key: str | None = None,
    max_tokens: int = 128,
) -> Any:
    client: Any = instructor.from_openai(plain_client(world, key), mode=mode)
    return client.chat.completions.create(
        model=model,
        response_model=City,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=max_tokens,
        max_retries=0,
    )


def model_list(world: World) -> None:
    client: Any = instructor.from_openai(plain_client(world))
    names = [card.id for card in client.client.models.list()]
    check(names == ["smollm2", *ADAPTERS], names)


def plain(world: World) -> None:
    client: Any = instructor.from_openai(plain_client(world))
    answer = client.chat.completions.create(
        model="smollm2",
        response_model=None,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=16,
    )
    check("Paris" in answer.choices[0].message.content, answer)


def streaming(world: World) -> None:
    client: Any = instructor.from_openai(plain_client(world), mode=instructor.Mode.JSON_SCHEMA)
    parts = list(
        client.chat.completions.create_partial(
            model="smollm2",
            response_model=City,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=128,
        )
    )
    check(parts and parts[-1].city in CITIES, parts)


def adapter_by_name(world: World) -> None:
    client: Any = instructor.from_openai(plain_client(world))
    answer = client.chat.completions.create(
        model="json",
        response_model=None,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=48,
    )
    check(set(json.loads(answer.choices[0].message.content)) == {"answer", "confidence"}, answer)


def named_tool(world: World) -> None:
    answer = ask(world, instructor.Mode.TOOLS)
    check(answer.city in CITIES, answer)


def structured_output(world: World) -> None:
    answer = ask(world, instructor.Mode.JSON_SCHEMA)
    check(answer.city in CITIES, answer)


def cut_output(world: World) -> None:
    try:
        ask(world, instructor.Mode.JSON_SCHEMA, max_tokens=3)
    except IncompleteOutputException:
        return
    except InstructorRetryException as error:
        check(isinstance(error.__cause__, IncompleteOutputException) or "max_tokens" in str(error), error)
        return
    raise AssertionError("no error")


def refused(world: World, code: str, **options: Any) -> None:
    """The client's own error, or instructor's around it, with the server's code."""
    try:
        ask(world, instructor.Mode.TOOLS, **options)
    except (openai.APIStatusError, InstructorRetryException) as error:
        check(code in str(error), error)
        return
    raise AssertionError("no error")


def bad_key(world: World) -> None:
    refused(world, "invalid_api_key", key="wrong")


def unknown_model(world: World) -> None:
    refused(world, "model_not_found", model="nobody")


def context_overflow(world: World) -> None:
    refused(world, "context_length_exceeded", content=features.TOO_LONG)


if __name__ == "__main__":
    features.run(
        {
            "model_list": model_list,
            "plain": plain,
            "streaming": streaming,
            "adapter_by_name": adapter_by_name,
            "named_tool": named_tool,
            "structured_output": structured_output,
            "cut_output": cut_output,
            "bad_key": bad_key,
            "unknown_model": unknown_model,
            "context_overflow": context_overflow,
        }
    )
