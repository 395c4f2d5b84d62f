"""What a model's folder says about generating: end tokens and default sampling values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig

# generation_config.json key -> SamplingParams field; vLLM reads the same keys
_DEFAULTS: Final = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """End tokens, and values for the sampling fields that a request leaves out."""

    eos_token_ids: list[int] = field(default_factory=list)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read_generation_config(
    folder: Path, *, use_defaults: bool = True, override: Mapping[str, Any] | None = None
) -> GenerationConfig:
    """Read generation_config.json, and config.json for end tokens that only it names.

    Args:
        folder: the model's.
        use_defaults: False keeps the end tokens but not the sampling values
            (`--generation-config vllm`).
        override: entries that win over the file's (`--override-generation-config`).

    Raises:
        InvalidConfig: a file is not a JSON object, or a value in it has the wrong type.
    """
    model = read_json_object(folder / "config.json")
    written = read_json_object(folder / "generation_config.json")
    eos = written.get("eos_token_id", model.get("eos_token_id"))
    values = {**(written if use_defaults else {}), **(override or {})}
    eos = (override or {}).get("eos_token_id", eos)
    defaults = {name: values[key] for key, name in _DEFAULTS.items() if values.get(key) is not None}
    for name, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidConfig(f"generation config: {name} must be a number, got {value!r}", param=name)
    return GenerationConfig(eos_token_ids=_ids(eos), defaults=defaults)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        InvalidConfig: it is not a JSON object.
    """
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path.name} is not valid JSON: {error}", param=path.name) from error
    if not isinstance(value, dict):
        raise InvalidConfig(f"{path.name} must hold a JSON object", param=path.name)
    return value


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool)]
