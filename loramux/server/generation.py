"""One call of the API as sequences of the engine: n choices for each prompt, streamed or collected.

Everything that can be refused is refused by `plan`, before the engine hears of the call. A call's
sequences start together and, when the client goes away or one of them fails, end together.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from starlette.types import Scope

from loramux.engine.client import SequenceStream
from loramux.engine.types import Request, TokenSampling
from loramux.server.access.caller import caller_of
from loramux.server.adapters import AdapterRef
from loramux.server.admission import Admission, Ticket
from loramux.server.choice import ChoiceStream, Delta
from loramux.server.delta_stream import sharing_prompts
from loramux.server.edge import at_end
from loramux.server.engine_keeper import EngineKeeper
from loramux.server.limits import Limits, check_count
from loramux.server.observe.call_record import current_call
from loramux.server.prompts import Prompt
from loramux.server.sampling_params import SamplingParams, check_limits, seed_of_choice, to_token_sampling
from loramux.server.tokenizer import Tokenizer

_FOR_EVER_S: Final = 10.0**7
_LARGE: Final = 5000  # log-probabilities: about 10 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A validated call: what to generate, and for whom."""

    prompts: list[Prompt]
    params: SamplingParams
    adapter: AdapterRef | None
    requests: list[Request]  # index in the list = index of the choice
    ticket: Ticket  # its place in the queue

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def is_large(self) -> bool:
        """True if the answer may hold so many log-probabilities that writing it takes many milliseconds."""
        prompt_width = self.params.prompt_logprobs or 0
        width = self.params.logprobs or 0
        answer_tokens = sum(request.sampling.max_tokens for request in self.requests)
        return self.num_prompt_tokens * prompt_width + answer_tokens * width > _LARGE

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
        admission: who may queue.
    """

    def __init__(
        self,
        engine: EngineKeeper,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        limits: Limits,
        admission: Admission,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._limits = limits
        self.admission = admission
        self.num_calls = 0  # in flight now

    def plan(
        self,
        prompts: list[Prompt],
        params: SamplingParams,
        adapter: AdapterRef | None,
        *,
        scope: Scope,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Call:
        """Check a call against the model and the limits, give it a place in the queue, lay out its sequences.

        Args:
            prompts: to continue, each with n choices.
            params: how.
            adapter: that answers; None = the base model.
            scope: of the HTTP request; the place in the queue is given back at its end.
            cache_salt: requests with different ones share no KV.
            priority: lower runs earlier.

        Raises:
            InvalidRequest: a field is out of range, or a prompt does not fit.
            RateLimited: the caller, or the adapter, has too much queued and running.
            Overloaded: the server has.
        """
        self._check_counts(prompts, params)
        ticket = self._admit(prompts, params, adapter, scope)
        stem = uuid.uuid4().hex
        requests: list[Request] = []
        for number, prompt in enumerate(prompts):
            sampling = self._token_sampling(prompt, params)
            for choice in range(params.n):
                requests.append(
                    Request(
                        request_id=f"{stem}-{number * params.n + choice}",
                        prompt_token_ids=prompt.token_ids,
                        sampling=_of_choice(sampling, choice),
                        adapter=adapter.digest if adapter else None,
                        cache_salt=cache_salt,
                        priority=priority,
                    )
                )
        return Call(prompts=prompts, params=params, adapter=adapter, requests=requests, ticket=ticket)

    def check(self, prompts: list[Prompt], params: SamplingParams) -> None:
        """Refuse what `plan` would refuse, before an adapter is loaded for it.

        Raises:
            InvalidRequest: a field is out of range, or a prompt does not fit.
        """
        self._check_counts(prompts, params)
        self._token_sampling(max(prompts, key=lambda prompt: len(prompt.token_ids)), params)

    def sampling_of(self, prompt: Prompt, params: SamplingParams) -> TokenSampling:
        """How a prompt would be sampled, if it were asked for.

        Raises:
            InvalidRequest: a field is out of range, or the prompt does not fit.
        """
        self._check_counts([prompt], params)
        return self._token_sampling(prompt, params)

    def _token_sampling(self, prompt: Prompt, params: SamplingParams) -> TokenSampling:
        return to_token_sampling(
            params,
            self._tokenizer,
            self._engine.info,
            prompt_len=len(prompt.token_ids),
            eos_token_ids=self._eos_token_ids,
        )

    def _admit(
        self, prompts: list[Prompt], params: SamplingParams, adapter: AdapterRef | None, scope: Scope
    ) -> Ticket:
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        ticket = self.admission.admit(
            caller_of(scope),
            adapter.name if adapter else None,
            sequences=len(prompts) * params.n,
            tokens=tokens * params.n,
        )
        at_end(scope, ticket.release)
        return ticket

    def _check_counts(self, prompts: list[Prompt], params: SamplingParams) -> None:
        check_limits(params, self._limits)
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        sequences = len(prompts) * params.n
        check_count("prompt", tokens, self._limits.prompt_tokens, "--max-prompt-tokens", " tokens")
        check_count("n", sequences, self._limits.sequences, "--max-sequences", " sequences (prompts x n)")
        if params.prompt_logprobs is not None:
            values = tokens * params.n * (params.prompt_logprobs + 1)
            flag, limit = "--max-prompt-logprob-values", self._limits.prompt_logprob_values
            check_count("prompt_logprobs", values, limit, flag, " values in an answer")

    def stream(self, call: Call) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices, interleaved as the engine makes them.

        Closing the generator aborts what still runs.

        Raises:
            Overloaded: no first token came within `--max-queue-wait`.
            LoramuxError: the engine refused a sequence, or is gone.
        """
        deltas = self._run(call)
        if call.params.prompt_logprobs is not None and call.params.n > 1:
            return sharing_prompts(deltas, call.params.n)
        return deltas

    async def _run(self, call: Call) -> AsyncGenerator[Delta, None]:
        choices = {
            request.request_id: ChoiceStream(index, request.prompt_token_ids, call.params, self._tokenizer)
            for index, request in enumerate(call.requests)
        }
        queued = {request.request_id: len(request.prompt_token_ids) for request in call.requests}
        record = current_call()
        followed = record.start(call.requests, n=call.params.n)
        if record.keeps_prompts:
            record.prompts += [self._text_of(prompt) for prompt in call.prompts]
        self.num_calls += 1
        wait_s = self.admission.config.max_queue_wait_s or _FOR_EVER_S
        try:
            deadline_s = asyncio.get_running_loop().time() + wait_s
            async with self._engine.open(call.requests, max_wait_s=wait_s) as sequences:
                patience = self._patience(sequences, deadline_s)
                try:
                    async for output in sequences:
                        if queued and (num_tokens := queued.pop(output.request_id, None)) is not None:
                            call.ticket.started(num_tokens)
                            patience.cancel()
                        delta = choices[output.request_id].add(output)
                        if output.timing is not None:
                            record.was_timed(followed[delta.index], output.timing)
                        record.took(
                            followed[delta.index],
                            len(delta.token_ids),
                            delta.finish_reason,
                            delta.num_cached_tokens,
                        )
                        if record.keeps_outputs:
                            followed[delta.index].add_text(delta.text)
                        if delta.finish_reason is not None and output.finish_reason is None:
                            sequences.abort(output.request_id)  # a stop string ended it
                        yield delta
                finally:
                    patience.cancel()
        finally:
            self.num_calls -= 1

    def _text_of(self, prompt: Prompt) -> str:
        """For the log, if the operator wants prompts there."""
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _patience(self, sequences: SequenceStream, deadline_s: float) -> asyncio.TimerHandle:
        """Fails sequences of which none has begun in time; cancelled by the first token of any."""

        def give_up() -> None:
            sequences.fail(self.admission.waited_too_long())

        return asyncio.get_running_loop().call_at(deadline_s, give_up)


def _of_choice(sampling: TokenSampling, choice: int) -> TokenSampling:
    """How a choice is sampled: by a seed of its own, and the first looks at the prompt for all of them."""
    if choice == 0:
        return sampling
    seed = seed_of_choice(sampling.seed, choice)
    return msgspec.structs.replace(sampling, seed=seed, prompt_logprobs=None)
