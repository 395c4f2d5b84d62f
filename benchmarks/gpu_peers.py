"""The peers that can be imported, in this process, on the same shape with random weights of their own."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import Shape

Peer = Callable[[Path, Shape, torch.device], Iterator[dict[str, Any]]]


def peers() -> dict[str, Peer]:
    """By the package that each needs."""
    return {"transformers": transformers_batching, "peft": peft_mixed, "vllm": vllm_decode}


def cells(model: Path, shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every peer's cells; one that is not installed or fails says so."""
    for package, peer in peers().items():
        if importlib.util.find_spec(package) is None:
            yield {"name": package, "error": "not installed"}
            continue
        try:
            yield from peer(model, shape, device)
        except Exception as error:  # noqa: BLE001 whatever a peer raises is its result
            yield {"name": package, "error": f"{type(error).__name__}: {error}"[:300]}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def prompts(shape: Shape, rows: int, length: int) -> list[list[int]]:
    """Random ids."""
    rng = random.Random(rows)
    return [[rng.randrange(3, shape.vocab) for _ in range(length)] for _ in range(rows)]


def sizes(shape: Shape, rows: int, output: int = 64) -> tuple[int, int, int]:
    """(rows, prompt, output) of a peer's cell."""
    return (min(rows, 2), 16, 4) if shape.layers < 8 else (rows, 128, output)


def random_model(model: Path, device: torch.device) -> Any:
    """transformers' model of the shape."""
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def transformers_batching(model: Path, shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """`generate_batch`, its continuous batching: prefill is part of the time, as the API gives no steps."""
    transformers = importlib.import_module("transformers")
    base = random_model(model, device)
    base.set_attn_implementation("sdpa")
    rows, prompt, output = sizes(shape, 64, output=256)
    for turn in ("warm", "timed"):
        settings = transformers.GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        began = time.perf_counter()
        answers = base.generate_batch(inputs=prompts(shape, rows, prompt), generation_config=settings)
        took = time.perf_counter() - began
        tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        if turn == "timed":
            yield {"name": f"transformers B={rows}", "tok_s": tokens / took, "tokens": tokens}


def peft_mixed(model: Path, shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """`generate(adapter_names=...)`: the steps after the first."""
    peft = importlib.import_module("peft")
    clock = importlib.import_module("peer_peft").StepClock
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    mixed = peft.get_peft_model(random_model(model, device), config, adapter_name="a0")
    for index in range(1, 8):
        mixed.add_adapter(f"a{index}", config)
    mixed.to(device=device, dtype=torch.bfloat16).eval()
    for wanted in (32, 8):
        rows, prompt, output = sizes(shape, wanted)
        ids = torch.tensor(prompts(shape, rows, prompt), device=device)
        for turn in ("warm", "timed"):
            steps = clock()
            with torch.inference_mode():
                mixed.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=output,
                    min_new_tokens=output,
                    do_sample=False,
                    adapter_names=[f"a{i % 8}" for i in range(rows)],
                    stopping_criteria=importlib.import_module("transformers").StoppingCriteriaList([steps]),
                )
            if device.type == "cuda":
                torch.cuda.synchronize()
            step_s = (time.perf_counter() - steps._began - steps.times[0]) / (len(steps.times) - 1)
            if turn == "timed":
                yield {"name": f"PEFT B={rows} 8 x r16", "step_ms": step_s * 1e3, "tok_s": rows / step_s}


def vllm_decode(model: Path, shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """vLLM's own engine, with and without LoRA switched on; base requests, prefill is part of the time."""
    vllm = importlib.import_module("vllm")
    rows, prompt, output = sizes(shape, 64, output=256)
    settings = vllm.SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for enable_lora in (False, True):
        lora = {"enable_lora": True, "max_loras": 8, "max_lora_rank": 16} if enable_lora else {}
        engine = vllm.LLM(
            str(model), load_format="dummy", max_model_len=4096, gpu_memory_utilization=0.8, **lora
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts(shape, rows, prompt)]
        engine.generate(inputs, settings)
        began = time.perf_counter()
        engine.generate(inputs, settings)
        took = time.perf_counter() - began
        name = f"vLLM B={rows} base" + (", LoRA on" if enable_lora else "")
        yield {"name": name, "tok_s": rows * output / took, "device": device.type}
        del engine
