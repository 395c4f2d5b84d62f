"""One sequence as text: what the engine says about ids, turned into what a caller sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loramux.engine.errors import EngineDead
from loramux.engine.types import SequenceOutput, TokenLogprobs
from loramux.server.detokenizer import TextStream
from loramux.server.sampling_params import SamplingParams
from loramux.server.tokenizer import Tokenizer


@dataclass(slots=True)
class Delta:
    """What one step added to one choice, or the whole choice when deltas are joined."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a token, if asked for
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None  # the stop token or string; None for the end token
    num_cached_tokens: int = 0  # of the prompt; in the first delta
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # in the first delta, if asked for

    def join(self, other: Delta) -> None:
        """Append the next delta of the same choice."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        self.stop_reason = other.stop_reason
        self.num_cached_tokens = self.num_cached_tokens or other.num_cached_tokens
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs


class ChoiceStream:
    """Turns the engine's outputs for one sequence into deltas of text.

    Args:
        index: the choice's number in the answer.
        prompt_token_ids: what it continues.
        params: for stop strings and the like.
        tokenizer: the model's.
    """

    def __init__(
        self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self._index = index
        self._detokenize = params.detokenize
        self._text = TextStream(
            tokenizer,
            prompt_token_ids,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            shown_special_token_ids=params.shown_special_token_ids,
            min_tokens=params.min_tokens,
        )

    def add(self, output: SequenceOutput) -> Delta:
        """The next delta. With a `finish_reason` that the output has not (a stop string was found),
        the sequence must be aborted in the engine.
        """
        if output.finish_reason == "abort":
            raise EngineDead("the engine aborted the request")
        delta = Delta(
            self._index,
            token_ids=output.token_ids,
            logprobs=output.logprobs or [],
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            num_cached_tokens=output.num_cached_tokens,
            prompt_logprobs=output.prompt_logprobs,
        )
        if self._detokenize:
            ends = output.finish_reason == "stop" and not output.last_is_text
            self._add_text(delta, output.token_ids[-1] if ends and output.token_ids else None)
        return delta

    def _add_text(self, delta: Delta, ended_by: int | None) -> None:
        """Args:
        delta: gets its text.
        ended_by: the last token, if it is the end and no text.
        """
        token_ids = delta.token_ids
        plain = token_ids if ended_by is None else token_ids[:-1]
        pieces: list[str] = []
        for position, token_id in enumerate(plain, start=1):
            pieces.append(self._text.add(token_id))
            if self._text.matched_stop is not None:
                delta.token_ids = token_ids[:position]
                delta.logprobs = delta.logprobs[:position]
                break
        else:
            if delta.finish_reason is not None:
                pieces.append(self._text.finish(ended_by))
        delta.text = "".join(pieces)
        if self._text.matched_stop is not None:
            delta.finish_reason = "stop"
            delta.stop_reason = self._text.matched_stop
