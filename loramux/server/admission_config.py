"""How much work the server takes on at once, and how long it waits for slow clients: flags as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final, TypeVar

from loramux.engine.errors import InvalidConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """Bounds on what waits and runs. A sequence is one choice of one prompt; n counts n.

    Queued means: admitted, and without a first token yet. For keys and adapters what runs counts as well.
    """

    max_num_queued_reqs: int = 2048  # sequences queued in this server
    max_num_queued_tokens: int = 2 << 20  # their prompt tokens
    max_key_requests: int = 0  # sequences of one key, unless its entry says otherwise; 0 = no limit
    max_key_tokens: int = 0  # prompt tokens of one key; 0 = no limit
    max_adapter_requests: int = 0  # sequences of one adapter; 0 = no limit
    max_queue_wait_s: float = 120.0  # for the first token of a call; 0 = no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """Bounds on connections and on how slow a client may be."""

    max_connections: int = 4096
    max_header_bytes: int = 64 << 10  # request line and headers of one request
    max_header_count: int = 256
    max_buffered_bytes: int = 512 << 20  # of all bodies that are being received or parsed
    request_header_timeout_s: float = 20.0  # from a request's first byte to the end of its headers
    request_read_timeout_s: float = 60.0  # for a body; each 16 KiB that arrive add a second
    stream_write_timeout_s: float = 60.0  # that written data may wait for a client to read


_MAY_BE_ZERO: Final = frozenset(
    {"max_key_requests", "max_key_tokens", "max_adapter_requests", "max_queue_wait_s"}
)
_C = TypeVar("_C", AdmissionConfig, ConnectionConfig)


def flag_name(field: str) -> str:
    """The flag that sets a field of one of these classes."""
    return f"--{field.removesuffix('_s').replace('_', '-')}"


def admission_config(values: Mapping[str, Any]) -> AdmissionConfig:
    """The part of the configuration that is about queues.

    Args:
        values: of the flags that were given, by attribute name.

    Raises:
        InvalidConfig: names the flag at fault.
    """
    return _from_flags(AdmissionConfig, values)


def connection_config(values: Mapping[str, Any]) -> ConnectionConfig:
    """The part of the configuration that is about connections.

    Args:
        values: of the flags that were given, by attribute name.

    Raises:
        InvalidConfig: names the flag at fault.
    """
    return _from_flags(ConnectionConfig, values)


def _from_flags(cls: type[_C], values: Mapping[str, Any]) -> _C:
    given: dict[str, Any] = {}
    for spec in fields(cls):
        assert spec.default is not MISSING
        value = values.get(spec.name.removesuffix("_s"))
        if value is None:
            continue
        low = 0 if spec.name in _MAY_BE_ZERO else 1 if isinstance(spec.default, int) else 0.01
        if not low <= value < float("inf"):
            flag = flag_name(spec.name)
            raise InvalidConfig(f"{flag} must be at least {low:g} and finite, got {value}", param=flag)
        given[spec.name] = value
    return cls(**given)
