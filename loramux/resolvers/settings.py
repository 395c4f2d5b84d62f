"""How sources and the local store behave: one frozen value, set by the operator alone.

Client libraries have variables of their own (`HF_TOKEN`, `AWS_REGION`, …). They are read here, once, so
that a request can never reach them and a test can set them without touching its own process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from loramux.engine.errors import InvalidConfig

_GIB: Final = 1 << 30
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"", "0", "false", "no", "off"})

AddressingStyle = Literal["auto", "path", "virtual"]


def default_store_dir(environ: Mapping[str, str]) -> Path:
    """Where adapters are kept unless the operator says otherwise: the user's cache folder."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "loramux"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """Where adapters may come from, and the limits of fetching them."""

    store_dir: Path  # the local store; created when missing
    allowed_local_paths: tuple[Path, ...] = ()  # roots that file:// and plain paths must lie under
    pvc_root: Path | None = None  # pvc://claim/path is the folder pvc_root/claim/path
    copy_local: bool = True  # False: serve local folders where they are, although they may change
    offline: bool = False  # True: open no socket

    max_adapter_bytes: int = 16 * _GIB  # of all files of one adapter; checked before a byte is read
    max_store_bytes: int | None = 64 * _GIB  # beyond it the least recently used folders go; None = no limit
    min_free_bytes: int = 256 << 20  # what a download must leave free on the disk
    stall_timeout_s: float = 30.0  # a download without a byte for so long is cut and continued
    connect_timeout_s: float = 10.0
    max_tries: int = 4  # in a row without a new byte, before a download is given up
    retry_delay_s: float = 0.25  # before the second try; doubles
    max_parallel_downloads: int = 4

    hf_endpoint: str = "https://huggingface.co"
    hf_token: str | None = field(default=None, repr=False)
    s3_endpoint: str | None = None  # None = AWS
    s3_region: str | None = None
    s3_addressing_style: AddressingStyle = "auto"
    s3_anonymous: bool = False
    s3_access_key_id: str | None = field(default=None, repr=False)  # None = botocore's own search
    s3_secret_access_key: str | None = field(default=None, repr=False)
    s3_session_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for endpoint in (self.hf_endpoint, self.s3_endpoint):
            if endpoint is not None:
                _check_endpoint(endpoint)
        for name in ("max_adapter_bytes", "stall_timeout_s", "max_tries", "max_parallel_downloads"):
            if getattr(self, name) <= 0:
                raise InvalidConfig(f"{name} must be greater than 0, got {getattr(self, name)}", param=name)


def settings_from(environ: Mapping[str, str], **overrides: Any) -> SourceSettings:
    """The settings that the environment gives, with `overrides` (the server's flags) on top.

    Raises:
        InvalidConfig: a variable has a value that cannot be used.
    """
    style = environ.get("LORAMUX_S3_ADDRESSING_STYLE") or "auto"
    if style not in ("auto", "path", "virtual"):
        raise InvalidConfig(
            f"LORAMUX_S3_ADDRESSING_STYLE must be auto, path or virtual, got {style!r}",
            param="LORAMUX_S3_ADDRESSING_STYLE",
        )
    values: dict[str, Any] = {
        "store_dir": default_store_dir(environ),
        "offline": switch(environ, "LORAMUX_OFFLINE") or switch(environ, "HF_HUB_OFFLINE"),
        "hf_endpoint": (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
        "hf_token": _hub_token(environ),
        "s3_endpoint": environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None,
        "s3_region": environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or None,
        "s3_addressing_style": style,
        "s3_anonymous": switch(environ, "LORAMUX_S3_ANONYMOUS"),
        "s3_access_key_id": environ.get("AWS_ACCESS_KEY_ID") or None,
        "s3_secret_access_key": environ.get("AWS_SECRET_ACCESS_KEY") or None,
        "s3_session_token": environ.get("AWS_SESSION_TOKEN") or None,
    }
    return SourceSettings(**{**values, **overrides})


def twin_variable(environ: Mapping[str, str], name: str) -> str | None:
    """The value of `LORAMUX_<name>` or its twin `VLLM_<name>`; None when neither is set, or to nothing.

    Raises:
        InvalidConfig: both are set, to different values.
    """
    ours, theirs = f"LORAMUX_{name}", f"VLLM_{name}"
    if environ.get(ours, environ.get(theirs)) != environ.get(theirs, environ.get(ours)):
        raise InvalidConfig(
            f"{ours} and {theirs} are both set, to different values; unset one of them", param=ours
        )
    return environ.get(ours, environ.get(theirs)) or None


def switch(environ: Mapping[str, str], name: str) -> bool:
    """A variable that is on or off; unset is off.

    Raises:
        InvalidConfig: it is something else.
    """
    value = environ.get(name, "").strip().lower()
    if value not in _TRUE | _FALSE:
        raise InvalidConfig(f"{name} must be 1 or 0, got {environ[name]!r}", param=name)
    return value in _TRUE


def _hub_token(environ: Mapping[str, str]) -> str | None:
    """The Hub's token, from where its own tools keep it: the variable, else the file that login wrote."""
    token = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN")
    if token:
        return token.strip()
    home = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    try:
        return Path(environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")).read_text().strip() or None
    except OSError:
        return None


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidConfig(
            f"an endpoint must be of the form https://HOST[:PORT][/PATH], got {endpoint!r}", param="endpoint"
        )
