"""Keys: what the operator wrote down of them, and the check of the one that a request brings.

    keys:
      - id: team-a
        sha256: 9f86d0...                 # of the key; `loramux keys new --id team-a` makes both
        scopes: [inference, adapters:read]
        adapters: ["team-a/*"]            # optional, as is everything below
        sources: ["hf://team-a/*"]
        limits: {max_requests: 8, max_tokens: 100000}
        cache_salt: tenant-a

Keys are compared as sha256 digests, all of them on every request, in constant time. A plain digest is
enough since keys are drawn at random from 2**256: there is no dictionary that a salt or a slow hash
would have to protect against.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import hmac
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig
from loramux.server.access.caller import ANYONE, SCOPES, Caller

logger = logging.getLogger(__name__)

FLAG: Final = "--api-keys-file"
_MAX_BYTES: Final = 16 << 20
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/-]{0,63}")
_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9A-Fa-f]{64})")
_RESERVED: Final = "api-key-"  # ids of the keys that --api-key gives
_PLAIN: Final = frozenset({"key", "api_key", "secret", "token", "plaintext", "password", "value"})


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of the server one key may have at a time."""

    max_requests: int | None = None  # running and queued
    max_tokens: int | None = None  # prompt tokens, running and queued


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key, without the key."""

    id: str
    sha256: str  # 64 lower-case hex digits
    scopes: tuple[str, ...]
    adapters: tuple[str, ...] = ("*",)
    sources: tuple[str, ...] = ("*",)
    limits: KeyLimits = KeyLimits()
    cache_salt: str = ""

    def caller(self, *, is_only_key: bool) -> Caller:
        """What requests with this key may do; several keys never share KV unless their salts say so."""
        salt = f"salt:{self.cache_salt}" if self.cache_salt else "" if is_only_key else f"id:{self.id}"
        return Caller(
            key_id=self.id,
            scopes=frozenset(self.scopes),
            adapters=self.adapters,
            sources=self.sources,
            cache_salt=salt,
            max_requests=self.limits.max_requests,
            max_tokens=self.limits.max_tokens,
        )


def hash_key(key: bytes) -> bytes:
    """What is kept of a key: 32 bytes."""
    return hashlib.sha256(key).digest()


class KeyRing:
    """All keys of the server; without any, everybody is let in.

    Args:
        plain: keys of `--api-key`, with all scopes; their ids are `api-key-1`, `api-key-2`, ...
        entries: of the keys file.
        path: of the keys file, to be read again by `reload`.
    """

    def __init__(self, plain: Sequence[str], entries: Sequence[KeyEntry], path: Path | None = None) -> None:
        self._plain = [
            KeyEntry(id=f"{_RESERVED}{number}", sha256=hash_key(key.encode()).hex(), scopes=SCOPES)
            for number, key in enumerate(plain, 1)
        ]
        self._path = path
        self._callers: list[tuple[bytes, Caller]] = []
        self._use(entries)

    @property
    def is_open(self) -> bool:
        """True if the server has no keys."""
        return not self._callers

    def find(self, key: bytes) -> Caller | None:
        """Whose key this is, None if it is nobody's. Takes as long for any key."""
        if self.is_open:
            return ANYONE
        given = hash_key(key)
        found: Caller | None = None
        for digest, caller in self._callers:
            if hmac.compare_digest(given, digest):
                found = caller
        return found

    @property
    def num_keys(self) -> int:
        """How many there are."""
        return len(self._callers)

    async def reload(self) -> bool:
        """Read the keys file again; a wrong one changes nothing, is named in the log, and gives False."""
        if self._path is None:
            return True
        try:
            entries = await asyncio.to_thread(read_keys, self._path)
            self._use(entries)
        except InvalidConfig as error:
            logger.error("%s; the keys stay as they are", error.message)
            return False
        logger.info("%s: %d keys", FLAG, len(entries))
        return True

    def _use(self, entries: Sequence[KeyEntry]) -> None:
        every = [*self._plain, *entries]
        _refuse_repeats(every)
        self._callers = [
            (bytes.fromhex(entry.sha256), entry.caller(is_only_key=len(every) == 1)) for entry in every
        ]


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """The entries of a keys file (YAML, and so JSON as well).

    Raises:
        InvalidConfig: it cannot be read, holds no key, or an entry is wrong. Never shows a value that
            could be a key.
    """
    where = f"{FLAG} {path}"
    try:
        status = path.stat()
        if status.st_size > _MAX_BYTES:
            raise _wrong(f"{where} has more than {_MAX_BYTES} bytes")
        content = msgspec.yaml.decode(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(f"{where}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    except msgspec.DecodeError:  # its text may quote the file
        raise _wrong(f"{where} is not valid YAML") from None
    if status.st_mode & 0o004:
        logger.warning("%s can be read by every user of this machine; chmod 600 it", where)
    if not isinstance(content, dict) or not isinstance(content.get("keys"), list) or not content["keys"]:
        raise _wrong(f"{where} must hold `keys:` with a list of at least one key")
    _check_fields(where, content, ("keys",))
    entries = tuple(
        check_entry(f"{where}: key {number}", value) for number, value in enumerate(content["keys"], 1)
    )
    _refuse_repeats(entries)
    return entries


def _wrong(problem: str) -> InvalidConfig:
    return InvalidConfig(problem, param=FLAG)


def check_entry(where: str, value: object) -> KeyEntry:
    """One entry, taken apart.

    Args:
        where: what to call it in an error.
        value: what stands there.

    Raises:
        InvalidConfig: a field is unknown, missing or wrong.
    """
    if not isinstance(value, dict):
        raise _wrong(f"{where} must be a mapping with id, sha256 and scopes")
    _check_fields(where, value, KeyEntry.__struct_fields__)
    if isinstance(value.get("limits"), dict):
        _check_fields(f"{where}, limits", value["limits"], KeyLimits.__struct_fields__)
    digest = _DIGEST.fullmatch(value["sha256"]) if isinstance(value.get("sha256"), str) else None
    if digest is None:
        raise _wrong(f"{where}: sha256 must be the 64 hex digits of the key's sha256, never the key")
    try:
        entry = msgspec.convert({**value, "sha256": digest[1].lower()}, KeyEntry)
    except msgspec.ValidationError as error:
        raise _wrong(f"{where}: {error}") from error
    _check_values(where, entry)
    return entry


def _check_fields(where: str, value: Mapping[Any, Any], known: Collection[str]) -> None:
    for name in map(str, value):
        if name in known:
            continue
        if name.lower() in _PLAIN:
            raise _wrong(f"{where} holds {name!r}: keys are never written down, give sha256 instead")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise _wrong(f"{where} has the unknown field {name[:64]!r}; {hint}")


def _check_values(where: str, entry: KeyEntry) -> None:
    if not _ID.fullmatch(entry.id) or entry.id.startswith(_RESERVED):
        raise _wrong(
            f"{where}: id must be 1 to 64 of the characters A-Z a-z 0-9 . _ @ : / - and not begin with"
            f" {_RESERVED!r}, got {entry.id[:64]!r}"
        )
    where = f"{where} ({entry.id})"
    for scope in entry.scopes:
        if scope not in SCOPES:
            near = difflib.get_close_matches(scope, SCOPES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SCOPES)}"
            raise _wrong(f"{where} has the unknown scope {scope[:64]!r}; {hint}")
    if not entry.scopes:
        raise _wrong(f"{where} must have at least one scope of {', '.join(SCOPES)}")
    if len(entry.cache_salt) > 128 or not entry.cache_salt.isprintable():
        raise _wrong(f"{where}: cache_salt must be at most 128 printable characters")
    for name in KeyLimits.__struct_fields__:
        limit = getattr(entry.limits, name)
        if limit is not None and limit < 1:
            raise _wrong(f"{where}: {name} must be at least 1, got {limit}")


def _refuse_repeats(entries: Sequence[KeyEntry]) -> None:
    owners: dict[str, str] = {}
    ids: set[str] = set()
    for entry in entries:
        if entry.id in ids:
            raise InvalidConfig(f"{FLAG}: the id {entry.id!r} stands there twice", param=FLAG)
        if entry.sha256 in owners:
            same = f"{owners[entry.sha256]!r} and {entry.id!r}"
            raise InvalidConfig(f"{FLAG}: {same} are the same key", param=FLAG)
        owners[entry.sha256] = entry.id
        ids.add(entry.id)
