"""How text is sampled, in the words of the API; and its translation into what the engine samples by.

`SamplingParams` is public and free of HTTP: the offline `LLM` takes it as well. It checks ranges that
hold for every model. What depends on the model (vocabulary, context) or on the operator (limits) is
checked by `to_token_sampling` and `check_limits`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from loramux.engine.errors import ContextTooLong, InvalidRequest
from loramux.engine.types import EngineInfo, GrammarSpec, TokenSampling
from loramux.server.limits import Limits
from loramux.server.structured import StructuredOutputsParams, structured_grammar
from loramux.server.tokenizer import Tokenizer

_INT64_MAX: Final = 2**63 - 1
_GREEDY_BELOW: Final = 1e-5  # temperatures under it are greedy
_LOWEST_TEMPERATURE: Final = 0.01  # others are raised to it: logits / t would overflow half precision
_MAX_BIAS: Final = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a caller may ask about sampling; names and defaults are vLLM's.

    Raises:
        InvalidRequest: a value is outside its range; the message names field, value and range.
    """

    n: int = 1  # choices a prompt
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 = all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # choice i is sampled with seed + i; -1 = None
    stop: str | Sequence[str] = ()  # strings that end the text
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()  # strings that never appear
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None = as many as the context holds
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives beside the sampled token
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] = ()  # further alternatives beside the best
    detokenize: bool = True  # False leaves the text empty (offline use)
    skip_special_tokens: bool = True
    shown_special_token_ids: Collection[int] = ()  # special tokens that are shown nevertheless
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None  # what the text must look like
    grammar: GrammarSpec | None = None  # the same, made and tried by the server; wins

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_strings()

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def _check_numbers(self) -> None:
        _check_range("n", self.n, low=1)
        _check_range("temperature", self.temperature, low=0.0, high=2.0)
        _check_range("top_p", self.top_p, low=0.0, high=1.0, above_low=True)
        _check_range("top_k", self.top_k, low=-1, high=_INT64_MAX)
        _check_range("min_p", self.min_p, low=0.0, high=1.0)
        _check_range("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _check_range("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        _check_range("repetition_penalty", self.repetition_penalty, low=0.0, above_low=True)
        # Beyond this, logits would become infinite, and their probabilities no numbers at all.
        _check_range("repetition_penalty", self.repetition_penalty, low=0.01, high=100.0)
        _check_range("seed", self.seed, low=-_INT64_MAX - 1, high=_INT64_MAX)
        _check_range("max_tokens", self.max_tokens, low=1)
        _check_range("min_tokens", self.min_tokens, low=0)
        _check_range("logprobs", self.logprobs, low=0)
        _check_range("prompt_logprobs", self.prompt_logprobs, low=0)
        if self.logprob_token_ids and self.logprobs is None:
            raise InvalidRequest("logprob_token_ids needs logprobs", param="logprob_token_ids")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens must not exceed max_tokens={self.max_tokens}, got {self.min_tokens}"
            raise InvalidRequest(message, param="min_tokens")
        for token_id, bias in self.logit_bias.items():
            if not math.isfinite(bias):
                raise InvalidRequest(f"logit_bias[{token_id}] must be finite, got {bias}", param="logit_bias")

    def _check_strings(self) -> None:
        if "" in self.stop_strings:
            raise InvalidRequest("stop must not hold an empty string", param="stop")
        if self.stop_strings and not self.detokenize:
            raise InvalidRequest("stop needs detokenize=True: strings are found in the text", param="stop")
        if any(not word.strip() for word in self.bad_words):
            raise InvalidRequest("bad_words must not hold an empty string", param="bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty", param="allowed_token_ids")


def check_limits(params: SamplingParams, limits: Limits) -> None:
    """Refuse a request that asks for more than the operator allows.

    Raises:
        InvalidRequest: names field, value, limit and flag.
    """
    _check_limit("n", params.n, limits.n, "--max-n")
    _check_limit("logprobs", params.logprobs or 0, limits.logprobs, "--max-logprobs")
    _check_limit("prompt_logprobs", params.prompt_logprobs or 0, limits.logprobs, "--max-logprobs")
    counts = (
        ("stop", params.stop_strings, limits.stop, "--max-stop"),
        ("stop_token_ids", params.stop_token_ids, limits.stop_token_ids, "--max-stop-token-ids"),
        ("logit_bias", params.logit_bias, limits.logit_bias, "--max-logit-bias"),
        ("allowed_token_ids", params.allowed_token_ids or (), limits.logit_bias, "--max-logit-bias"),
        ("bad_words", params.bad_words, limits.bad_words, "--max-bad-words"),
        (
            *("logprob_token_ids", params.logprob_token_ids),
            *(limits.logprob_token_ids, "--max-logprob-token-ids"),
        ),
    )
    for name, values, limit, flag in counts:
        _check_limit(name, len(values), limit, flag, " entries")
    for name, strings in (("stop", params.stop_strings), ("bad_words", params.bad_words)):
        longest = max(map(len, strings), default=0)
        if longest > limits.string_chars:
            message = f"{name} allows at most {limits.string_chars} characters a string, got {longest}"
            raise InvalidRequest(message, param=name)


def max_new_tokens(params: SamplingParams, info: EngineInfo, prompt_len: int) -> int:
    """Tokens that the sequence may get: what was asked for, cut to what the context holds.

    Raises:
        ContextTooLong: the prompt leaves no room, or max_tokens alone exceeds the context.
    """
    limit = info.max_model_len
    if prompt_len >= limit:
        raise ContextTooLong(
            f"This model's maximum context length is {limit} tokens. However, your prompt contains "
            f"{prompt_len} input tokens, which leaves no room for output tokens. Please reduce the length "
            "of the input prompt.",
            param="input_tokens",
        )
    if params.max_tokens is not None and params.max_tokens > limit:
        raise ContextTooLong(
            f"This model's maximum context length is {limit} tokens. However, max_tokens asks for "
            f"{params.max_tokens} output tokens. Please reduce max_tokens.",
            param="max_tokens",
        )
    room = limit - prompt_len
    wanted = room if params.max_tokens is None else min(params.max_tokens, room)
    if params.min_tokens > wanted:
        message = f"min_tokens must not exceed the {wanted} tokens that may follow, got {params.min_tokens}"
        raise InvalidRequest(message, param="min_tokens")
    return wanted


def to_token_sampling(
    params: SamplingParams,
    tokenizer: Tokenizer,
    info: EngineInfo,
    *,
    prompt_len: int,
    eos_token_ids: Sequence[int],
) -> TokenSampling:
    """The engine's form of the parameters, as the first choice of a prompt is sampled (see `seed_of_choice`).

    Args:
        params: what was asked for.
        tokenizer: turns bad words into ids.
        info: vocabulary and context of the model.
        prompt_len: tokens of the prompt.
        eos_token_ids: what ends a text of this model.

    Raises:
        InvalidRequest: a token id is outside the vocabulary, or nothing fits into the context.
    """
    vocab_size = info.vocab_size
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    check_token_ids("logit_bias", params.logit_bias, vocab_size)
    check_token_ids("logprob_token_ids", params.logprob_token_ids, vocab_size)
    check_token_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    return TokenSampling(
        max_tokens=max_new_tokens(params, info, prompt_len),
        min_tokens=params.min_tokens,
        temperature=_temperature(params.temperature),
        top_k=max(params.top_k, 0),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        seed=None if params.seed == -1 else params.seed,
        logit_bias={
            token_id: min(max(float(bias), -_MAX_BIAS), _MAX_BIAS)
            for token_id, bias in params.logit_bias.items()
        },
        allowed_token_ids=None if params.allowed_token_ids is None else list(params.allowed_token_ids),
        bad_words_token_ids=_bad_word_ids(params.bad_words, tokenizer),
        eos_token_ids=[] if params.ignore_eos else list(eos_token_ids),
        stop_token_ids=list(dict.fromkeys(params.stop_token_ids)),
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        logprob_token_ids=list(dict.fromkeys(params.logprob_token_ids)),
        grammar=_grammar(params),
    )


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """The seed of the choice with this index: seed + index, wrapped into 64 bits."""
    if seed is None or choice == 0:
        return seed
    return (seed + choice + _INT64_MAX + 1) % (2 * (_INT64_MAX + 1)) - _INT64_MAX - 1


def check_token_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Refuse ids that the model has no token for.

    Raises:
        InvalidRequest: names the first such id.
    """
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    first = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    message = f"Token id {first} is out of vocabulary: {name} takes ids from 0 to {vocab_size - 1}"
    raise InvalidRequest(message, param=name)


def _grammar(params: SamplingParams) -> GrammarSpec | None:
    if params.grammar is not None or params.structured_outputs is None:
        return params.grammar
    return structured_grammar(params.structured_outputs, Limits())


def _temperature(value: float) -> float:
    return 0.0 if value < _GREEDY_BELOW else max(float(value), _LOWEST_TEMPERATURE)


def _bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each word, as it stands at a text's start and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelling in (word.lstrip(), f" {word.lstrip()}"):
            found[tuple(tokenizer.encode(spelling, add_special_tokens=False))] = None
    return [list(ids) for ids in found if ids]


def _check_limit(name: str, value: int, limit: int, flag: str, unit: str = "") -> None:
    if value > limit:
        message = f"{name} allows at most {limit}{unit}, got {value} (the server's {flag})"
        raise InvalidRequest(message, param=name)


def _check_range(
    name: str, value: object, *, low: float, high: float = math.inf, above_low: bool = False
) -> None:
    """Refuse a number outside [low, high], or (low, high] with `above_low`; None is always fine.

    A bound that is an int asks for whole numbers.
    """
    if value is None:
        return
    wanted = "an integer" if isinstance(low, int) else "a number"
    kinds = (int,) if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InvalidRequest(f"{name} must be {wanted}, got {value!r}", param=name)
    assert isinstance(value, int | float)
    inside = (low < value if above_low else low <= value) and value <= high
    if inside and value != math.inf:
        return
    bounds = f"greater than {low:g}" if above_low else f"at least {_show(low)}"
    if high != math.inf:
        bounds += f" and at most {_show(high)}"
    raise InvalidRequest(f"{name} must be {bounds}, got {_show(value)}", param=name)


def _show(value: float) -> str:
    if isinstance(value, int) and value.bit_length() > 80:
        return f"an integer of {value.bit_length()} bits"
    return str(value) if isinstance(value, int) else f"{value:g}"
