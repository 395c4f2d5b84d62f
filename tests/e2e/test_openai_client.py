"""The official `openai` client against a real server: base and adapters, streamed and not."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from tests.e2e.conftest import ADAPTERS

pytestmark = [pytest.mark.demo, pytest.mark.anyio]

QUESTION = "What is the capital of France?"


def ask(client: OpenAI, model: str, **options: object) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=32,
        extra_body=options,
    )
    assert answer.model == model
    assert answer.choices[0].message.role == "assistant"
    return answer.choices[0].message.content or ""


def test_models_are_listed(client: OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["smollm2", *ADAPTERS]


def test_each_adapter_answers_in_its_own_way(client: OpenAI) -> None:
    assert "Paris" in ask(client, "smollm2")
    assert set(json.loads(ask(client, "json"))) == {"answer", "confidence"}
    assert "Arr" in ask(client, "pirate")
    assert ask(client, "sql").startswith("SELECT")


def test_answers_name_the_adapter_that_gave_them(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="sql", messages=[{"role": "user", "content": QUESTION}], max_tokens=1
    )

    name, digest = raw.headers["x-loramux-adapter"].split()
    assert name == "sql@1"
    fingerprint = raw.parse().system_fingerprint
    assert fingerprint is not None
    assert digest[:23] in fingerprint


def test_stream_gives_the_same_text_and_usage(client: OpenAI) -> None:
    whole = ask(client, "json")
    stream = client.chat.completions.create(
        model="json",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )

    chunks = list(stream)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_stream_helper_builds_the_message(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="pirate", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=32
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()

    assert final.choices[0].message.content == "".join(deltas)
    assert final.choices[0].finish_reason == "stop"
    assert "Arr" in "".join(deltas)


async def test_base_and_adapters_at_once_answer_as_they_do_alone(
    client: OpenAI, async_client: AsyncOpenAI
) -> None:
    models = ["smollm2", *ADAPTERS]
    alone = {model: ask(client, model) for model in models}

    async def stream(model: str) -> tuple[str, str]:
        chunks = await async_client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=32,
            stream=True,
        )
        return model, "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    together = await asyncio.gather(*(stream(model) for model in models * 4))

    assert [text for _, text in together] == [alone[model] for model, _ in together]


async def test_async_stream_helper_works(async_client: AsyncOpenAI) -> None:
    async with async_client.chat.completions.stream(
        model="sql", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    ) as stream:
        final = await stream.get_final_completion()

    assert (final.choices[0].message.content or "").startswith("SELECT")


def test_choices_of_one_seed_repeat_and_differ_from_each_other(client: OpenAI) -> None:
    def draw() -> list[str]:
        answer = client.completions.create(
            model="smollm2", prompt="Once upon a time", max_tokens=12, temperature=1.5, seed=5, n=3
        )
        return [choice.text for choice in answer.choices]

    first = draw()

    assert draw() == first
    assert len(set(first)) == 3


def test_logprobs_of_chat_and_completion_agree(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="json",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    ).choices[0]

    assert chat.logprobs is not None
    entries = chat.logprobs.content or []
    assert "".join(entry.token for entry in entries) == chat.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert bytes(entry.bytes or []).decode() == entry.token


def test_echo_gives_the_prompts_logprobs(client: OpenAI) -> None:
    choice = client.completions.create(
        model="smollm2",
        prompt="The capital of France is",
        max_tokens=4,
        temperature=0,
        echo=True,
        logprobs=1,
    ).choices[0]

    assert choice.text.startswith("The capital of France is")
    assert choice.logprobs is not None
    tokens = choice.logprobs.tokens or []
    assert "".join(tokens) == choice.text
    first, *others = choice.logprobs.token_logprobs or []
    assert str(first) == "None"  # the client's own types know no null here
    assert all(value <= 0 for value in others)
    assert choice.logprobs.text_offset == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_stop_string_ends_a_stream(client: OpenAI) -> None:
    stream = client.completions.create(
        model="smollm2",
        prompt="1, 2, 3, 4,",
        max_tokens=32,
        temperature=0,
        stop=[" 7", "8"],
        stream=True,
    )

    chunks = list(stream)

    assert "".join(chunk.choices[0].text for chunk in chunks) == " 5, 6,"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_prompts_of_ids_and_text_are_the_same(client: OpenAI, http: httpx.Client) -> None:
    text = "The capital of France is"
    ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]

    answer = client.completions.create(model="smollm2", prompt=[ids, ids], max_tokens=5, temperature=0)
    written = client.completions.create(model="smollm2", prompt=text, max_tokens=5, temperature=0)

    assert [choice.text for choice in answer.choices] == [written.choices[0].text] * 2


def test_errors_are_the_clients_own_classes(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as long:
        client.completions.create(model="sql", prompt="word " * 3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError) as hot:
        client.chat.completions.create(
            model="sql", messages=[{"role": "user", "content": "x"}], temperature=3, stream=True
        )
    assert hot.value.param == "temperature"
