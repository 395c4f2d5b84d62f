"""What transformers and PEFT say: greedy tokens and log-probabilities, one sequence at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers

MIN_GAP = 2e-5  # between the two best tokens: no weaker than what the order of additions moves

Steer = Callable[[torch.Tensor, list[int]], torch.Tensor]  # (logits [vocab_size], output so far) -> logits
Choose = Callable[[torch.Tensor, list[int]], int]  # the same -> next token


class Greedy(NamedTuple):
    """A greedy continuation and the log-probabilities it was chosen from."""

    tokens: list[int]
    logprobs: torch.Tensor  # [steps, vocab_size], float32


def _best(row: torch.Tensor) -> int:
    first, second = row.topk(2).values
    assert first - second > MIN_GAP, "the reference itself is at a tie: take another seed"
    return int(row.argmax())


def _with_adapters(folders: Iterable[Path], base: Any) -> Any:
    """Put every adapter on `base`, each under its folder's name."""
    first, *others = folders
    with warnings.catch_warnings():  # e.g. fan_in_fan_out on a Linear, which PEFT reports and ignores
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, first, adapter_name=first.name)
        for folder in others:
            model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


class Reference:
    """A checkpoint with adapters on it, run without batching; answers are remembered."""

    def __init__(
        self, folder: Path, adapters: dict[str, Path], *, dtype: str = "float32", attention: str = "sdpa"
    ) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()
        self.config: Any = self._model.config
        self._has_adapters = bool(adapters)
        if adapters:
            self._model = _with_adapters(adapters.values(), self._model)
        self._greedy: dict[tuple[str | None, tuple[int, ...]], Greedy] = {}

    def greedy(self, prompt: list[int], adapter: str | None = None, steps: int = 64) -> Greedy:
        """`steps` greedy tokens from one prefill and a cached decode, as `generate` does."""
        key = (adapter, tuple(prompt))
        known = self._greedy.get(key)
        if known is None or len(known.tokens) < steps:
            logits, tokens = self._decode(prompt, adapter, steps, lambda row, _: _best(row))
            known = self._greedy[key] = Greedy(tokens, torch.log_softmax(logits, dim=-1))
        return Greedy(known.tokens[:steps], known.logprobs[:steps])

    def steered(self, prompt: list[int], steps: int, steer: Steer) -> list[int]:
        """Greedy tokens of the base model after `steer` has changed the logits of each step."""
        return self._decode(prompt, None, steps, lambda row, output: _best(steer(row, output)))[1]

    def follow(self, prompt: list[int], tokens: list[int], adapter: str | None = None) -> torch.Tensor:
        """[len(tokens), vocab_size] logits of a cached decode that is made to say `tokens`."""
        return self._decode(prompt, adapter, len(tokens), lambda _, output: tokens[len(output)])[0]

    def logits(self, tokens: list[int], adapter: str | None = None) -> torch.Tensor:
        """[len(tokens), vocab_size] from one forward; row i is what follows token i."""
        with self._using(adapter), torch.inference_mode():
            self._forget(tokens)
            logits: torch.Tensor = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        return logits[0].float()

    def logprobs(self, tokens: list[int], adapter: str | None = None) -> torch.Tensor:
        """`logits`, as log-probabilities."""
        return torch.log_softmax(self.logits(tokens, adapter), dim=-1)

    def _decode(
        self, prompt: list[int], adapter: str | None, steps: int, choose: Choose
    ) -> tuple[torch.Tensor, list[int]]:
        tokens: list[int] = []
        rows = []
        with self._using(adapter), torch.inference_mode():
            self._forget(prompt)
            fed, cache = torch.tensor([prompt]), None
            for _ in range(steps):
                out = self._model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                rows.append(out.logits[0, -1].float())
                tokens.append(choose(rows[-1], tokens))
                fed = torch.tensor([tokens[-1:]])
        return torch.stack(rows), tokens

    def _forget(self, prompt: list[int]) -> None:
        """Dynamic RoPE remembers the longest sequence until a short one comes along."""
        rope = getattr(self.config, "rope_parameters", None) or {}  # OPT has none
        if rope.get("rope_type") == "dynamic":
            self._model(input_ids=torch.tensor([prompt[:1]]), use_cache=False)

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        if adapter is not None:
            self._model.set_adapter(adapter)
        is_plain = adapter is None and self._has_adapters
        with self._model.disable_adapter() if is_plain else nullcontext():
            yield
