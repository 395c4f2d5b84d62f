"""Who sent a request: what the key check found out, for everything behind it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from starlette.types import Scope

SCOPES: Final = ("inference", "adapters:read", "adapters:write", "admin")
_CALLER: Final = "loramux.caller"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The owner of a key; `ANYONE` where the server has no keys.

    `adapters` are globs of adapter names, case-sensitive; the base model is always allowed.
    """

    key_id: str | None = None  # a name for logs and metrics, never the key
    scopes: frozenset[str] = frozenset(SCOPES)
    adapters: tuple[str, ...] = ("*",)
    cache_salt: str = ""  # callers with different salts never share prefix KV
    max_requests: int | None = None  # of this key, running and queued; None = no limit of its own
    max_tokens: int | None = None  # prompt tokens of this key, running and queued

    def may_use(self, adapter: str) -> bool:
        """True if requests of this caller may name the adapter."""
        return any(fnmatchcase(adapter, glob) for glob in self.adapters)


ANYONE: Final = Caller()


def caller_of(scope: Scope) -> Caller:
    """The caller of a request."""
    caller: Caller = scope.get(_CALLER, ANYONE)
    return caller


def set_caller(scope: Scope, caller: Caller) -> None:
    """Note who sent a request; the key check does this once."""
    scope[_CALLER] = caller
