"""`--print-config`: every flag's value and who set it, as YAML that `--config` reads again.

A flag that nobody set shows what the server makes of it. Secrets are never shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.server.config import Config
from loramux.server.flag import Flag
from loramux.server.flag_table import FLAGS

SECRETS: Final = frozenset({"api_key", "hf_token"})
_ACTIONS: Final = frozenset({"config", "print_config", "check_config"})  # they say what to do, not how

# Where the value of a flag stands in `Config`, if it is not a field of the same name (or with `_s`, for
# seconds) of one of its parts, and not a limit. A path that begins with `not ` is a flag that turns it off.
_PLACES: Final[Mapping[str, str]] = {
    "model": "server.model",
    "served_model_name": "server.served_model_names",
    "tokenizer": "server.tokenizer",
    "hf_token": "server.hf_token",
    "lora_modules": "adapters.modules",
    "lora_modules_strict": "adapters.modules_strict",
    "allow_runtime_lora_updating": "adapters.allow_runtime_updating",
    "adapter_load_timeout": "adapters.load_timeout_s",
    "adapter_store_dir": "adapters.sources.store_dir",
    "allowed_local_path": "",  # the flag adds to what is allowed anyway
    "copy_local_adapters": "adapters.sources.copy_local",
    "download_stall_timeout": "adapters.sources.stall_timeout_s",
    "num_gpu_blocks_override": "engine.num_kv_blocks",
    "enable_force_include_usage": "server.api.force_include_usage",
    "enable_per_request_metrics": "server.api.request_metrics",
    "return_tokens_as_token_ids": "server.api.tokens_as_token_ids",
    "enable_tokenizer_info_endpoint": "server.api.tokenizer_info",
    "chat_template_content_format": "server.api.content_format",
    "default_chat_template_kwargs": "server.api.template_kwargs",
    "allowed_chat_template_kwargs": "server.api.allowed_template_kwargs",
    "trust_request_chat_template": "server.api.trust_request_template",
    "parse_special_tokens_in_messages": "server.api.parse_special_tokens",
    "tool_call_parser": "server.tools.tool_parser",
    "enable_auto_tool_choice": "server.tools.auto_tool_choice",
    "exclude_tools_when_tool_choice_none": "server.tools.exclude_when_none",
    "api_key": "access.api_keys",
    "enable_ssl_refresh": "server.ssl_refresh",
    "disable_fastapi_docs": "not server.docs",
    "sse_keep_alive_interval": "server.sse_keep_alive_s",
    "uvicorn_log_level": "server.log_level",
    "log_format": "observe.log_format",
    "disable_uvicorn_access_log": "not observe.access_lines",
    "disable_access_log_for_endpoints": "",
    "enable_log_requests": "observe.log_requests",
    "enable_log_outputs": "observe.log_outputs",
    "max_log_len": "observe.max_log_chars",
    "otlp_traces_endpoint": "observe.otlp_endpoint",
    "engine_watchdog_timeout": "care.watchdog_s",
    "engine_restart_wait": "care.restart_wait_s",
    "max_engine_restarts": "care.max_restarts",
}


def render_config(config: Config) -> str:
    """The whole configuration as YAML, with a comment behind each value that says who set it."""
    lines = ["# loramux serve --config THIS_FILE; a flag or a variable of the environment wins over it"]
    for title, flags in FLAGS.items():
        lines += ["", f"# {title}"]
        lines += [_line(config, flag) for flag in flags if flag.dest not in _ACTIONS]
    return "\n".join(lines) + "\n"


def _line(config: Config, flag: Flag) -> str:
    name = "positional_model" if flag.dest == "model" and "model" not in config.given else flag.dest
    origin = config.origins.get(name, "default")
    if flag.dest in SECRETS:
        shown = "<redacted>" if name in config.given else "none"
        return f"# {flag.name}: {shown}  # {origin}"
    value = config.given[name] if name in config.given else default_of(config, flag)
    return f"{flag.name}: {_yaml(flag, value)}  # {origin}"


def default_of(config: Config, flag: Flag) -> Any:
    """What the server uses for a flag that was not set; None if that is nothing, or not a value of a flag.

    Raises:
        LookupError: this page does not know the flag; it belongs into `_PLACES`.
    """
    place = _PLACES.get(flag.dest)
    if place == "":
        return None
    if place is not None:
        value: Any = config
        for part in place.removeprefix("not ").split("."):
            value = getattr(value, part)
        return not value if place.startswith("not ") else value
    for part in _parts(config):
        for name in (flag.dest, f"{flag.dest}_s"):
            if hasattr(part, name):
                return getattr(part, name)
    limit = flag.dest.removeprefix("max_")
    if limit != flag.dest and hasattr(config.server.limits, limit):
        return getattr(config.server.limits, limit)
    raise LookupError(f"where --{flag.name} stands in Config is to be said in config_print.py")


def _parts(value: Any) -> Iterator[Any]:
    """The configuration's dataclasses, from the outermost one inwards."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, msgspec.Struct):
        yield value


def _yaml(flag: Flag, value: Any) -> str:
    """JSON, which is YAML; nothing for what is empty, because a flag cannot say that."""
    if flag.dest == "uds_permissions":
        return f'"{value:o}"'
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple | list | frozenset):
        value = list(value)
        if not flag.is_list and value:  # a JSON list in one word
            value = msgspec.json.encode(value).decode()
    if isinstance(value, Mapping) and value:
        value = msgspec.json.encode(dict(value)).decode()
    if value is None or value == [] or value == {}:
        return "null"
    return msgspec.json.encode(value).decode()
