"""The three places a flag may be set in: command line, environment, `--config` file; and who set what.

All of them become words of one command line, so that a value means the same wherever it stands.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig
from loramux.server import flags
from loramux.server.flag import Flag

# LORAMUX_ name -> the vLLM name that users already set
TWINS: Final = {
    "LORAMUX_API_KEY": "VLLM_API_KEY",
    "LORAMUX_ALLOW_RUNTIME_LORA_UPDATING": "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "LORAMUX_PLUGINS": "VLLM_PLUGINS",
    "LORAMUX_LORA_RESOLVER_CACHE_DIR": "VLLM_LORA_RESOLVER_CACHE_DIR",
    "LORAMUX_LORA_RESOLVER_HF_REPO_LIST": "VLLM_LORA_RESOLVER_HF_REPO_LIST",
    "LORAMUX_TIMEOUT_KEEP_ALIVE": "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
}


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was set, and where."""

    values: dict[str, Any]  # by attribute name; only what somebody set
    origins: dict[str, str]  # of each value: `flag`, `env NAME` or `FILE:LINE`
    warnings: list[str]  # one for each flag without effect


def gather(argv: Sequence[str], environ: Mapping[str, str]) -> Gathered:
    """Everything that was set; a flag wins over the environment, that over the file.

    Raises:
        InvalidConfig: names the flag, variable or key at fault.
    """
    _check_twins(environ)
    arguments = list(argv)
    namespace, warnings = flags.parse(arguments)
    origins = dict.fromkeys(_given(namespace), "flag")
    arguments += environment_arguments(environ, namespace, flags.all_flags().values())
    namespace, warnings = flags.parse(arguments)
    origins |= {name: _variable(name, environ) for name in _given(namespace) if name not in origins}
    if namespace.config is not None:
        path = Path(namespace.config).expanduser()
        found, lines = _file_arguments(path, namespace)
        namespace, warnings = flags.parse([*found, *arguments])  # the last one wins, also of two spellings
        for name in _given(namespace):
            origins.setdefault(name, f"{path}:{lines[name]}" if name in lines else str(path))
    return Gathered(_given(namespace), origins, warnings)


def environment_arguments(
    environ: Mapping[str, str], namespace: argparse.Namespace, known: Iterable[Flag]
) -> list[str]:
    """Arguments for those of the known flags that only the environment sets."""
    found: list[str] = []
    for flag in known:
        variable = f"LORAMUX_{flag.dest.upper()}"
        value = environ.get(variable) or environ.get(TWINS.get(variable, ""))
        if not value or getattr(namespace, flag.dest) is not None:
            continue
        if variable == "LORAMUX_PORT" and "://" in value:
            continue  # Kubernetes sets it to tcp://... where there is a Service named loramux
        if flag.name == "model" and namespace.positional_model is not None:
            continue
        found += _argument(flag, value, variable)
    return found


def _given(namespace: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(namespace).items() if value is not None}


def _variable(name: str, environ: Mapping[str, str]) -> str:
    ours = f"LORAMUX_{name.upper()}"
    return f"env {ours if environ.get(ours) else TWINS.get(ours, ours)}"


def _check_twins(environ: Mapping[str, str]) -> None:
    for ours, theirs in TWINS.items():
        if environ.get(ours, environ.get(theirs)) != environ.get(theirs, environ.get(ours)):
            message = f"{ours} and {theirs} are both set, to different values; unset one of them"
            raise InvalidConfig(message, param=ours)


def _file_arguments(path: Path, namespace: argparse.Namespace) -> tuple[list[str], dict[str, int]]:
    """Arguments for the flags that only the file sets, and the line of each of its keys."""
    try:
        data = path.read_bytes()
        entries = msgspec.yaml.decode(data)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"--config {path}: {error}", param="--config") from error
    if not isinstance(entries, dict):
        raise InvalidConfig(f"--config {path} must hold a mapping of flags to values", param="--config")
    known = flags.all_flags()
    lines = _lines_of_keys(data.decode())
    found: list[str] = []
    for key, value in entries.items():
        dest = str(key).replace("-", "_")
        has_model = dest == "model" and namespace.positional_model is not None
        if has_model or getattr(namespace, dest, None) is not None or value is None:
            continue
        flag = known.get(dest) or Flag(str(key), "", is_switch=isinstance(value, bool))
        where = f"--config {path}:{lines[dest]}: {key}" if dest in lines else f"--config {path}: {key}"
        if dest not in known:
            _require_known(flag, where)
        found += _argument(flag, value, where)
    return found, lines


def _lines_of_keys(text: str) -> dict[str, int]:
    """The line number of each top-level key, by attribute name."""
    matches = (re.match(r"[\"']?([\w.-]+)[\"']?\s*:", line) for line in text.splitlines())
    return {match[1].replace("-", "_"): number for number, match in enumerate(matches, 1) if match}


def _require_known(flag: Flag, where: str) -> None:
    try:
        flags.parse([f"--{flag.name}"] if flag.is_switch else [f"--{flag.name}=1"])
    except InvalidConfig as error:
        if error.message.startswith("unknown flag"):
            raise InvalidConfig(f"{where}: {error.message}", param=where) from error


def _argument(flag: Flag, value: object, where: str) -> list[str]:
    """The words that set one flag on a command line."""
    if flag.is_switch:
        text = str(value).strip().lower()
        if text not in ("1", "true", "0", "false"):
            raise InvalidConfig(f"{where} must be true or false, got {value!r}", param=where)
        return [f"--{flag.name}" if text in ("1", "true") else f"--no-{flag.name}"]
    if flag.is_list:
        values = value if isinstance(value, list) else [value]
        return [f"--{flag.name}={_text(entry)}" for entry in values]  # which may begin with a dash
    return [f"--{flag.name}={_text(value)}"]


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
