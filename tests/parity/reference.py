"""What transformers and PEFT say: greedy tokens and log-probabilities, one sequence at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers


class Greedy(NamedTuple):
    """A greedy continuation and the log-probabilities it was chosen from."""

    tokens: list[int]
    logprobs: torch.Tensor  # [steps, vocab_size], float32


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

    def __init__(self, folder: Path, adapters: dict[str, Path], *, dtype: str = "float32") -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
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
            known = self._greedy[key] = self._decode(prompt, adapter, steps)
        return Greedy(known.tokens[:steps], known.logprobs[:steps])

    def prompt_logprobs(self, prompt: list[int], adapter: str | None = None) -> torch.Tensor:
        """[len(prompt), vocab_size]: row i is the distribution of token i + 1, from one forward."""
        with self._using(adapter), torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def _decode(self, prompt: list[int], adapter: str | None, steps: int) -> Greedy:
        tokens: list[int] = []
        rows = []
        with self._using(adapter), torch.inference_mode():
            self._model(input_ids=torch.tensor([prompt[:1]]))  # dynamic RoPE forgets the last sequence
            fed, cache = torch.tensor([prompt]), None
            for _ in range(steps):
                out = self._model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                row = torch.log_softmax(out.logits[0, -1].float(), dim=-1)
                tokens.append(int(row.argmax()))
                rows.append(row)
                fed = torch.tensor([tokens[-1:]])
        return Greedy(tokens, torch.stack(rows))

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        if adapter is not None:
            self._model.set_adapter(adapter)
        is_plain = adapter is None and self._has_adapters
        with self._model.disable_adapter() if is_plain else nullcontext():
            yield
