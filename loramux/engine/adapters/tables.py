"""Read what an adapter changes beyond its lanes: vocabulary tables and DoRA's gains.

DoRA's gain of an output feature is magnitude / norm, and the norm is that of the feature's row in
W + scale * B A. It depends on nothing that a request brings, so it is computed here, once, in
float32 and in slices of rows; W comes from the base model's checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loramux.engine.adapters.files import AdapterFiles, check_finite
from loramux.engine.errors import AdapterIncompatible
from loramux.engine.kernels.lora import OutputGain
from loramux.engine.kernels.tables import TableChange, TokenRows
from loramux.engine.models.families import HEAD_MODULE, ModelConfig
from loramux.engine.models.weights import Checkpoint, head_weight
from loramux.engine.parallel.shard import Shard
from loramux.engine.types import LoraSite, TableTensor

_SLICE_ROWS = 2048  # of a weight that are expanded to float32 at the same time


def row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Norm of each row of weight + b · a, in float32.

    Args:
        weight: [out_features, in_features], any dtype
        a: [rank, in_features], float32
        b: [out_features, rank], float32, scale folded in
    """
    norms = [
        torch.linalg.vector_norm(part.float().addmm(b_part, a), dim=1)
        for part, b_part in zip(torch.split(weight, _SLICE_ROWS), torch.split(b, _SLICE_ROWS), strict=True)
    ]
    return torch.cat(norms)


def column_norms(table: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Norm of each column of table + (b · a)ᵀ, in float32: DoRA on an embedding.

    Args:
        table: [vocabulary, embed_dim], any dtype
        a: [rank, vocabulary], float32
        b: [embed_dim, rank], float32, scale folded in
    """
    squares = torch.zeros(table.shape[1])
    for part, a_part in zip(torch.split(table, _SLICE_ROWS), torch.split(a.t(), _SLICE_ROWS), strict=True):
        squares += part.float().addmm(a_part, b.t()).square().sum(dim=0)
    return squares.sqrt()


def table_changes(
    tables: list[TableTensor],
    files: AdapterFiles,
    sites: dict[str, LoraSite],
    lora: dict[str, TableChange],
    dtype: torch.dtype,
) -> dict[str, TableChange]:
    """Everything that the adapter changes in each table, in the model's dtype.

    Args:
        tables: what the adapter replaces
        files: the adapter's
        sites: the base model's modules
        lora: A, B and gain of the tables that have them
        dtype: of the model
    """
    changes = dict(lora)
    for table in tables:
        if table.kind == "copy":
            continue
        vocabulary, embed_dim = sites[table.module].table_shape
        num_rows = vocabulary if table.kind == "full" else len(table.token_ids)
        stored = files.get(table.tensor, (num_rows, embed_dim)).to(dtype, copy=True)
        check_finite(stored, f"tensor {table.tensor.key}")
        change = changes.get(table.module, TableChange())
        if table.kind == "full":
            changes[table.module] = replace(change, full=stored)
        else:
            token_ids, order = torch.tensor(table.token_ids).sort()
            changes[table.module] = replace(change, rows=TokenRows(token_ids, stored[order]))
    return changes


def check_copies(
    tables: list[TableTensor],
    files: AdapterFiles,
    sites: dict[str, LoraSite],
    config: ModelConfig,
    base: Checkpoint,
) -> None:
    """PEFT may have stored the base model's own table beside LoRA on it.

    Raises:
        AdapterIncompatible: the table is another one than the base model's.
    """
    for table in tables:
        if table.kind == "copy":
            shape = sites[table.module].table_shape
            copied = files.get(table.tensor, shape)
            name = table_weight(table.module, config, base)
            if not torch.equal(base.take(name, shape, dtype=copied.dtype), copied):
                raise AdapterIncompatible(
                    f"tensor {table.tensor.key} of the adapter is not the base model's {table.module}: it "
                    "was trained on another base model, or on a changed one; if the adapter is meant to "
                    f"replace it, its config must name {table.module} in modules_to_save"
                )


def table_weight(module: str, config: ModelConfig, base: Checkpoint) -> str:
    """Name of a table's tensor in the checkpoint."""
    return head_weight(config, base, config.vocab_size) if module == HEAD_MODULE else f"{module}.weight"


def gains_by_site(
    gains: dict[str, Tensor], shard: Shard, base: Checkpoint, dtype: torch.dtype
) -> dict[int, OutputGain]:
    """Gains by module, of all features in float32 → gains by fused site, of this rank's in `dtype`."""
    found = {}
    for layer in range(shard.own.num_layers):
        prefix = shard.own.layer_prefix(layer)
        for index, (site, whole) in enumerate(zip(shard.own.sites, shard.whole.sites, strict=True)):
            names = [prefix + part.module for part in site.parts]
            if not any(name in gains for name in names):
                continue
            gain = torch.cat(
                [
                    gains[name][shard.rows(name)] if name in gains else torch.ones(part.out_features)
                    for name, part in zip(names, site.parts, strict=True)
                ]
            )
            offset = None
            if site.bias:
                biases = [
                    base.take(f"{name}.bias", (part.out_features,))[shard.rows(name)]
                    for name, part in zip(names, whole.parts, strict=True)
                ]
                offset = ((1 - gain) * torch.cat(biases).float()).to(dtype)
            found[layer * len(shard.own.sites) + index] = OutputGain(gain.to(dtype), offset)
    return found
