"""Look at an adapter's folder before anything is loaded: an `AdapterSpec`, or a refusal.

Nothing here needs torch: adapter_config.json and the safetensors headers say what the adapter
changes, and the base model's modules (`EngineInfo.lora_sites`) say whether that fits. The rule is
strict accounting: every tensor must belong to a module that the config selects, and every module
that the config selects must have its tensors. A tensor that nobody would apply means that the
adapter is not what its config says, and is never dropped in silence.

Values are not judged here: the engine looks for infinities when it reads the tensors.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from loramux.engine.errors import AdapterIncompatible
from loramux.engine.types import AdapterSpec, LoraModule, LoraSite
from loramux.resolvers.adapter_folder import WEIGHTS_FILE, AdapterFolder
from loramux.resolvers.adapter_weights import AdapterTensor, content_digest, open_weights, weights_files
from loramux.resolvers.module_patterns import by_pattern, selected_modules
from loramux.resolvers.peft_config import MAX_CONFIG_BYTES, LoraSettings, parse_config
from loramux.resolvers.refusal import CONFIG_FILE, config_refused, examples, refused, shown

# PEFT's own path to the base model, and the name under which it keeps a first adapter in memory.
_LORA_KEY: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight", re.ASCII
)
_LAYER_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)
_MAX_SHOWN_GROUPS: Final = 12

_KEY_HINTS: Final = (
    ("lora_magnitude_vector", "DoRA is not supported"),
    ("lora_embedding_", "adapters on embeddings are not supported"),
    (".lora_B.bias", "lora_bias is not supported"),
    (".modules_to_save.", "modules_to_save is not supported"),
    ("embed_tokens.weight", "it holds full weights beside LoRA; save with save_embedding_layers=False"),
    ("lm_head.", "the output head cannot be adapted"),
    (".experts.", "adapters on experts are not supported"),
)


class _Scaling(NamedTuple):
    rank: int
    scale: float


class _Pair(NamedTuple):
    a: AdapterTensor
    b: AdapterTensor


def inspect_adapter(path: Path, sites: Mapping[str, LoraSite], *, max_lora_rank: int) -> AdapterSpec:
    """Check that the adapter in folder `path` can be served by the base model.

    The whole folder is read once, for the digest. The spec notes size and time of every file, so
    that the engine can tell when it changed since.

    Args:
        path: the folder that PEFT's `save_pretrained` wrote.
        sites: module path inside the base model -> its shape.
        max_lora_rank: the highest rank that any module of the adapter may have.

    Returns:
        What the engine needs to load it. `path` in it has all symlinks resolved.

    Raises:
        AdapterNotFound: there is no folder, or no adapter_config.json in it.
        AdapterIncompatible: the adapter is not plain LoRA for this base model, exceeds
            `max_lora_rank`, or a file of it is unsafe, truncated or corrupt.
    """
    folder = AdapterFolder(path)
    settings = parse_config(folder.read_json(CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES))
    selected = selected_modules(settings, sites)
    scalings = _scalings(settings, [module for module in sites if module in selected], max_lora_rank)
    with contextlib.ExitStack() as stack:
        pairs = _pair(open_weights(folder, stack), settings, sites, selected)
        for module, pair in pairs.items():
            _check_shapes(module, pair, sites[module], scalings[module].rank)
        files = weights_files(pair_tensor.file for pair in pairs.values() for pair_tensor in pair)
        digest = content_digest(
            {module: (scaling.rank, scaling.scale) for module, scaling in scalings.items()},
            {
                f"{module}.lora_{side}": tensor
                for module, pair in pairs.items()
                for side, tensor in zip("AB", pair, strict=True)
            },
        )
    return AdapterSpec(
        digest=digest,
        path=str(folder.root),
        rank=max(scaling.rank for scaling in scalings.values()),
        nbytes=sum(tensor.entry.nbytes for pair in pairs.values() for tensor in pair),
        modules=[
            LoraModule(
                module,
                scaling.rank,
                scaling.scale,
                pairs[module].a.key,
                pairs[module].b.key,
                pairs[module].a.file.name,
            )
            for module, scaling in scalings.items()
        ],
        files=files,
        base_model=settings.base_model,
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


def _pair(
    tensors: Sequence[AdapterTensor],
    settings: LoraSettings,
    sites: Mapping[str, LoraSite],
    selected: set[str],
) -> dict[str, _Pair]:
    """Account for every tensor and every selected module."""
    found: dict[tuple[str, str], AdapterTensor] = {}
    unmatched = []
    for tensor in tensors:
        match = _LORA_KEY.fullmatch(tensor.key)
        if match is None or match["module"] not in sites:
            unmatched.append(tensor.key)
            continue
        twin = found.setdefault((match["module"], match["side"]), tensor)
        if twin is not tensor:
            raise refused(
                f"two tensors stand for the same weight: {shown(twin.key)} and {shown(tensor.key)}",
                param=tensor.file.name,
            )
    if unmatched:
        raise _unmatched(unmatched, len(tensors), sites)
    modules = {module for module, _ in found}
    _check_coverage(modules, settings, selected)
    halves = [f"{module}.lora_{side}" for module in modules for side in "AB" if (module, side) not in found]
    if halves:
        raise refused(
            f"{len(halves)} tensors are missing beside their other half, e.g. {examples(halves)}",
            param=WEIGHTS_FILE,
        )
    return {module: _Pair(found[module, "A"], found[module, "B"]) for module in modules}


def _unmatched(keys: list[str], total: int, sites: Mapping[str, LoraSite]) -> AdapterIncompatible:
    hint = next((f" ({text})" for part, text in _KEY_HINTS if any(part in key for key in keys)), "")
    return refused(
        f"{len(keys)} of {total} tensors fit no module of this base model, e.g. {examples(keys)}{hint};"
        f" {_base_modules(sites)}",
        param=WEIGHTS_FILE,
    )


def _base_modules(sites: Mapping[str, LoraSite]) -> str:
    """What the base model has, with the layers of one kind as a range."""
    if not sites:
        return "the base model has no modules that take LoRA (is --enable-lora set?)"
    layers: dict[str, list[int]] = {}
    for module in sites:
        number = _LAYER_NUMBER.search(module)
        group = f"{module[: number.start()]}{{}}{module[number.end() :]}" if number else module
        layers.setdefault(group, []).append(int(number[0]) if number else 0)
    names = [
        group.replace("{}", f"{{{min(numbers)}..{max(numbers)}}}", 1) for group, numbers in layers.items()
    ]
    more = ", …" if len(names) > _MAX_SHOWN_GROUPS else ""
    return f"the base model has {', '.join(names[:_MAX_SHOWN_GROUPS])}{more}"


def _check_coverage(modules: set[str], settings: LoraSettings, selected: set[str]) -> None:
    """Tensors and config must name the same modules."""
    stray = modules - selected
    if stray:
        raise config_refused(
            "target_modules",
            f"{shown(settings.target_modules)} (with exclude_modules and layers_to_transform) does not"
            f" select {len(stray)} of {len(modules)} modules that have tensors, e.g. {examples(stray)}",
        )
    if not modules:
        raise refused("the adapter holds no LoRA tensors", param=WEIGHTS_FILE)
    missing = selected - modules
    if missing:
        raise refused(
            f"the adapter is partial: matched {len(modules)} of {len(selected)} modules that"
            f" target_modules selects, missing e.g. {examples(missing)}",
            param=WEIGHTS_FILE,
        )


def _check_shapes(module: str, pair: _Pair, site: LoraSite, rank: int) -> None:
    for tensor, expected, axes in (
        (pair.a, (rank, site.in_features), "[rank, in_features]"),
        (pair.b, (site.out_features, rank), "[out_features, rank]"),
    ):
        shape = tensor.entry.shape
        if shape == expected:
            continue
        hint = ""
        if len(shape) != 2 or 0 in shape:
            hint = "; sharded training must gather its weights before it saves them"
        raise refused(
            f"tensor {shown(tensor.key)} has shape {list(shape)}, but {axes} of {module} is"
            f" {list(expected)}: rank {rank} by {CONFIG_FILE}, and the base model's layer maps"
            f" {site.in_features} to {site.out_features} features{hint}",
            param=tensor.file.name,
        )
    if pair.a.file is not pair.b.file:
        raise refused(
            f"lora_A and lora_B of {module} are in different files ({pair.a.file.name},"
            f" {pair.b.file.name}); save the adapter as one {WEIGHTS_FILE}",
            param=pair.b.file.name,
        )
