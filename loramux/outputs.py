"""What the offline API returns: one `RequestOutput` a prompt, one `CompletionOutput` a choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The adapter that a call is answered by.

    Args:
        lora_name: how it is called in results.
        lora_int_id: accepted for compatibility; an adapter is known by its content.
        lora_path: the folder that PEFT's `save_pretrained` wrote.
        base_model_name: accepted for compatibility.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str | Path = ""
    base_model_name: str | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position."""

    logprob: float
    rank: int | None = None  # 1 = the most likely token
    decoded_token: str | None = None


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One choice."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # by token id, one a generated token
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None  # the stop token or string; None for the end token
    lora_request: LoRARequest | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The answer to one prompt."""

    request_id: str
    prompt: str | None  # None when the prompt came as ids
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    lora_request: LoRARequest | None = None
    num_cached_tokens: int = 0
