"""Keys files for tests: each key is known by its id."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec


def key_of(key_id: str) -> str:
    """The key that `key_entry` makes an entry for."""
    return f"lmx-secret-of-{key_id}"


def key_entry(key_id: str, *scopes: str, **fields: Any) -> dict[str, Any]:
    """An entry of a keys file."""
    digest = hashlib.sha256(key_of(key_id).encode()).hexdigest()
    return {"id": key_id, "sha256": digest, "scopes": list(scopes), **fields}


def write_keys(path: Path, *entries: dict[str, Any]) -> Path:
    """A keys file that only its owner can read."""
    path.touch(0o600)
    path.write_bytes(msgspec.json.encode({"keys": entries}))
    return path


def bearer(key_id: str) -> dict[str, str]:
    """The header that brings a key."""
    return {"authorization": f"Bearer {key_of(key_id)}"}
