"""What every peer is asked: the same prompts through the client of `loramux bench`, in the words of each API.

A prompt is made of tokens that are whole words (a space and letters): as text they become the same tokens
again, so that an API that takes text only gets the very same prompt as one that takes token ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop
from tokenizers import Tokenizer

from loramux.server import bench, bench_figures
from loramux.server.bench_figures import Sample

_NO_DONE = "the stream ended without [DONE]"


class PromptMaker:
    """Random prompts of an exact number of tokens."""

    def __init__(self, model: Path) -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        self._ids = sorted(
            i for word, i in vocab.items() if word[0] == "Ġ" and word[1:].isascii() and word[1:].isalpha()
        )

    def ids(self, rng: random.Random, length: int) -> list[int]:
        """Token ids."""
        return rng.choices(self._ids, k=length)

    def text(self, ids: Sequence[int]) -> str:
        """The text that is tokenized to exactly these ids.

        Raises:
            ValueError: it is not.
        """
        text: str = self._tokenizer.decode(ids)
        if self._tokenizer.encode(text, add_special_tokens=False).ids != list(ids):
            raise ValueError(f"{text!r} is not tokenized to the ids it was made of")
        return text


@dataclass(frozen=True)
class Dialect:
    """How an API differs from vLLM's.

    Attributes:
        kind: `openai` (vLLM, loramux), `llamacpp` (adapters by number in `lora`), or `transformers` (text
            prompts, few fields, no [DONE]).
        adapters: the adapters in the order in which the server was given them.
        model: the name to send where the API has one model only.
    """

    kind: str = "openai"
    adapters: tuple[str, ...] = ()
    model: str = ""

    def body(self, plain: dict[str, Any], prompts: PromptMaker) -> dict[str, Any]:
        """A request of `bench.Client` in this API's words."""
        if self.kind == "llamacpp":
            scales = [float(name == plain["model"]) for name in self.adapters]  # all: one left out may apply
            lora = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
            return {**plain, "cache_prompt": False, "lora": lora}
        if self.kind == "transformers":
            settings = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": plain["max_tokens"]}
            return {
                "model": self.model,
                "prompt": prompts.text(plain["prompt"]),
                "max_tokens": plain["max_tokens"],
                "stream": True,
                "generation_config": json.dumps(settings),
            }
        return plain


class PeerClient(bench.Client):
    """`loramux bench`'s client with our prompts and a peer's words."""

    def __init__(self, workload: bench.Workload, dialect: Dialect, prompts: PromptMaker) -> None:
        super().__init__(workload, None)
        self._dialect = dialect
        self._prompts = prompts
        self._prompt_rng = random.Random(workload.seed)

    def body(self, model: str, input_len: int, output_len: int) -> dict[str, Any]:
        """A request with a prompt of whole words."""
        plain = super().body(model, input_len, output_len)
        return self._dialect.body(
            {**plain, "prompt": self._prompts.ids(self._prompt_rng, input_len)}, self._prompts
        )

    async def send(self, body: dict[str, Any]) -> Sample:
        """Send; an answer with all its tokens is complete, even if no [DONE] follows."""
        sample = await super().send(body)
        if sample.error == _NO_DONE and sample.completion_tokens == body["max_tokens"]:
            return replace(sample, error=None)
        return sample


def measure_streams(client: PeerClient, workload: bench.Workload, concurrency: int) -> dict[str, Any]:
    """One run of `concurrency` streams: the figures of `loramux bench`, and whether all tokens came."""
    samples = uvloop.run(bench.run_streams(client, workload, concurrency))
    wanted = len(samples) * workload.output_len
    return _checked(bench_figures.summarise(samples, concurrency), samples, wanted)


def measure_prefill(client: PeerClient, workload: bench.Workload) -> dict[str, Any]:
    """Lone prompts for one token each."""
    assert workload.prefill_len is not None
    samples = uvloop.run(bench.run_prefill(client, workload, workload.prefill_len))
    return _checked(bench_figures.summarise_prefill(samples, workload.prefill_len), samples, len(samples))


def _checked(row: dict[str, Any], samples: list[Sample], wanted: int) -> dict[str, Any]:
    """The row, with an error when there were too few or too many tokens: such a figure compares nothing."""
    got = sum(s.completion_tokens for s in samples)
    if not row["errors"] and got != wanted:
        return {
            **row,
            "errors": len(samples),
            "first_error": f"{got} tokens came where {wanted} were asked for",
        }
    return row
