"""What may happen to deltas between the generator and the answer: fewer and larger ones, or an echo."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from loramux.engine.types import TokenLogprobs
from loramux.server.choice import Delta


async def spaced(deltas: AsyncGenerator[Delta, None], interval: int) -> AsyncGenerator[Delta, None]:
    """Each choice's first delta at once, then one for every `interval` tokens, and the last.

    Args:
        deltas: closed with this.
        interval: tokens, at least 1.
    """
    held: dict[int, Delta] = {}
    begun: set[int] = set()
    async with aclosing(deltas) as source:
        async for delta in source:
            if delta.index in held:
                held[delta.index].join(delta)
            else:
                held[delta.index] = delta
            waiting = held[delta.index]
            is_due = delta.index not in begun or len(waiting.token_ids) >= interval
            if is_due or waiting.finish_reason is not None:
                begun.add(delta.index)
                yield held.pop(delta.index)


async def echoing(deltas: AsyncGenerator[Delta, None], text: str) -> AsyncGenerator[Delta, None]:
    """The same deltas, with `text` in front of each choice's own.

    Args:
        deltas: closed with this.
        text: that the answer continues.
    """
    begun: set[int] = set()
    async with aclosing(deltas) as source:
        async for delta in source:
            if delta.index not in begun:
                begun.add(delta.index)
                delta.text = text + delta.text
            yield delta


async def sharing_prompts(deltas: AsyncGenerator[Delta, None], n: int) -> AsyncGenerator[Delta, None]:
    """The same deltas, where each choice begins with what the first one of its prompt says of the prompt.

    The others wait for it.

    Args:
        deltas: closed with this; only first choices have `prompt_logprobs`.
        n: choices a prompt.
    """
    found: dict[int, list[TokenLogprobs | None] | None] = {}  # prompt -> its log-probabilities
    held: dict[int, Delta] = {}
    begun: set[int] = set()
    async with aclosing(deltas) as source:
        async for delta in source:
            if delta.index in held:
                held[delta.index].join(delta)
            else:
                held[delta.index] = delta
            prompt = delta.index // n
            if delta.index % n == 0:
                found.setdefault(prompt, delta.prompt_logprobs)
            if prompt not in found:
                continue
            for index in [index for index in held if index // n == prompt]:
                ready = held.pop(index)
                if index not in begun:
                    begun.add(index)
                    ready.prompt_logprobs = found[prompt]
                yield ready
