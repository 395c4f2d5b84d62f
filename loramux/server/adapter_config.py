"""What the operator says about adapters: those to begin with, who may change them, where they come from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig
from loramux.resolvers.settings import SourceSettings, default_store_dir, settings_from, twin_variable
from loramux.server.adapter_names import check_adapter_name

_UPLOADS: Final = "uploads"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """One entry of `--lora-modules`."""

    name: str
    path: str
    base_model_name: str | None = None

    @property
    def uri(self) -> str:
        """What a `SourceFetcher` takes: paths of the command line may be relative or begin with `~`."""
        path = os.path.expanduser(self.path)
        is_elsewhere = "://" in path or (path.count("/") == 1 and not path.startswith(("/", ".", "~")))
        if is_elsewhere and not os.path.exists(path):
            return path
        return os.path.abspath(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """How adapters are served."""

    modules: tuple[AdapterSource, ...] = ()
    modules_strict: bool = True  # one that fails stops the start
    allow_runtime_updating: bool = False
    load_timeout_s: float = 120.0  # how long a request waits for an adapter
    state_dir: Path | None = None
    adapters_file: Path | None = None
    adapters_file_interval_s: float = 2.0
    sources: SourceSettings
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # for resolvers

    @property
    def uploads_dir(self) -> Path:
        """Where uploaded adapters are kept as long as they are registered."""
        return (self.state_dir or self.sources.store_dir) / _UPLOADS


def adapter_config(values: Mapping[str, Any], environ: Mapping[str, str]) -> AdapterConfig:
    """The part of the configuration that is about adapters.

    Args:
        values: of the flags that were given, by attribute name, and `served_model_name`.
        environ: the process's environment.

    Raises:
        InvalidConfig: names the flag or variable at fault.
    """
    modules = parse_lora_modules(values.get("lora_modules", ()), values["served_model_name"])
    for flag in ("lora_modules", "adapters_file"):
        if values.get(flag) and not values.get("enable_lora"):
            name = f"--{flag.replace('_', '-')}"
            raise InvalidConfig(f"{name} needs --enable-lora", param=name)
    for name in ("adapter_load_timeout", "adapters_file_interval"):
        if values.get(name, 1) <= 0:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidConfig(f"{flag} must be greater than 0, got {values[name]}", param=flag)
    state_dir, adapters_file = _path(values.get("state_dir")), _path(values.get("adapters_file"))
    sources = source_settings(values, environ)
    # What the operator named is allowed, and so is what clients uploaded.
    roots = [*sources.allowed_local_paths, (state_dir or sources.store_dir) / _UPLOADS]
    resolver_dir = _path(twin_variable(environ, "LORA_RESOLVER_CACHE_DIR"))
    roots += [resolver_dir] if resolver_dir else []
    roots += [Path(module.uri) for module in modules if module.uri.startswith("/")]
    return AdapterConfig(
        modules=modules,
        modules_strict=values.get("lora_modules_strict", True),
        allow_runtime_updating=values.get("allow_runtime_lora_updating", False),
        load_timeout_s=values.get("adapter_load_timeout", 120.0),
        state_dir=state_dir,
        adapters_file=adapters_file,
        adapters_file_interval_s=values.get("adapters_file_interval", 2.0),
        sources=source_settings(values, environ, allowed_local_paths=tuple(roots)),
        environ=environ,
    )


def source_settings(
    values: Mapping[str, Any], environ: Mapping[str, str], **overrides: Any
) -> SourceSettings:
    """Where adapters come from, as flags and environment say.

    Raises:
        InvalidConfig: names the flag or variable at fault.
    """
    renamed = {"download_stall_timeout": "stall_timeout_s", "copy_local_adapters": "copy_local"}
    plain = (
        *("offline", "max_adapter_bytes", "max_store_bytes", "min_free_bytes", "max_parallel_downloads"),
        *("hf_token", *renamed),
    )
    given = {renamed.get(name, name): values[name] for name in plain if name in values}
    given["store_dir"] = _path(values.get("adapter_store_dir")) or default_store_dir(environ)
    given["allowed_local_paths"] = tuple(
        Path(os.path.abspath(os.path.expanduser(path))) for path in values.get("allowed_local_path", ())
    )
    if "pvc_root" in values:
        given["pvc_root"] = _path(values["pvc_root"])
    return settings_from(environ, **{**given, **overrides})


def _path(text: str | None) -> Path | None:
    return Path(os.path.abspath(os.path.expanduser(text))) if text else None


def parse_lora_modules(items: Sequence[str], base_names: Sequence[str]) -> tuple[AdapterSource, ...]:
    """The adapters of `--lora-modules`: each item `name=path` or a JSON object.

    Raises:
        InvalidConfig: bad JSON, wrong keys, a bad name, or one that is taken.
    """
    sources: dict[str, AdapterSource] = {}
    for item in items:
        if not item.strip():
            continue
        source = _json_module(item) if item.lstrip().startswith(("{", "[")) else _plain_module(item)
        check_adapter_name(source.name, base_names)
        if source.name in sources:
            message = f"--lora-modules names {source.name!r} twice"
            raise InvalidConfig(message, param="--lora-modules")
        sources[source.name] = source
    return tuple(sources.values())


def _plain_module(item: str) -> AdapterSource:
    name, equals, path = item.partition("=")
    if re.search(r",[^,/=]+=", path):
        message = f"--lora-modules takes one adapter a word, with spaces between them, got {item!r}; "
        message += "a path with a comma needs the JSON form"
        raise InvalidConfig(message, param="--lora-modules")
    if not equals or not name or not path:
        message = f"--lora-modules takes name=path or a JSON object, got {item!r}"
        raise InvalidConfig(message, param="--lora-modules")
    return AdapterSource(name=name, path=path)


def _json_module(item: str) -> AdapterSource:
    try:
        value = msgspec.json.decode(item)
    except msgspec.DecodeError as error:
        message = f"Invalid JSON format for --lora-modules: {item[:200]!r}: {error}"
        raise InvalidConfig(message, param="--lora-modules") from error
    names = {"name", "path", "base_model_name"}
    is_right = isinstance(value, dict) and {"name", "path"} <= value.keys()
    if is_right:
        value.pop("is_3d_lora_weight", None)  # vLLM's hint for a format that inspection finds itself
        is_right = value.keys() <= names and all(
            isinstance(entry, str) or (entry is None and key == "base_model_name")
            for key, entry in value.items()
        )
    if not is_right:
        message = (
            f'Invalid fields for --lora-modules: {item[:200]!r}; expected {{"name": ..., "path": ...}} '
            'and perhaps "base_model_name", all strings'
        )
        raise InvalidConfig(message, param="--lora-modules")
    return AdapterSource(**value)
