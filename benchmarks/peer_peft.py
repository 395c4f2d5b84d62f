"""PEFT's mixed batches (`generate(adapter_names=...)`) as a process that is told what to do in JSON lines.

Runs in the peer's own virtual environment, so it imports nothing of loramux. PEFT has no server: these are
figures of the engine alone, without HTTP. A batch begins and ends as one, as no queue of requests does.

    argv: model folder, dtype, adapter folders as NAME=PATH ...
    stdin:  {"prompts": [[ids], ...], "models": ["base" or NAME, ...], "output_len": N}
    stdout: {"times": [seconds of each step's tokens, from the begin of the call]}
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class StepClock(StoppingCriteria):  # type: ignore[misc]  # its base has no types
    """Notes when each step of `generate` has its tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._began = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called once a step; never ends the batch."""
        self.times.append(time.perf_counter() - self._began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(folder: str, dtype: str, adapters: list[str]) -> Any:
    """The model, with adapters where there are any."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    for index, one in enumerate(adapters):
        name, _, path = one.partition("=")
        if index == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    return model.eval()


def answer(model: Any, order: dict[str, Any], *, has_adapters: bool) -> list[float]:
    """Run one batch; the time of every step."""
    clock = StepClock()
    ids = torch.tensor(order["prompts"])
    names = ["__base__" if name == "base" else name for name in order["models"]]
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=order["output_len"],
            min_new_tokens=order["output_len"],
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **({"adapter_names": names} if has_adapters else {}),
        )
    return clock.times


def main() -> None:
    """Answer until stdin ends; an error goes to the log and ends it."""
    folder, dtype, *adapters = sys.argv[1:]
    model = load(folder, dtype, adapters)
    for line in sys.stdin:
        reply = {"times": answer(model, json.loads(line), has_adapters=bool(adapters))}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
