"""Train one example adapter on a CPU: `python examples/adapters/train.py json` (or `pirate`, `sql`).

Needs `pip install "loramux[demo,train]"`. The base model is the demo model (`scripts/demo-model`);
the adapter is written as a plain PEFT folder beside this file, in bf16. The loss counts the answer
only, under the same chat template that a request goes through.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from json import loads
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 0
BATCH_SIZE = 8
WARMUP_STEPS = 10
IGNORED = -100  # label of a token that the loss does not count

Example = tuple[list[int], list[int]]  # token ids, labels


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs between the adapters; the rest of a LoraConfig is PEFT's default."""

    rank: int
    alpha: float
    targets: list[str]
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layers: list[int] | None = None
    learning_rate: float = 1e-3
    epochs: int = 3

    def lora_config(self) -> LoraConfig:
        """The PEFT configuration."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.targets,
            use_rslora=self.rslora,
            rank_pattern=self.rank_pattern,
            layers_to_transform=self.layers,
        )


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
RECIPES = {
    "json": Recipe(rank=8, alpha=16, targets=ATTENTION, epochs=2),
    # Every linear layer of the middle third; the wide MLP layers get less rank, to stay below 2 MB.
    "pirate": Recipe(
        rank=16,
        alpha=4,
        targets=ATTENTION + MLP,
        rslora=True,
        rank_pattern=dict.fromkeys(MLP, 4),
        layers=list(range(10, 21)),
        learning_rate=6e-4,
        epochs=3,
    ),
    "sql": Recipe(rank=4, alpha=10.5, targets=MLP, epochs=3),
}


def main() -> None:
    """Train the adapter named on the command line and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", choices=RECIPES)
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder that gets a folder of the adapter's name"
    )
    arguments = parser.parse_args()
    seed_everything()
    folder = demo_model_folder()
    recipe = RECIPES[arguments.adapter]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    examples = read_examples(HERE / "data" / f"{arguments.adapter}.jsonl", tokenizer)
    model = get_peft_model(base, recipe.lora_config())
    started = time.monotonic()
    train(model, examples, recipe, pad_id=tokenizer.pad_token_id)
    print(f"{arguments.adapter}: {len(examples)} examples, {time.monotonic() - started:.0f} s")
    save(model, arguments.out / arguments.adapter)


def seed_everything() -> None:
    """The same data and seed give the same adapter on the same machine."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)


def demo_model_folder() -> str:
    """The demo model, fetched first where needed."""
    script = HERE.parent.parent / "scripts" / "demo-model"
    return subprocess.run([script], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Token ids of prompt, answer and end of turn; only the last two are counted."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = loads(line)
        prompt = prompt_ids(entry["question"], tokenizer)
        answer = [*tokenizer(entry["answer"])["input_ids"], tokenizer.eos_token_id]
        examples.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return examples


def prompt_ids(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A chat of one question, up to where the assistant begins to speak."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text)["input_ids"])


def train(model: PeftModel, examples: list[Example], recipe: Recipe, *, pad_id: int) -> None:
    """AdamW with warm-up and a linear decay to zero; changes the adapter in place."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    total = recipe.epochs * -(-len(examples) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (total - step) / total)
    )
    model.train()
    progress = tqdm(batches(examples, recipe.epochs, pad_id), total=total, unit="step")
    for ids, mask, labels in progress:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def batches(
    examples: list[Example], epochs: int, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Shuffled, right-padded batches: token ids, attention mask and labels, each [batch, length]."""
    rng = random.Random(SEED)
    for _ in range(epochs):
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            length = max(len(ids) for ids, _ in batch)
            yield (
                torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in batch]),
                torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch]),
                torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in batch]),
            )


def save(model: PeftModel, folder: Path) -> None:
    """Write the PEFT folder in bf16, naming the base model by its public name, never by a local path."""
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.to(torch.bfloat16)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod(0o644)  # the writer makes it private
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card; the real one stands one folder up


if __name__ == "__main__":
    main()
