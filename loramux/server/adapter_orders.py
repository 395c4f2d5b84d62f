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


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChange:
    """One try to change what a name stands for, and what came of it: what an audit log wants to know."""

    action: str  # load, reload, pin, unpin, unload or resolve
    name: str
    origin: str  # of the order
    duration_s: float
    source: str | None = None  # as shown to clients
    digest: str | None = None
    version_before: int | None = None
    version_after: int | None = None
    nbytes: int | None = None
    pinned: bool | None = None
    error: Exception | None = None  # None = done


def load_change(
    order: LoadOrder,
    before: AdapterRef | None,
    result: Loaded | Exception,
    *,
    source: str | None,
    took_s: float,
) -> AdapterChange:
    """What a load was, in the words of `AdapterChange`."""
    after = result.ref if isinstance(result, Loaded) else None
    action = "load" if before is None else "reload"
    if order.origin is Origin.RESOLVER:
        action = "resolve"
    elif isinstance(result, Loaded) and result.outcome is Outcome.UNCHANGED:
        is_pin = before is not None and before.pinned != result.ref.pinned
        action = ("pin" if result.ref.pinned else "unpin") if is_pin else "load"
    return AdapterChange(
        action=action,
        name=order.name,
        origin=order.origin.value,
        duration_s=took_s,
        source=after.source if after else source,
        digest=after.digest if after else order.digest,
        version_before=before.version if before else None,
        version_after=after.version if after else None,
        nbytes=after.spec.nbytes if after else None,
        pinned=after.pinned if after else order.pinned,
        error=result if isinstance(result, Exception) else None,
    )


def unload_change(name: str, result: Unloaded | Exception, *, took_s: float) -> AdapterChange:
    """What an unload was."""
    ref = result.ref if isinstance(result, Unloaded) else None
    freed = result.freed if isinstance(result, Unloaded) else None
    return AdapterChange(
        action="unload",
        name=name,
        origin=ref.origin.value if ref else Origin.API.value,
        duration_s=took_s,
        source=ref.source if ref else None,
        digest=ref.digest if ref else None,
        version_before=ref.version if ref else None,
        nbytes=freed.host_bytes if freed else None,
        error=result if isinstance(result, Exception) else None,
    )
