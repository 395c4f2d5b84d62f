"""Which modules an adapter's config selects, and with which rank and alpha: PEFT's own rules.

Names are module paths inside the base model, such as `model.layers.3.self_attn.q_proj`.

Source: PEFT 0.21, `check_target_module_exists` and `_maybe_include_all_linear_layers`
(`peft/tuners/tuners_utils.py`), `get_pattern_key` (`peft/utils/other.py`).
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeVar

from loramux.engine.types import LoraSite
from loramux.resolvers import regex_match
from loramux.resolvers.peft_config import LoraSettings
from loramux.resolvers.refusal import config_refused, shown
from loramux.resolvers.regex_match import Answer, Match, Query

_ALL_LINEAR: Final = "all-linear"
_ANY_LAYER: Final = r".*?\.[^.]*\.(?P<idx>\d+)\."  # the first number in the path is the layer
# A plain name, perhaps anchored: no repetition and no choice, so matching it takes no time.
_PLAIN: Final = re.compile(r"\^?(?:[\w.\-]|\\\.)*\$?", re.ASCII)
_CHILD_TIMEOUT_S: Final = 60.0  # the child's own limit of CPU time comes first, unless the machine hangs

_T = TypeVar("_T")


def selected_modules(settings: LoraSettings, sites: Mapping[str, LoraSite]) -> set[str]:
    """The modules of the base model that target_modules and its neighbours select for LoRA.

    Raises:
        AdapterIncompatible: a regular expression is invalid or takes too long.
    """
    candidates = sorted(set(sites) - _excluded(settings, sites))
    target = settings.target_modules
    if isinstance(target, str):
        if target.lower() == _ALL_LINEAR:
            return {module for module in candidates if sites[module].kind == "linear"}
        matches = _matches("target_modules", [target], candidates, is_full=True)
        return {module for module, match in zip(candidates, matches, strict=True) if match}
    targets = frozenset(target)
    by_suffix = [module for module in candidates if not targets.isdisjoint(names_of(module))]
    # layers_to_transform narrows suffixes only: a full path already names its layer.
    chosen = {module for module in by_suffix if module in targets}
    return chosen | _in_layers(settings, by_suffix)


def targets_last_name(settings: LoraSettings, modules: Iterable[str]) -> bool:
    """True if target_modules matches the bare last name of a module, as PEFT asks before it ties.

    Raises:
        AdapterIncompatible: a regular expression is invalid or takes too long.
    """
    names = [module.rpartition(".")[2] for module in modules]
    target = settings.target_modules
    if isinstance(target, str):
        return any(_matches("target_modules", [target], names, is_full=True))
    return any(wanted.rpartition(".")[2] in names for wanted in target)


def by_pattern(field: str, pattern: Mapping[str, _T], default: _T, modules: Sequence[str]) -> list[_T]:
    """The value of the first key that matches the end of each module's path, else `default`.

    Raises:
        AdapterIncompatible: a key is no valid regular expression or takes too long.
    """
    keys = list(pattern)
    wrapped = [rf"(.*\.)?({key})$" for key in keys]
    matches = _matches(field, wrapped, modules, is_full=False, are_plain=all(map(_PLAIN.fullmatch, keys)))
    return [
        pattern[keys[match.position]] if match else pattern.get(module, default)
        for module, match in zip(modules, matches, strict=True)
    ]


def _excluded(settings: LoraSettings, modules: Iterable[str]) -> set[str]:
    exclude = settings.exclude_modules
    if not exclude:
        return set()
    if isinstance(exclude, str):
        names = list(modules)
        matches = _matches("exclude_modules", [exclude], names, is_full=True)
        return {name for name, match in zip(names, matches, strict=True) if match}
    names_to_exclude = frozenset(exclude)
    return {module for module in modules if not names_to_exclude.isdisjoint(names_of(module))}


def names_of(module: str) -> list[str]:
    """Every name that a config may use for a module: its path, and what follows each of its dots."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _in_layers(settings: LoraSettings, modules: list[str]) -> set[str]:
    layers = frozenset(settings.layers_to_transform)
    if not layers:
        return set(modules)
    regexes = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in settings.layers_pattern]
    matches = _matches(
        "layers_pattern",
        regexes or [_ANY_LAYER],
        modules,
        is_full=False,
        are_plain=all(map(_PLAIN.fullmatch, settings.layers_pattern)),
    )
    return {
        module
        for module, match in zip(modules, matches, strict=True)
        if match and match.layer is not None and int(match.layer) in layers
    }


def _matches(
    field: str, regexes: list[str], names: Sequence[str], *, is_full: bool, are_plain: bool | None = None
) -> list[Match | None]:
    """For each name, the first expression that matches it.

    `are_plain` tells that the adapter's part of the expressions is plain names; None = look.
    """
    if not regexes or not names:
        return [None] * len(names)
    query: Query = {"regexes": regexes, "names": list(names), "is_full": is_full}
    is_plain = all(map(_PLAIN.fullmatch, regexes)) if are_plain is None else are_plain
    answer = regex_match.answer(query) if is_plain else _ask_child(field, query)
    if answer["error"] is not None:
        raise config_refused(field, f"cannot be used: {shown(answer['error'])}")
    return answer["matches"]


def _ask_child(field: str, query: Query) -> Answer:
    command = [sys.executable, "-I", "-S", regex_match.__file__]
    try:
        child = subprocess.run(
            command, input=json.dumps(query).encode(), capture_output=True, timeout=_CHILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise config_refused(field, "holds a regular expression that takes too long to match") from None
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise config_refused(field, "holds a regular expression that takes too long to match")
    if child.returncode != 0:
        raise config_refused(field, "holds a regular expression that takes too much memory to match")
    answer: Answer = json.loads(child.stdout)
    answer["matches"] = [Match(*match) if match else None for match in answer["matches"]]
    return answer
