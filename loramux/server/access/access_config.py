"""Who may use the server, as flags, environment and the keys file say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.engine.errors import InvalidConfig
from loramux.server.access.keys import KeyEntry, KeyRing, read_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """Keys, hosts and the audit log."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)  # of --api-key: all scopes
    api_keys_file: Path | None = None
    key_entries: tuple[KeyEntry, ...] = field(default=(), repr=False)  # what the file held at the start
    audit_log: Path | None = None
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header; empty = any
    forwarded_allow_ips: str | None = None  # proxies to believe; None = FORWARDED_ALLOW_IPS, or 127.0.0.1
    guard_metrics: bool = False  # /metrics needs the scope `admin`

    @property
    def has_keys(self) -> bool:
        """True if requests need a key."""
        return bool(self.api_keys or self.key_entries)


def access_config(values: Mapping[str, Any]) -> AccessConfig:
    """The part of the configuration that is about access.

    Args:
        values: of the flags that were given, by attribute name.

    Raises:
        InvalidConfig: names the flag at fault.
    """
    api_keys = tuple(dict.fromkeys(_plain_key(key) for key in values.get("api_key", ())))
    path = _path(values.get("api_keys_file"))
    entries = read_keys(path) if path else ()
    KeyRing(api_keys, entries)  # refuses a key that both give
    hosts = tuple(host.lower() for host in values.get("allowed_hosts", ()) if host)
    for host in hosts:
        if "://" in host or "/" in host or "*" in host[1:] or (host[0] == "*" and host[:2] != "*."):
            message = f"--allowed-hosts takes names like llm.example.org or *.example.org, got {host[:256]!r}"
            raise InvalidConfig(message, param="--allowed-hosts")
    return AccessConfig(
        api_keys=api_keys,
        api_keys_file=path,
        key_entries=entries,
        audit_log=_path(values.get("audit_log")),
        allowed_hosts=hosts,
        forwarded_allow_ips=values.get("forwarded_allow_ips"),
        guard_metrics=values.get("guard_metrics", False),
    )


def _plain_key(text: str) -> str:
    """A key as a client sends it; files and secrets often end with a line break."""
    key = text.strip()
    if not key or " " in key or not (key.isprintable() and key.isascii()):
        # An empty variable in a start script must not open the server to everybody.
        message = (
            "--api-key takes keys of printable ASCII characters without blanks, at least one; got another"
        )
        raise InvalidConfig(message, param="--api-key")
    return key


def _path(text: str | None) -> Path | None:
    return Path(os.path.abspath(os.path.expanduser(text))) if text else None
