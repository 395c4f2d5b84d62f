"""What each tensor of an adapter is: read from its key, and accounted for against the config.

The rule is strict: a tensor that the config does not ask for is refused, and so is a config whose
tensors are missing. The one thing that may come or go is a plain copy of a table of the base model,
which PEFT writes beside LoRA on that table; the engine checks that it is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from loramux.engine.errors import AdapterIncompatible
from loramux.engine.types import LoraSite
from loramux.resolvers.adapter_folder import WEIGHTS_FILE
from loramux.resolvers.adapter_weights import AdapterTensor
from loramux.resolvers.peft_config import LoraSettings
from loramux.resolvers.refusal import CONFIG_FILE, config_refused, examples, refused, shown
from loramux.resolvers.selection import Selection


class Part(StrEnum):
    """What a tensor is to its module; the values are the ends of normalised keys."""

    A = "lora_A"
    B = "lora_B"
    MAGNITUDE = "lora_magnitude_vector"
    FULL = "full"
    ROWS = "trainable_tokens"
    COPY = "base_layer"


Parts = dict[tuple[str, Part], AdapterTensor]  # by module and part

# PEFT's own path to the base model, and the name under which it keeps a first adapter in memory.
_KEY: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\."
    r"(?:(?P<linear>lora_[AB])(?:\.default)?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta)(?:\.default)?"
    r"|(?P<full>modules_to_save)(?:\.default)?\.weight"
    r"|(?P<copy>(?:base_layer\.)?weight))",
    re.ASCII,
)
_LAYER_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)
_MAX_SHOWN_GROUPS: Final = 12
_LORA: Final = (Part.A, Part.B)

_KEY_HINTS: Final = (
    (".lora_B.bias", "lora_bias is not supported"),
    (".token_adapter.base_layer.", "PEFT cannot load this file either"),
    (".experts.", "adapters on experts are not supported"),
    ("score.", "only models that generate text can be served"),
)
_FIELD_OF: Final = {
    Part.MAGNITUDE: "use_dora",
    Part.FULL: "modules_to_save",
    Part.ROWS: "trainable_token_indices",
}


def account(
    tensors: Sequence[AdapterTensor],
    settings: LoraSettings,
    selection: Selection,
    sites: Mapping[str, LoraSite],
) -> Parts:
    """Give every tensor its place, and every place its tensor.

    Raises:
        AdapterIncompatible: a tensor fits no module, the config does not select it, or it is missing.
    """
    parts = _read_keys(tensors, selection, sites)
    expected = _expected(settings, selection)
    _check_strays(parts, expected, settings)
    if not any(part is not Part.COPY for _, part in parts):
        raise refused("the adapter holds no LoRA tensors", param=WEIGHTS_FILE)
    _check_missing(parts, expected)
    return parts


def _read_keys(
    tensors: Sequence[AdapterTensor], selection: Selection, sites: Mapping[str, LoraSite]
) -> Parts:
    parts: Parts = {}
    unmatched = []
    for tensor in tensors:
        match = _KEY.fullmatch(tensor.key)
        part = _part(match, sites) if match else None
        if match is None or part is None:
            unmatched.append(tensor.key)
            continue
        if part is Part.COPY and match["module"] in selection.full:
            part = Part.FULL
        twin = parts.setdefault((match["module"], part), tensor)
        if twin is not tensor:
            raise refused(
                f"two tensors stand for the same weight: {shown(twin.key)} and {shown(tensor.key)}",
                param=tensor.file.name,
            )
    if unmatched:
        raise _unmatched(unmatched, len(tensors), sites)
    return parts


def _part(match: re.Match[str], sites: Mapping[str, LoraSite]) -> Part | None:
    """None for what this kind of module cannot have."""
    site = sites.get(match["module"])
    if site is None:
        return None
    if match["magnitude"]:
        return Part.MAGNITUDE
    if match["linear"]:
        return None if site.kind == "embedding" else Part(match["linear"])
    if match["embedding"]:
        return Part("lora_" + match["embedding"]) if site.kind == "embedding" else None
    if not site.is_table:
        return None
    return Part.ROWS if match["rows"] else Part.FULL if match["full"] else Part.COPY


def _expected(settings: LoraSettings, selection: Selection) -> set[tuple[str, Part]]:
    of_lora = (*_LORA, Part.MAGNITUDE) if settings.use_dora else _LORA
    return {
        *((module, part) for module in selection.lora for part in of_lora),
        *((module, Part.FULL) for module in selection.full),
        *((rows.source, Part.ROWS) for rows in selection.rows.values()),
    }


def _check_strays(parts: Parts, expected: set[tuple[str, Part]], settings: LoraSettings) -> None:
    strays = [place for place in parts if place not in expected and place[1] is not Part.COPY]
    lora = {module for module, part in strays if part in _LORA}
    if lora:
        with_tensors = {module for module, part in parts if part in _LORA}
        raise config_refused(
            "target_modules",
            f"{shown(settings.target_modules)} (with exclude_modules and layers_to_transform) does not"
            f" select {len(lora)} of {len(with_tensors)} modules that have tensors, e.g. {examples(lora)}",
        )
    if strays:
        field = _FIELD_OF[strays[0][1]]
        keys = [parts[place].key for place in strays]
        raise config_refused(field, f"does not ask for {len(keys)} tensors, e.g. {examples(keys)}")


def _check_missing(parts: Parts, expected: set[tuple[str, Part]]) -> None:
    missing = expected - parts.keys()
    if not missing:
        return
    wanted = {module for module, part in expected if part in _LORA}
    whole = {module for module, part in missing if part is Part.A and (module, Part.B) in missing}
    if whole:
        raise refused(
            f"the adapter is partial: matched {len(wanted - whole)} of {len(wanted)} modules that"
            f" target_modules selects, missing e.g. {examples(whole)}",
            param=WEIGHTS_FILE,
        )
    names = [f"{module}.{part}" for module, part in missing]
    are_halves = all(part in _LORA for _, part in missing)
    why = "beside their other half" if are_halves else f"that {CONFIG_FILE} asks for"
    raise refused(f"{len(names)} tensors are missing {why}, e.g. {examples(names)}", param=WEIGHTS_FILE)


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
