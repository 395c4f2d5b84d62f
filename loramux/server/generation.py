"""One call of the API as sequences of the engine: n choices for each prompt, streamed or collected.

Everything that can be refused is refused by `plan`, before the engine hears of the call. A call's
sequences start together and, when the client goes away or one of them fails, end together.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec

from loramux.engine.client import EngineClient
from loramux.engine.types import Request
from loramux.server.adapters import AdapterRef
from loramux.server.choice import ChoiceStream, Delta
from loramux.server.limits import Limits
from loramux.server.prompts import Prompt
from loramux.server.sampling_params import SamplingParams, check_limits, seed_of_choice, to_token_sampling
from loramux.server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A validated call: what to generate, and for whom."""

    prompts: list[Prompt]
    params: SamplingParams
    adapter: AdapterRef | None
    requests: list[Request]  # index in the list = index of the choice

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that a choice continues."""
        return self.prompts[index // self.params.n]


class Generator:
    """Plans calls and runs them.

    Args:
        engine: a started client.
        tokenizer: the model's.
        eos_token_ids: tokens that end a text.
        limits: what one call may ask for.
    """

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer, *, eos_token_ids: Sequence[int], limits: Limits
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._limits = limits
        self.num_calls = 0  # in flight now

    def plan(
        self,
        prompts: list[Prompt],
        params: SamplingParams,
        adapter: AdapterRef | None,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Call:
        """Check a call against the model and the limits, and lay out its sequences.

        Raises:
            InvalidRequest: a field is out of range, or a prompt does not fit.
        """
        check_limits(params, self._limits)
        stem = uuid.uuid4().hex
        requests: list[Request] = []
        for number, prompt in enumerate(prompts):
            sampling = to_token_sampling(
                params,
                self._tokenizer,
                self._engine.info,
                prompt_len=len(prompt.token_ids),
                eos_token_ids=self._eos_token_ids,
            )
            for choice in range(params.n):
                seed = seed_of_choice(sampling.seed, choice)
                requests.append(
                    Request(
                        request_id=f"{stem}-{number * params.n + choice}",
                        prompt_token_ids=prompt.token_ids,
                        sampling=msgspec.structs.replace(sampling, seed=seed) if choice else sampling,
                        adapter=adapter.digest if adapter else None,
                        cache_salt=cache_salt,
                        priority=priority,
                    )
                )
        return Call(prompts=prompts, params=params, adapter=adapter, requests=requests)

    async def stream(self, call: Call) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices, interleaved as the engine makes them.

        Closing the generator aborts what still runs.

        Raises:
            LoramuxError: the engine refused a sequence, or is gone.
        """
        choices = {
            request.request_id: ChoiceStream(index, request.prompt_token_ids, call.params, self._tokenizer)
            for index, request in enumerate(call.requests)
        }
        self.num_calls += 1
        try:
            async with self._engine.open(call.requests) as sequences:
                async for output in sequences:
                    delta = choices[output.request_id].add(output)
                    if delta.finish_reason is not None and output.finish_reason is None:
                        sequences.abort(output.request_id)  # a stop string ended it
                    yield delta
        finally:
            self.num_calls -= 1

    async def collect(self, call: Call) -> list[Delta]:
        """Every choice whole, by index."""
        choices = [Delta(index) for index in range(len(call.requests))]
        async for delta in self.stream(call):
            choices[delta.index].join(delta)
        return choices
