"""Which names an adapter may have: the rules for the command line, for loads and for requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loramux.engine.errors import InvalidConfig, InvalidRequest

MAX_NAME_CHARS: Final = 256
RESERVED_NAME: Final = "events"  # GET /v1/lora_adapters/{name} would not answer with its row


class AdapterNameRefused(InvalidRequest):
    """No adapter may have this name, or none was given."""


def name_problem(name: str, base_names: Sequence[str]) -> str | None:
    """Why a name could not be used as `model`, or would mean the base model; None if it is fine."""
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        return f"must have 1 to {MAX_NAME_CHARS} characters, this one has {len(name)}"
    if not name.isprintable():
        return "must not hold control characters"
    if ".." in name.split("/"):
        return "must not have '..' as a part"
    if name.endswith("/"):
        return "must not end with '/': paths of requests mean the same with and without it"
    if name == RESERVED_NAME:
        return "is reserved: GET /v1/lora_adapters/events is the stream of changes, not an adapter's row"
    if name in base_names:
        return "conflicts with a served base model"
    return None


def check_adapter_name(name: str, base_names: Sequence[str]) -> None:
    """Refuse a name of the command line.

    Raises:
        InvalidConfig: names the rule that is broken.
    """
    problem = name_problem(name, base_names)
    if problem:
        raise InvalidConfig(f"adapter name {name[:MAX_NAME_CHARS]!r} {problem}", param="--lora-modules")


def require_adapter_name(name: str, base_names: Sequence[str], *, param: str = "lora_name") -> None:
    """Refuse a name that a request wants to give.

    Raises:
        AdapterNameRefused: names the rule that is broken.
    """
    problem = name_problem(name, base_names)
    if problem:
        raise AdapterNameRefused(f"The lora adapter {name[:MAX_NAME_CHARS]!r} {problem}.", param=param)


def require_model(model: str | None, limit: int = MAX_NAME_CHARS) -> None:
    """Refuse a model name that no table can hold, before it is looked up or logged.

    Raises:
        InvalidRequest: it is too long.
    """
    if model is not None and len(model) > limit:
        message = f"model allows at most {limit} characters, got {len(model)}"
        raise InvalidRequest(message, param="model")
