"""What the generating routes share: tolerant requests, the sampling fields, usage.

Requests are pydantic models: unknown fields are ignored, `null` equals absent, and types are strict
where OpenAI's are (the string "5" is not a number). Answers are msgspec structs, since a chunk a token
is encoded: a struct costs about 2 us where a pydantic model costs 20.
"""

from __future__ import annotations

from typing import Any, Final, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from loramux.engine.errors import InvalidRequest
from loramux.server.api_config import ApiConfig
from loramux.server.errors import explain_validation
from loramux.server.sampling_params import SamplingParams
from loramux.server.structured import refuse_guided


class RequestModel(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: entry for name, entry in value.items() if entry is not None}
        return value

    @classmethod
    def checked(cls, value: dict[str, Any]) -> Self:
        """A body that the framework did not check.

        Raises:
            InvalidRequest: names the first field that is wrong.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
            message, param = explain_validation(problems)
            raise InvalidRequest(message, param=param) from error


class StreamOptions(RequestModel):
    """`stream_options` of a streaming request."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(RequestModel):
    """Fields of completions and chat completions alike; those without a default come from the model."""

    model: str | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    bad_words: list[str] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: dict[str, float] = {}
    allowed_token_ids: list[int] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    stream_interval: int | None = None
    logprob_token_ids: list[int] = []
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str = ""
    priority: int = 0
    request_id: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    # Read only to be refused: ignoring them would answer something else than was asked for.
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    repetition_detection: dict[str, Any] | None = None
    thinking_token_budget: int | None = None
    media_io_kwargs: dict[str, Any] = {}
    mm_processor_kwargs: dict[str, Any] = {}
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    guided_whitespace_pattern: Any = None

    def to_params(
        self, defaults: dict[str, Any], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """The sampling parameters; fields that the request leaves out come from `defaults`.

        Raises:
            InvalidRequest: a value is out of range.
        """
        given = {name: getattr(self, name) for name in _DEFAULTED if getattr(self, name) is not None}
        kept = {name: defaults[name] for name in _DEFAULTED if name in defaults}
        return SamplingParams(
            **{**kept, **given},
            n=self.n,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            bad_words=self.bad_words,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logprob_token_ids=self.logprob_token_ids,
            skip_special_tokens=self.skip_special_tokens,
            logit_bias=_token_ids_of(self.logit_bias),
            allowed_token_ids=self.allowed_token_ids,
        )

    def check_supported(self) -> None:
        """Refuse what this server cannot do, and combinations that make no sense.

        Raises:
            InvalidRequest: names the field.
        """
        self._check_not_built()
        refuse_guided(vars(self))
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs:
            raise InvalidRequest("prompt_logprobs does not go with stream: true", param="prompt_logprobs")
        if self.stream_interval is not None and self.stream_interval < 1:
            message = f"stream_interval must be at least 1, got {self.stream_interval}"
            raise InvalidRequest(message, param="stream_interval")
        if abs(self.priority) > _MAX_PRIORITY:
            message = f"priority must be from -{_MAX_PRIORITY} to {_MAX_PRIORITY}"
            raise InvalidRequest(message, param="priority")
        if len(self.cache_salt) > 128:
            message = f"cache_salt allows at most 128 characters, got {len(self.cache_salt)}"
            raise InvalidRequest(message, param="cache_salt")
        if self.truncate_prompt_tokens is not None and (self.truncate_prompt_tokens or -2) < -1:
            message = f"truncate_prompt_tokens must be at least 1, or -1, got {self.truncate_prompt_tokens}"
            raise InvalidRequest(message, param="truncate_prompt_tokens")

    def apply(self, api: ApiConfig) -> None:
        """Fill in what the operator decides where the request does not, or whatever it says."""
        if self.return_tokens_as_token_ids is None:
            self.return_tokens_as_token_ids = api.tokens_as_token_ids
        if self.stream_interval is None:
            self.stream_interval = api.stream_interval
        if self.stream and api.force_include_usage:
            self.stream_options = StreamOptions(include_usage=True, continuous_usage_stats=True)

    def _check_not_built(self) -> None:
        """Refuse what this server has no code for."""
        if self.use_beam_search:
            raise InvalidRequest("use_beam_search is not supported", param="use_beam_search")
        if self.length_penalty != 1.0:
            message = "length_penalty is not supported: there is no beam search"
            raise InvalidRequest(message, param="length_penalty")
        if self.best_of is not None and self.best_of > self.n:
            message = (
                f"best_of is not supported beyond n={self.n}, got {self.best_of}; ask for n choices instead"
            )
            raise InvalidRequest(message, param="best_of")
        if self.thinking_token_budget is not None and self.thinking_token_budget >= 0:
            message = "thinking_token_budget is not supported; limit the whole answer with max_tokens"
            raise InvalidRequest(message, param="thinking_token_budget")
        for name in ("repetition_detection", "media_io_kwargs", "mm_processor_kwargs"):
            if getattr(self, name):
                raise InvalidRequest(f"{name} is not supported", param=name)


_MAX_PRIORITY: Final = 2**31 - 1
_DEFAULTED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def _token_ids_of(logit_bias: dict[str, float]) -> dict[int, float]:
    for key in logit_bias:
        if not (key.isascii() and key.removeprefix("-").isdigit() and len(key) <= 20):
            raise InvalidRequest(f"logit_bias takes token ids as keys, got {key[:50]!r}", param="logit_bias")
    return {int(key): bias for key, bias in logit_bias.items()}


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What the answer's tokens were for."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one call, all prompts and choices together; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # of models that reason


class RequestMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a request with one choice (vLLM's `--enable-per-request-metrics`)."""

    time_to_first_token_ms: float
    generation_time_ms: float  # from the first token to the last
    queue_time_ms: float | None
    mean_itl_ms: float | None  # null for a single token
    tokens_per_second: float | None
    speculative_decoding: None = None


class PromptLogprob(msgspec.Struct, frozen=True):
    """One candidate at one prompt position (a vLLM extension)."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]

__all__ = [
    "UNSET",
    "CompletionTokensDetails",
    "GenerationRequest",
    "PromptLogprob",
    "PromptLogprobs",
    "PromptTokensDetails",
    "RequestMetrics",
    "RequestModel",
    "StreamOptions",
    "UnsetType",
    "Usage",
]
