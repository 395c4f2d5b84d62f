"""The parts of all ranks together are the model, and every rank's part looks like a smaller model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loramux.engine.errors import InvalidConfig, UnsupportedModel
from loramux.engine.models.families import ModelConfig, load_model_config
from loramux.engine.models.weights import Checkpoint
from loramux.engine.parallel.shard import Piece, shard_model, whole_model
from tests.tiny_models import make_tiny

LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2", tmp_path_factory.mktemp("model"), vocab_size=133)


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return load_model_config(folder)


def parts_of(folder: Path, config: ModelConfig, name: str, size: int) -> list[torch.Tensor]:
    """What each rank reads of a tensor."""
    parts = []
    whole = load_file(folder / "model.safetensors")[name]
    for rank in range(size):
        pieces = shard_model(config, rank, size).pieces
        shape = tuple(whole[pieces[name].index].shape)
        with Checkpoint(folder, dtype=torch.float32, device=torch.device("cpu"), pieces=pieces) as checkpoint:
            parts.append(checkpoint.take(name, shape))
    return parts


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        (f"{LAYER}self_attn.q_proj.weight", 0),
        (f"{LAYER}self_attn.q_proj.bias", 0),
        (f"{LAYER}self_attn.v_proj.bias", 0),
        (f"{LAYER}self_attn.o_proj.weight", 1),
        (f"{LAYER}mlp.gate_proj.weight", 0),
        (f"{LAYER}mlp.down_proj.weight", 1),
        ("model.embed_tokens.weight", 0),
    ],
)
def test_the_ranks_hold_a_tensor_between_them(folder: Path, config: ModelConfig, name: str, dim: int) -> None:
    parts = parts_of(folder, config, name, 2)

    assert torch.equal(torch.cat(parts, dim=dim), load_file(folder / "model.safetensors")[name])
    assert all(part.shape[dim] > 0 for part in parts)


def test_more_ranks_than_kv_heads_share_them(folder: Path, config: ModelConfig) -> None:
    stored = load_file(folder / "model.safetensors")[f"{LAYER}self_attn.k_proj.weight"]
    first, second = stored.chunk(2)  # of two KV heads

    parts = parts_of(folder, config, f"{LAYER}self_attn.k_proj.weight", 4)

    assert [torch.equal(part, head) for part, head in zip(parts, (first, first, second, second), strict=True)]
    assert [shard_model(config, rank, 4).own.num_kv_heads for rank in range(4)] == [1, 1, 1, 1]
    assert [shard_model(config, rank, 4).own.num_heads for rank in range(4)] == [1, 1, 1, 1]


def test_a_rank_is_a_smaller_model(config: ModelConfig) -> None:
    shard = shard_model(config, 1, 2)

    assert (shard.own.num_heads, shard.own.num_kv_heads) == (config.num_heads // 2, config.num_kv_heads // 2)
    assert [site.in_features for site in shard.own.sites] == [48, 24, 48, 40]
    assert [site.out_features for site in shard.own.sites] == [48, 48, 80, 48]
    assert (shard.vocab_per_rank, shard.num_vocab_rows, shard.vocab_rows) == (67, 66, slice(67, 133))


def test_what_lora_is_cut_by_follows_its_site(config: ModelConfig) -> None:
    shard = shard_model(config, 1, 2)

    assert shard.rows(f"{LAYER}self_attn.k_proj") == slice(12, 24)
    assert shard.columns(f"{LAYER}self_attn.k_proj") == slice(None)
    assert shard.columns(f"{LAYER}mlp.down_proj") == slice(40, 80)
    assert shard.rows(f"{LAYER}mlp.down_proj") == slice(None)


def test_one_rank_holds_a_bias_that_is_added_to_a_sum(tmp_path: Path) -> None:
    config = load_model_config(make_tiny("opt", tmp_path))

    assert [[site.bias for site in shard_model(config, rank, 2).own.sites] for rank in (0, 1)] == [
        [True, True, True, True],
        [True, False, True, False],
    ]


def test_one_rank_has_everything(config: ModelConfig) -> None:
    shard = shard_model(config, 0, 1)

    assert shard == whole_model(config)
    assert shard.own is config
    assert shard.pieces == {}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "size", "number"),
    [
        (9, 3, 96, 2, "9 attention heads"),
        (12, 4, 81, 2, "81 MLP features"),
        (12, 4, 96, 6, "4 KV heads"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_with_the_numbers(
    tmp_path: Path, heads: int, kv_heads: int, inner: int, size: int, number: str
) -> None:
    folder = make_tiny(
        "llama",
        tmp_path,
        hidden_size=12 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
    )
    config = load_model_config(folder)

    with pytest.raises(InvalidConfig, match=f"--tensor-parallel-size {size}: the model's {number}"):
        shard_model(config, 0, size)


def test_a_stored_tensor_of_another_shape_is_refused_whichever_part_is_read(
    folder: Path,
) -> None:
    name = f"{LAYER}mlp.up_proj.weight"
    pieces = {name: Piece((78, 48), rows=slice(0, 39))}
    with (
        Checkpoint(folder, dtype=torch.float32, device=torch.device("cpu"), pieces=pieces) as checkpoint,
        pytest.raises(UnsupportedModel, match=r"has shape \[80, 48\], config.json implies \[78, 48\]"),
    ):
        checkpoint.take(name, (39, 48))
