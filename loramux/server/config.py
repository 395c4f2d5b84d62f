"""Flags, environment and file put together into one frozen `Config`.

Later wins: built-in defaults, `--config` file, environment, flags. A variable is `LORAMUX_` and the
flag's name; where users already set vLLM's name, that works as well, and both set to different values
stop the start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import msgspec

from loramux.engine.config import EngineConfig
from loramux.engine.errors import InvalidConfig
from loramux.server.access.access_config import AccessConfig, access_config
from loramux.server.adapter_config import AdapterConfig, adapter_config
from loramux.server.admission_config import (
    AdmissionConfig,
    ConnectionConfig,
    admission_config,
    connection_config,
)
from loramux.server.api_config import ApiConfig, api_config
from loramux.server.config_sources import Gathered, gather
from loramux.server.engine_care import EngineCare, engine_care
from loramux.server.limits import Limits
from loramux.server.observe.observe_config import ObserveConfig, observe_config
from loramux.server.tool_config import ToolConfig, tool_config

LOG_LEVELS: Final = ("critical", "error", "warning", "info", "debug", "trace")


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
    timeout_keep_alive_s: int = 75  # longer than proxies and client libraries keep idle connections
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
    given: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what somebody set
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)  # and where


def read_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """The configuration for the arguments of `loramux serve`.

    Args:
        argv: without the command's name.
        environ: the process's environment unless given.

    Raises:
        InvalidConfig: names the flag, variable or key at fault.
    """
    environ = os.environ if environ is None else environ
    gathered = gather(argv, environ)
    return _build(gathered, environ)


def _build(gathered: Gathered, environ: Mapping[str, str]) -> Config:
    values = gathered.values
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
        warnings=tuple(gathered.warnings),
        given=gathered.values,
        origins=gathered.origins,
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
