"""The adapter table: which names exist, and which content each of them stands for right now.

A request asks once, when it is admitted, and keeps the `AdapterRef` that it got: below this table
only the digest counts. Nothing here does I/O.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from loramux.engine.errors import InvalidConfig, InvalidRequest, ModelNotFound
from loramux.engine.types import AdapterSpec
from loramux.version import __version__

_MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One version of one adapter, as a request was given it."""

    name: str
    version: int  # 1 at first, one more with every replacement
    source: str  # as shown to clients; never a local path
    parent: str  # the served base name it belongs to
    created: int  # Unix seconds
    spec: AdapterSpec

    @property
    def digest(self) -> str:
        """What the engine knows the adapter by."""
        return self.spec.digest


class AdapterTable:
    """Names of the base model and of adapters.

    Args:
        base_names: the served base names; the first one is the parent of adapters.
    """

    def __init__(self, base_names: Sequence[str]) -> None:
        self.base_names = tuple(base_names)
        self.created = int(time.time())
        self._refs: dict[str, AdapterRef] = {}

    def add(
        self, name: str, spec: AdapterSpec, *, source: str, base_model_name: str | None = None
    ) -> AdapterRef:
        """Register a name for an adapter that the engine has loaded.

        Raises:
            InvalidConfig: the name is taken.
        """
        check_adapter_name(name, self.base_names)
        if name in self._refs:
            raise InvalidConfig(f"adapter name {name!r} is already taken", param="--lora-modules")
        parent = base_model_name if base_model_name in self.base_names else self.base_names[0]
        ref = AdapterRef(
            name=name, version=1, source=source, parent=parent, created=int(time.time()), spec=spec
        )
        self._refs[name] = ref
        return ref

    def lookup(self, model: str | None) -> AdapterRef | None:
        """The adapter that a request's `model` names; None for the base model.

        Raises:
            ModelNotFound: it is neither. Never answered by the base instead.
        """
        if not model or model in self.base_names:
            return None
        ref = self._refs.get(model)
        if ref is None:
            names = ", ".join(self.base_names)
            raise ModelNotFound(
                f"The model `{model[:_MAX_NAME_CHARS]}` does not exist. Valid aliases: {names}.",
                param="model",
            )
        return ref

    def all(self) -> list[AdapterRef]:
        """Every adapter, by name."""
        return [self._refs[name] for name in sorted(self._refs)]


def check_adapter_name(name: str, base_names: Sequence[str]) -> None:
    """Refuse a name that could not be used as `model`, or that means the base model.

    Raises:
        InvalidConfig: names the rule that is broken.
    """
    problem = None
    if not 1 <= len(name) <= _MAX_NAME_CHARS:
        problem = f"must have 1 to {_MAX_NAME_CHARS} characters, this one has {len(name)}"
    elif not name.isprintable():
        problem = "must not hold control characters"
    elif ".." in name.split("/"):
        problem = "must not have '..' as a part"
    elif name in base_names:
        problem = "is the name of the served base model"
    if problem:
        raise InvalidConfig(f"adapter name {name[:_MAX_NAME_CHARS]!r} {problem}", param="--lora-modules")


def answer_headers(adapter: AdapterRef | None) -> dict[str, str]:
    """The header that says which adapter answers; a name's unusual characters are percent-encoded."""
    if adapter is None:
        return {}
    name = quote(adapter.name, safe="/:@+=,()[]!*'~$&;")
    return {"x-loramux-adapter": f"{name}@{adapter.version} sha256:{adapter.digest}"}


def fingerprint(adapter: AdapterRef | None) -> str:
    """The `system_fingerprint` of an answer: the server's version and the weights' identity."""
    weights = "base" if adapter is None else f"sha256:{adapter.digest[:16]}"
    return f"loramux-{__version__}-{weights}"


def require_model(model: str | None, limit: int = _MAX_NAME_CHARS) -> None:
    """Refuse a model name that no table can hold, before it is looked up or logged.

    Raises:
        InvalidRequest: it is too long.
    """
    if model is not None and len(model) > limit:
        message = f"model allows at most {limit} characters, got {len(model)}"
        raise InvalidRequest(message, param="model")
