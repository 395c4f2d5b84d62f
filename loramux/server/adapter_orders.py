"""What somebody wants a name to stand for, and how that ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from loramux.engine.types import FreedMemory
from loramux.server.adapters import AdapterRef, Origin


class IfLoaded(Enum):
    """What a load does when its name is taken."""

    REFUSE = "refuse"  # an error, whatever the content
    KEEP = "keep"  # nothing if it is the same content, else an error
    REPLACE = "replace"  # nothing if it is the same content, else the new one takes its place


class Outcome(Enum):
    """What a load did."""

    ADDED = "added"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """What somebody wants a name to stand for."""

    name: str
    source: str | None  # what a `SourceFetcher` takes; None = whatever the resolvers find
    if_loaded: IfLoaded = IfLoaded.REFUSE
    pinned: bool | None = None  # None = as it is
    base_model_name: str | None = None
    digest: str | None = None  # the content must have it
    origin: Origin = Origin.API
    shown_source: str | None = None  # for clients; None = from `source`
    last: tuple[int, str] | None = None  # version and digest that the name had before a restart


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a load ended well."""

    ref: AdapterRef
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """How an unload ended, or how far it is."""

    ref: AdapterRef | None  # None if only a load was stopped
    leases: int = 0  # requests that still run on it
    is_gone: bool = True
    freed: FreedMemory | None = None
    shared_with: tuple[str, ...] = ()  # other names with the same content, for which it stays
