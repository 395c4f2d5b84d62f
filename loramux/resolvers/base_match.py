"""Does an adapter's config name the model that is served? One rule for every built-in resolver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from loramux.engine.errors import AdapterIncompatible, InvalidConfig
from loramux.resolvers.adapter_folder import AdapterFolder
from loramux.resolvers.peft_config import MAX_CONFIG_BYTES
from loramux.resolvers.refusal import CONFIG_FILE, shown

BaseMatch = Literal["exact", "basename", "off"]
VARIABLE: Final = "LORAMUX_LORA_RESOLVER_BASE_MATCH"


def base_match_from(environ: Mapping[str, str]) -> BaseMatch:
    """How strict the operator wants it; `basename` unless told otherwise.

    Raises:
        InvalidConfig: the variable has another value.
    """
    match environ.get(VARIABLE) or "basename":
        case ("exact" | "basename" | "off") as rule:
            return rule
        case other:
            raise InvalidConfig(f"{VARIABLE} must be exact, basename or off, got {other!r}", param=VARIABLE)


def check_base(config: Mapping[str, object], base_model_name: str, rule: BaseMatch, place: object) -> None:
    """Refuse an adapter that was trained on another model.

    Args:
        config: the adapter's adapter_config.json.
        base_model_name: the served model, as `--model` names it.
        rule: exact = the same text; basename = the same last part of the path, so that a local copy of
            `org/model` still counts; off = anything.
        place: the adapter, for the message.

    Raises:
        AdapterIncompatible: says both names and what would change the answer.
    """
    trained_on = config.get("base_model_name_or_path")
    if rule == "off" or not isinstance(trained_on, str) or not trained_on:
        return  # what fits is then the inspection's business
    if not is_same_base(trained_on, base_model_name, rule):
        raise AdapterIncompatible(
            f"{place}: base_model_name_or_path is {shown(trained_on)}, and this server serves"
            f" {shown(base_model_name)}; {VARIABLE}={rule} compares them"
            f"{' by their last part' if rule == 'basename' else ''}, off does not",
            param="base_model_name_or_path",
        )


def check_folder(folder: Path, base_model_name: str, rule: BaseMatch, place: object) -> None:
    """`check_base` for an adapter that was fetched.

    Raises:
        AdapterNotFound: there is no adapter_config.json.
        AdapterIncompatible: another base, or a config that cannot be read.
    """
    config = AdapterFolder(folder).read_json(CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    check_base(config, base_model_name, rule, place)


def is_same_base(trained_on: str, base_model_name: str, rule: BaseMatch) -> bool:
    """True if the two names mean the same model, by a rule of `check_base`."""
    if rule == "basename":
        return _last_part(trained_on) == _last_part(base_model_name)
    return rule == "off" or trained_on == base_model_name


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
