"""Flags, environment and file put together into one frozen `Config`.

Later wins: built-in defaults, `--config` file, environment, flags. A variable is `LORAMUX_` and the
flag's name; where users already set vLLM's name, that works as well, and both set to different values
stop the start.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.config import EngineConfig
from loramux.engine.errors import InvalidConfig
from loramux.server import flags
from loramux.server.access.access_config import AccessConfig, access_config
from loramux.server.adapter_config import AdapterConfig, adapter_config
from loramux.server.admission_config import (
    AdmissionConfig,
    ConnectionConfig,
    admission_config,
    connection_config,
)
from loramux.server.api_config import ApiConfig, api_config
from loramux.server.engine_care import EngineCare, engine_care
from loramux.server.flag import Flag
from loramux.server.limits import Limits
from loramux.server.observe.observe_config import ObserveConfig, observe_config
from loramux.server.tool_config import ToolConfig, tool_config

LOG_LEVELS: Final = ("critical", "error", "warning", "info", "debug", "trace")

# LORAMUX_ name -> the vLLM name that users already set
TWINS: Final = {
    "LORAMUX_API_KEY": "VLLM_API_KEY",
    "LORAMUX_ALLOW_RUNTIME_LORA_UPDATING": "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "LORAMUX_PLUGINS": "VLLM_PLUGINS",
    "LORAMUX_LORA_RESOLVER_CACHE_DIR": "VLLM_LORA_RESOLVER_CACHE_DIR",
    "LORAMUX_LORA_RESOLVER_HF_REPO_LIST": "VLLM_LORA_RESOLVER_HF_REPO_LIST",
    "LORAMUX_TIMEOUT_KEEP_ALIVE": "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the server process is started with."""

    model: str  # as given: a folder or a Hub id
    served_model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    ssl_refresh: bool = False  # follow the files
    uds: str | None = None  # path of a Unix socket, instead of host and port
    uds_permissions: int = 0o660  # of its file
    log_level: str = "info"
    docs: bool = True
    timeout_keep_alive_s: int = 5
    sse_keep_alive_s: float = 15.0
    shutdown_timeout_s: float = 0.0
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    chat_template: str | None = None
    response_role: str = "assistant"
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    connections: ConnectionConfig = field(default_factory=ConnectionConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    tools: ToolConfig = field(default_factory=ToolConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything `loramux serve` was told."""

    server: ServerConfig
    engine: EngineConfig
    adapters: AdapterConfig
    access: AccessConfig = field(default_factory=AccessConfig)
    care: EngineCare = field(default_factory=EngineCare)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    warnings: tuple[str, ...] = ()  # one line each, for the operator


def read_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """The configuration for the arguments of `loramux serve`.

    Args:
        argv: without the command's name.
        environ: the process's environment unless given.

    Raises:
        InvalidConfig: names the flag, variable or key at fault.
    """
    environ = os.environ if environ is None else environ
    _check_twins(environ)
    arguments = list(argv)
    namespace, warnings = flags.parse(arguments)
    arguments += environment_arguments(environ, namespace, flags.all_flags().values())
    namespace, warnings = flags.parse(arguments)
    if namespace.config is not None:
        arguments += _file_arguments(Path(namespace.config).expanduser(), namespace)
        namespace, warnings = flags.parse(arguments)
    values = {name: value for name, value in vars(namespace).items() if value is not None}
    return _build(values, environ, warnings)


def _check_twins(environ: Mapping[str, str]) -> None:
    for ours, theirs in TWINS.items():
        if environ.get(ours, environ.get(theirs)) != environ.get(theirs, environ.get(ours)):
            message = f"{ours} and {theirs} are both set, to different values; unset one of them"
            raise InvalidConfig(message, param=ours)


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
        if flag.name == "model" and namespace.positional_model is not None:
            continue
        found += _argument(flag, value, variable)
    return found


def _file_arguments(path: Path, namespace: argparse.Namespace) -> list[str]:
    """Arguments for the flags that only the file sets."""
    try:
        entries = msgspec.yaml.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"--config {path}: {error}", param="--config") from error
    if not isinstance(entries, dict):
        raise InvalidConfig(f"--config {path} must hold a mapping of flags to values", param="--config")
    known = flags.all_flags()
    found: list[str] = []
    for key, value in entries.items():
        dest = str(key).replace("-", "_")
        has_model = dest == "model" and namespace.positional_model is not None
        if has_model or getattr(namespace, dest, None) is not None or value is None:
            continue
        flag = known.get(dest) or Flag(str(key), "", is_switch=isinstance(value, bool))
        found += _argument(flag, value, f"--config {path}: {key}")
    return found


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


def _build(values: dict[str, Any], environ: Mapping[str, str], warnings: list[str]) -> Config:
    model = values.get("model", values.get("positional_model"))
    if model is None:
        raise InvalidConfig("no model given: loramux serve MODEL, or --model MODEL", param="--model")
    if "model" in values and values.get("positional_model", model) != model:
        message = f"two models given: {values['positional_model']!r} and --model {model!r}"
        raise InvalidConfig(message, param="--model")
    served = tuple(values.get("served_model_name", (model,)))
    for name in served:
        if not 1 <= len(name) <= 256 or not name.isprintable():
            message = f"--served-model-name {name[:256]!r} must be 1 to 256 printable characters"
            raise InvalidConfig(message, param="--served-model-name")
    values = {**values, "model": model, "served_model_name": served}
    access = access_config(values)
    return Config(
        server=_server_config(values, has_keys=access.has_keys),
        engine=_engine_config(values),
        adapters=adapter_config(values, environ),
        access=access,
        care=engine_care(values),
        observe=observe_config(values),
        warnings=tuple(warnings),
    )


def _engine_config(values: dict[str, Any]) -> EngineConfig:
    given = {name: values[name] for name in EngineConfig.__struct_fields__ if name in values}
    if given.get("max_model_len") == -1:
        del given["max_model_len"]
    if "num_gpu_blocks_override" in values:
        given["num_kv_blocks"] = values["num_gpu_blocks_override"]
    if given.get("max_cpu_loras", 1) <= 0:
        del given["max_cpu_loras"]
    if "grammar_compile_timeout" in values:
        given["grammar_compile_timeout_s"] = values["grammar_compile_timeout"]
    engine = EngineConfig(**given)
    if engine.max_cpu_loras is not None and engine.max_cpu_loras < engine.max_loras:
        message = f"max_cpu_loras ({engine.max_cpu_loras}) must be >= max_loras ({engine.max_loras})."
        raise InvalidConfig(message, param="--max-cpu-loras")
    return engine


def _server_config(values: dict[str, Any], *, has_keys: bool) -> ServerConfig:
    given = {spec.name: values[spec.name] for spec in fields(ServerConfig) if spec.name in values}
    given |= {
        "served_model_names": values["served_model_name"],
        "host": values.get("host") or ("0.0.0.0" if has_keys else "127.0.0.1"),
        "limits": _limits(values),
        "admission": admission_config(values),
        "connections": connection_config(values),
        "api": api_config(values),
        "tools": tool_config(values),
        "docs": not values.get("disable_fastapi_docs", False),
    }
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        if name in values:
            given[name] = _string_list(values[name], f"--{name.replace('_', '-')}")
    renamed = {
        "uvicorn_log_level": "log_level",
        "timeout_keep_alive": "timeout_keep_alive_s",
        "sse_keep_alive_interval": "sse_keep_alive_s",
        "shutdown_timeout": "shutdown_timeout_s",
        "enable_ssl_refresh": "ssl_refresh",
    }
    given |= {ours: values[flag] for flag, ours in renamed.items() if flag in values}
    if "override_generation_config" in values:
        given["override_generation_config"] = _json_object(
            values["override_generation_config"], "--override-generation-config"
        )
    _check_server(given, values)
    return ServerConfig(**given)


def _check_server(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    if not 0 <= given.get("port", 8000) <= 65535:
        raise InvalidConfig(f"--port must be from 0 to 65535, got {given['port']}", param="--port")
    choices = (
        ("log_level", "--uvicorn-log-level", LOG_LEVELS),
        ("generation_config", "--generation-config", ("auto", "vllm")),
        ("ssl_cert_reqs", "--ssl-cert-reqs", (0, 1, 2)),
    )
    for name, flag, allowed in choices:
        if name in given and given[name] not in allowed:
            names = ", ".join(map(str, allowed))
            raise InvalidConfig(f"{flag} must be one of {names}, got {given[name]!r}", param=flag)
    if bool(given.get("ssl_keyfile")) != bool(given.get("ssl_certfile")):
        raise InvalidConfig("--ssl-keyfile and --ssl-certfile need each other", param="--ssl-keyfile")
    for name in ("timeout_keep_alive_s", "sse_keep_alive_s", "shutdown_timeout_s"):
        if given.get(name, 0) < 0:
            flag = f"--{name.removesuffix('_s').replace('_', '-')}"
            raise InvalidConfig(f"{flag} must be at least 0, got {given[name]}", param=flag)


def _limits(values: Mapping[str, Any]) -> Limits:
    given: dict[str, int] = {}
    for spec in fields(Limits):
        value = values.get(f"max_{spec.name}")
        if value is None:
            continue
        if value < 0:
            flag = f"--max-{spec.name.replace('_', '-')}"
            raise InvalidConfig(f"{flag} must be at least 0, got {value}", param=flag)
        given[spec.name] = value
    return Limits(**given)


def _json_object(text: str, flag: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidConfig(
            f"{flag} must be a JSON object, got {text[:200]!r}: {error}", param=flag
        ) from error


def _string_list(text: str, flag: str) -> tuple[str, ...]:
    try:
        return tuple(msgspec.json.decode(text, type=list[str]))
    except msgspec.DecodeError as error:
        message = f"{flag} must be a JSON list of strings, got {text[:200]!r}"
        raise InvalidConfig(message, param=flag) from error
