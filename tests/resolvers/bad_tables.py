"""Wrong adapters whose fault lies in DoRA, in embeddings, or in the output head."""

from __future__ import annotations

from typing import Any

from tests.adapter_files import llama_sites
from tests.resolvers.bad_adapters import MODULES, Q0, VOCABULARY, Bad, P, tensors, zeros

TIED_SITES = llama_sites(vocabulary=VOCABULARY, is_tied=True)
EMBED = f"{P}model.embed_tokens"
HEAD = f"{P}lm_head"
MAGNITUDES = {
    f"{P}{module}.lora_magnitude_vector": zeros(site.out_features) for module, site in MODULES.items()
}
Q_MAGNITUDE = f"{P}{Q0}.lora_magnitude_vector"


def on_embedding(vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """LoRA of rank 4 on the token embedding."""
    return {f"{EMBED}.lora_embedding_A": zeros(4, vocabulary), f"{EMBED}.lora_embedding_B": zeros(16, 4)}


def on_head(vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """LoRA of rank 4 on the output head."""
    return {f"{HEAD}.lora_A.weight": zeros(4, 16), f"{HEAD}.lora_B.weight": zeros(vocabulary, 4)}


def token_rows(table: str, count: int, embed_dim: int = 16) -> dict[str, Any]:
    """Replaced rows of a table."""
    return {f"{table}.token_adapter.trainable_tokens_delta": zeros(count, embed_dim)}


def tied(bad: Bad) -> Bad:
    """The same on a base model whose head shares the embedding's weight."""
    return bad._replace(name=f"{bad.name}, tied", sites=TIED_SITES)


QV = ["q_proj", "v_proj"]
GROWN = "vocabulary of 35 tokens, the base model has 32"
TABLES = [
    tensors("magnitudes without DoRA", MAGNITUDES, "use_dora does not ask for 4 tensors", "magnitude"),
    tensors("DoRA without magnitudes", {}, "4 tensors are missing", "magnitude", use_dora=True),
    tensors("a magnitude missing", {**MAGNITUDES, Q_MAGNITUDE: None}, "1 tensors", Q0, use_dora=True),
    tensors("a long magnitude", {**MAGNITUDES, Q_MAGNITUDE: zeros(17)}, "[17]", "[16]", use_dora=True),
    tensors("a flat embedding", {f"{EMBED}.lora_A.weight": zeros(4, 32)}, "1 of 9 tensors fit no module"),
    tensors("an embedding that is no target", on_embedding(), "does not select 1 of 5", "embed_tokens"),
    tensors("a head that is no target", on_head(), "does not select 1 of 5", "lm_head"),
    tensors("no head", {}, "matched 4 of 5 modules", "lm_head", target_modules=[*QV, "lm_head"]),
    tensors("no embedding", {}, "4 of 5", "embed_tokens", target_modules=[*QV, "embed_tokens"]),
    tensors("grown embedding", on_embedding(35), GROWN, target_modules=[*QV, "embed_tokens"]),
    tensors("grown head", on_head(35), GROWN, target_modules=[*QV, "lm_head"]),
    tensors("shrunk head", on_head(30), "vocabulary of 30 tokens", target_modules=[*QV, "lm_head"]),
    tensors("grown table", {f"{HEAD}.weight": zeros(35, 16)}, GROWN, modules_to_save=["lm_head"]),
    tensors("grown table beside LoRA", {f"{EMBED}.weight": zeros(35, 16)}, GROWN),
    tensors(
        "grown copy",
        {**on_embedding(), f"{EMBED}.base_layer.weight": zeros(35, 16)},
        GROWN,
        target_modules=[*QV, "embed_tokens"],
    ),
    tensors("no table", {}, "1 tensors are missing", "lm_head.full", modules_to_save=["lm_head"]),
    tensors(
        "one table of two",
        {f"{HEAD}.weight": zeros(32, 16)},
        "1 tensors are missing",
        "model.embed_tokens.full",
        modules_to_save=["lm_head", "embed_tokens"],
    ),
    tensors("a table of another width", {f"{HEAD}.weight": zeros(32, 8)}, "[32, 8]", "[32, 16]"),
    tensors("a table nobody asked for", {f"{HEAD}.modules_to_save.weight": zeros(32, 16)}, "modules_to_save"),
    tensors(
        "a table twice in the file",
        {f"{HEAD}.modules_to_save.default.weight": zeros(32, 16), f"{HEAD}.weight": zeros(32, 16)},
        "same weight",
        modules_to_save=["lm_head"],
    ),
    tensors("no rows", {}, "embed_tokens.trainable_tokens", "missing", trainable_token_indices=[1, 2]),
    tensors("rows nobody asked for", token_rows(EMBED, 2), "trainable_token_indices does not ask for"),
    tensors("too few rows", token_rows(EMBED, 2), "[2, 16]", "[3, 16]", trainable_token_indices=[1, 2, 3]),
    tensors("narrow rows", token_rows(EMBED, 2, 8), "[2, 8]", "[2, 16]", trainable_token_indices=[1, 2]),
    tensors(
        "rows and LoRA",
        {**token_rows(EMBED, 2), **on_embedding()},
        "trainable_token_indices and target_modules both change model.embed_tokens",
        target_modules=[*QV, "embed_tokens"],
        trainable_token_indices=[1, 2],
    ),
    tensors(
        "rows and a table",
        {**token_rows(EMBED, 2), f"{EMBED}.weight": zeros(32, 16)},
        "trainable_token_indices and modules_to_save both change model.embed_tokens",
        modules_to_save=["embed_tokens"],
        trainable_token_indices=[1, 2],
    ),
    tied(
        tensors(
            "rows and a head",
            {**token_rows(EMBED, 2), f"{HEAD}.weight": zeros(32, 16)},
            "trainable_token_indices and modules_to_save both change lm_head",
            modules_to_save=["lm_head"],
            trainable_token_indices=[1, 2],
        )
    ),
    tied(
        tensors(
            "rows and DoRA on a head",
            {**token_rows(EMBED, 2), **on_head(), **MAGNITUDES, f"{HEAD}.lora_magnitude_vector": zeros(32)},
            "trainable_token_indices and use_dora both change lm_head",
            target_modules=[*QV, "lm_head"],
            use_dora=True,
            trainable_token_indices=[1, 2],
        )
    ),
    tied(
        tensors(
            "rows that differ",
            {**token_rows(EMBED, 2), **token_rows(HEAD, 2)},
            "ensure_weight_tying wants them equal",
            ensure_weight_tying=True,
            trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [2, 3]},
        )
    ),
    tied(
        tensors(
            "LoRA on one side",
            on_embedding(),
            "matched 5 of 6 modules",
            "lm_head",
            target_modules=[*QV, "embed_tokens"],
            ensure_weight_tying=True,
        )
    ),
    tied(
        tensors(
            "a table on one side",
            {f"{EMBED}.weight": zeros(32, 16)},
            "lm_head.full",
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        )
    ),
    tensors("a wrapper's base", {f"{HEAD}.token_adapter.base_layer.weight": zeros(32, 16)}, "PEFT cannot"),
]  # fmt: skip
