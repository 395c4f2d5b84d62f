"""Prompts with a real tokenizer: what truncation keeps, and what it does not look at."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from loramux.server.api_config import ApiConfig
from loramux.server.chat_template import ChatTemplate
from loramux.server.limits import Limits
from loramux.server.prompts import PromptBuilder, Side
from loramux.server.schemas.chat import ChatMessage
from loramux.server.tokenizer import Tokenizer
from tests.demo import demo_model_folder

WORDS = [
    *("the", "of", "und", "grün", "🌿", "function(x)", "{return", "x*2;}"),
    *("", "\n\n", "12345", "antidisestablishmentarianism", "..."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_model_folder())


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> PromptBuilder:
    return PromptBuilder(
        tokenizer, None, vocab_size=49152, max_model_len=256, limits=Limits(), api=ApiConfig(), guard=None
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 7, 100])
def test_truncation_keeps_what_it_would_keep_of_all_tokens(
    prompts: PromptBuilder, tokenizer: Tokenizer, side: Side, keep: int
) -> None:
    draw = random.Random(keep)
    text = " ".join(draw.choice(WORDS) for _ in range(30_000))
    whole = tokenizer.encode(text)

    (prompt,) = asyncio.run(prompts.from_completion(text, truncate=keep, truncation_side=side))

    assert prompt.token_ids == (whole[-keep:] if side == "left" else whole[:keep])


def test_text_that_is_cut_away_is_not_tokenized(prompts: PromptBuilder) -> None:
    text = "some words " * 2_000_000
    began_s = time.process_time()

    (prompt,) = asyncio.run(prompts.from_completion(text, truncate=8))

    assert len(prompt.token_ids) == 8
    assert time.process_time() - began_s < 1.0  # all of it would take 20 s


def test_slow_template_leaves_the_event_loop_after_its_first_time(tokenizer: Tokenizer) -> None:
    threads: list[int] = []
    template = ChatTemplate("{{ note() }}{% for i in range(90000) %}{% endfor %}", {})
    prompts = PromptBuilder(
        tokenizer,
        template,
        vocab_size=49152,
        max_model_len=10**6,
        limits=Limits(),
        api=ApiConfig(),
        guard=None,
    )

    def note() -> str:
        threads.append(threading.get_ident())
        return "x"

    async def make() -> None:
        for _ in range(2):
            await prompts.from_chat([ChatMessage(role="user", content="x")], options={"note": note})

    asyncio.run(make())

    assert threads[0] == threading.get_ident()
    assert threads[1] != threads[0]
