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

    `adapters` are globs of adapter names, case-sensitive; the base model is always allowed. `sources`
    are globs of canonical source addresses.
    """

    key_id: str | None = None  # a name for logs and metrics, never the key
    scopes: frozenset[str] = frozenset(SCOPES)
    adapters: tuple[str, ...] = ("*",)
    sources: tuple[str, ...] = ("*",)
    cache_salt: str = ""  # callers with different salts never share prefix KV
    max_requests: int | None = None  # of this key, running and queued; None = no limit of its own
    max_tokens: int | None = None  # prompt tokens of this key, running and queued

    def may_use(self, adapter: str) -> bool:
        """True if requests of this caller may name the adapter."""
        return any(fnmatchcase(adapter, glob) for glob in self.adapters)

    def may_load(self, source: str) -> bool:
        """True if this caller may load adapters from a canonical address."""
        return any(fnmatchcase(source, glob) for glob in self.sources)

    @property
    def sees_everything(self) -> bool:
        """True if no adapter is hidden from this caller."""
        return "*" in self.adapters

    def salted(self, cache_salt: str) -> str:
        """The cache salt of a request: the caller's own and the one that it asked for."""
        return f"{self.cache_salt}\x1f{cache_salt}" if self.cache_salt else cache_salt


ANYONE: Final = Caller()
NOBODY: Final = Caller(scopes=frozenset(), adapters=(), sources=(), cache_salt="nobody")


def caller_of(scope: Scope) -> Caller:
    """The caller of a request; one that no key check has seen may do nothing."""
    caller: Caller = scope.get(_CALLER, NOBODY)
    return caller


def set_caller(scope: Scope, caller: Caller) -> None:
    """Note who sent a request; the key check does this once."""
    scope[_CALLER] = caller
