"""Look at an adapter's folder before anything is loaded: an `AdapterSpec`, or a refusal.

Nothing here needs torch: adapter_config.json and the safetensors headers say what the adapter
changes, and the base model's modules (`EngineInfo.lora_sites`) say whether that fits. The rule is
strict accounting (`tensor_parts.py`): a tensor that nobody would apply means that the adapter is not
what its config says, and is never dropped in silence.

Values are not judged here: the engine looks for infinities when it reads the tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from loramux.engine.errors import AdapterIncompatible
from loramux.engine.types import AdapterSpec, LoraModule, LoraSite, TableTensor, TensorRef
from loramux.resolvers.adapter_folder import AdapterFolder
from loramux.resolvers.adapter_weights import AdapterTensor, content_digest, open_weights, weights_files
from loramux.resolvers.module_patterns import by_pattern
from loramux.resolvers.peft_config import MAX_CONFIG_BYTES, LoraSettings, parse_config
from loramux.resolvers.refusal import CONFIG_FILE, refused, shown
from loramux.resolvers.selection import Selection, select
from loramux.resolvers.tensor_parts import Part, Parts, account


class _Scaling(NamedTuple):
    rank: int
    scale: float


def inspect_adapter(
    path: Path, sites: Mapping[str, LoraSite], *, max_lora_rank: int, read_tensors: bool = True
) -> AdapterSpec:
    """Check that the adapter in folder `path` can be served by the base model.

    The weights are read once, for the digest; of other files only the config is opened. The spec
    notes size and time of every weights file, so that the engine can tell when it changed since.

    Args:
        path: the folder that PEFT's `save_pretrained` wrote.
        sites: module path inside the base model -> its shape.
        max_lora_rank: the highest rank that any module of the adapter may have.
        read_tensors: False = look at the config and the headers only; the digest is then empty.

    Returns:
        What the engine needs to load it. `path` in it has all symlinks resolved.

    Raises:
        AdapterNotFound: there is no folder, or no adapter_config.json in it.
        AdapterIncompatible: the adapter is not LoRA for this base model, exceeds `max_lora_rank`,
            or a file of it is unsafe, truncated or corrupt.
    """
    folder = AdapterFolder(path)
    settings = parse_config(folder.read_json(CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES))
    selection = select(settings, sites)
    scalings = _scalings(settings, selection.lora, max_lora_rank)
    with contextlib.ExitStack() as stack:
        parts = account(open_weights(folder, stack), settings, selection, sites)
        _check_shapes(parts, selection, scalings, sites)
        files = weights_files(tensor.file for tensor in parts.values())
        digest = _digest(parts, selection, scalings) if read_tensors else ""
    return AdapterSpec(
        digest=digest,
        path=str(folder.root),
        rank=max((scaling.rank for scaling in scalings.values()), default=1),
        nbytes=sum(tensor.entry.nbytes for tensor in parts.values()),
        modules=_modules(parts, scalings),
        files=files,
        tables=_tables(parts, selection),
        base_model=settings.base_model,
    )


def _digest(parts: Parts, selection: Selection, scalings: Mapping[str, _Scaling]) -> str:
    return content_digest(
        scalings,
        {f"{module}.{part}": tensor for (module, part), tensor in parts.items() if part is not Part.COPY},
        {module: rows.token_ids for module, rows in selection.rows.items()},
    )


def _scalings(settings: LoraSettings, modules: Sequence[str], max_lora_rank: int) -> dict[str, _Scaling]:
    ranks = by_pattern("rank_pattern", settings.rank_pattern, settings.r, modules)
    rank = max(ranks, default=0)
    if rank > max_lora_rank:
        raise refused(
            f"LoRA rank {shown(rank)} is greater than max_lora_rank {max_lora_rank}; start the server"
            f" with --max-lora-rank {shown(rank)} or more to serve this adapter",
            param="r",
        )
    alphas = by_pattern("alpha_pattern", settings.alpha_pattern, settings.alpha, modules)
    return {
        module: _Scaling(rank, settings.scale(rank, alpha))
        for module, rank, alpha in zip(modules, ranks, alphas, strict=True)
    }


def _modules(parts: Parts, scalings: Mapping[str, _Scaling]) -> list[LoraModule]:
    return [
        LoraModule(
            module,
            scaling.rank,
            scaling.scale,
            _ref(parts[module, Part.A]),
            _ref(parts[module, Part.B]),
            _ref(parts[module, Part.MAGNITUDE]) if (module, Part.MAGNITUDE) in parts else None,
        )
        for module, scaling in scalings.items()
    ]


def _tables(parts: Parts, selection: Selection) -> list[TableTensor]:
    copies = [module for module, part in parts if part is Part.COPY]
    return [
        *(TableTensor(module, "full", _ref(parts[module, Part.FULL])) for module in selection.full),
        *(
            TableTensor(module, "rows", _ref(parts[rows.source, Part.ROWS]), rows.token_ids)
            for module, rows in selection.rows.items()
        ),
        *(TableTensor(module, "copy", _ref(parts[module, Part.COPY])) for module in copies),
    ]


def _ref(tensor: AdapterTensor) -> TensorRef:
    return TensorRef(tensor.key, tensor.file.name, tensor.entry.dtype, tensor.entry.offset)


def _check_shapes(
    parts: Parts, selection: Selection, scalings: Mapping[str, _Scaling], sites: Mapping[str, LoraSite]
) -> None:
    for (module, part), tensor in parts.items():
        site = sites[module]
        if part in (Part.A, Part.B, Part.MAGNITUDE):
            rank = scalings[module].rank
            shapes = {
                Part.A: ((rank, site.in_features), "[rank, in_features]"),
                Part.B: ((site.out_features, rank), "[out_features, rank]"),
                Part.MAGNITUDE: ((site.out_features,), "[out_features]"),
            }
            expected, axes = shapes[part]
            why = (
                f"rank {rank} by {CONFIG_FILE}, and the base model's layer maps"
                f" {site.in_features} to {site.out_features} features"
            )
        else:
            rows, embed_dim = site.table_shape
            if part is Part.ROWS:
                rows = len(selection.rows[module].token_ids)
            expected, axes = (rows, embed_dim), "[tokens, embed_dim]"
            why = f"{rows} tokens by {CONFIG_FILE if part is Part.ROWS else 'the base model'}"
        if tensor.entry.shape != expected:
            raise _misshapen(tensor, module, site, expected, f"{axes} of {module} is {list(expected)}: {why}")


def _misshapen(
    tensor: AdapterTensor, module: str, site: LoraSite, expected: tuple[int, ...], why: str
) -> AdapterIncompatible:
    shape = tensor.entry.shape
    hint = ""
    if len(shape) != len(expected) or 0 in shape:
        hint = "; sharded training must gather its weights before it saves them"
    elif site.is_table:
        vocabulary = site.table_shape[0]
        sizes = [size for size, wanted in zip(shape, expected, strict=True) if wanted == vocabulary != size]
        if sizes:
            hint = (
                f"; the adapter was trained with a vocabulary of {shown(sizes[0])} tokens, the base model"
                f" has {vocabulary}: adapters that change the vocabulary's size are not supported"
            )
    return refused(
        f"tensor {shown(tensor.key)} has shape {list(shape)}, but {why}{hint}", param=tensor.file.name
    )
