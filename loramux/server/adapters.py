"""The adapter table: which names exist, and which content each of them stands for right now.

A request asks once, when it is admitted, and leases what it got until it ends: below this table only
the digest counts. Nothing here does I/O or waits; `adapter_manager.py` acts.

    resolving → downloading → verifying → loading → ready → draining → gone
        └──────────── any of these ────────────┴─► failed

A name has at most one current version, at most one load under way, and older versions that requests
still run on. A load that fails leaves the current version as it is.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final
from urllib.parse import quote

from loramux.engine.errors import LoramuxError, ModelNotFound
from loramux.engine.types import AdapterSpec
from loramux.server.adapter_names import MAX_NAME_CHARS, require_adapter_name
from loramux.version import __version__

_MAX_FAILED: Final = 256  # names that never loaded, kept to be shown
_MAX_REMEMBERED: Final = 10_000  # names that are gone, whose next version must not repeat a number


class AdapterState(StrEnum):
    """What an adapter is doing, as clients see it."""

    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # no new requests; some still run on it
    GONE = "gone"
    FAILED = "failed"


class Origin(StrEnum):
    """Who wanted an adapter, and so who brings it back after a restart."""

    FLAG = "flag"  # --lora-modules
    API = "api"  # the journal, if there is one
    FILE = "file"  # --adapters-file
    RESOLVER = "resolver"  # the next request that names it


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One version of one adapter, as a request was given it."""

    name: str
    version: int  # 1 at first, one more with every replacement
    source: str  # as shown to clients; never a local path
    parent: str  # the served base name it belongs to
    created: int  # Unix seconds: when the name appeared
    loaded_at: float  # Unix seconds: when this version did
    spec: AdapterSpec
    uri: str = ""  # where it can be fetched again, to the byte if possible
    revision: str | None = None
    pinned: bool = False
    origin: Origin = Origin.API
    targets: tuple[str, ...] = ()  # kinds of modules that it changes, such as q_proj

    @property
    def digest(self) -> str:
        """What the engine knows the adapter by."""
        return self.spec.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a load came to nothing."""

    error: LoramuxError
    code: str
    at: float  # Unix seconds
    retry_at: float | None = None  # when it is tried again; None = when somebody asks


@dataclass(slots=True, kw_only=True)
class Loading:
    """A load under way."""

    state: AdapterState
    source: str  # as shown to clients
    started_at: float
    done_bytes: int = 0
    total_bytes: int | None = None


@dataclass(slots=True)
class Version:
    """A version in use, and how much."""

    ref: AdapterRef
    leases: int = 0
    last_used: float | None = None
    is_current: bool = True


@dataclass(slots=True)
class Row:
    """Everything about one name."""

    name: str
    current: Version | None = None
    loading: Loading | None = None
    failure: Failure | None = None  # of the last load
    draining: list[Version] = field(default_factory=list)

    @property
    def state(self) -> AdapterState:
        """The current version's state, or that of the load while there is none."""
        if self.current is not None:
            return AdapterState.READY
        if self.loading is not None:
            return self.loading.state
        return AdapterState.DRAINING if self.draining else AdapterState.FAILED


class AdapterLease:
    """One request's hold on one version: its weights stay until `release`."""

    def __init__(self, version: Version, release: Callable[[Version], None]) -> None:
        self.ref = version.ref
        self._version = version
        self._release: Callable[[Version], None] | None = release

    def release(self) -> None:
        """The request has ended; more than one call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release(self._version)


class AdapterTable:
    """Names of the base model and of adapters.

    Args:
        base_names: the served base names; the first one is the parent of adapters.
        on_unused: called with a version that is no longer current, once nobody leases it.
        clock: Unix seconds.
    """

    def __init__(
        self,
        base_names: Sequence[str],
        *,
        on_unused: Callable[[AdapterRef], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.base_names = tuple(base_names)
        self.on_unused = on_unused
        self._clock = clock
        self.created = int(clock())
        self._rows: dict[str, Row] = {}
        self._failed: OrderedDict[str, None] = OrderedDict()  # rows that are nothing but a failure
        self._last_versions: OrderedDict[str, int] = OrderedDict()  # of names that are gone

    # What requests ask

    def is_base(self, model: str | None) -> bool:
        """True if a request's `model` means the base model."""
        return not model or model in self.base_names

    def lookup(self, model: str | None) -> AdapterRef | None:
        """The adapter that a request's `model` names; None for the base model.

        Raises:
            ModelNotFound: it is neither. Never answered by the base instead.
        """
        if not model or model in self.base_names:
            return None
        ref = self.current(model)
        if ref is None:
            raise self.not_found(model)
        return ref

    def lease(self, name: str) -> AdapterLease | None:
        """Hold the current version of an adapter; None if there is none."""
        row = self._rows.get(name)
        if row is None or row.current is None:
            return None
        version = row.current
        version.leases += 1
        version.last_used = self._clock()
        return AdapterLease(version, self._released)

    def not_found(self, model: str) -> ModelNotFound:
        """The answer to a name that nobody knows."""
        names = ", ".join(self.base_names)
        message = f"The model `{model[:MAX_NAME_CHARS]}` does not exist. Valid aliases: {names}."
        return ModelNotFound(message, param="model")

    def current(self, name: str) -> AdapterRef | None:
        """The version that new requests get."""
        row = self._rows.get(name)
        return row.current.ref if row is not None and row.current is not None else None

    def all(self) -> list[AdapterRef]:
        """The current version of every adapter, by name."""
        return [row.current.ref for row in self.rows() if row.current is not None]

    def row(self, name: str) -> Row | None:
        """Everything about one name, None if it is unknown."""
        return self._rows.get(name)

    def rows(self) -> Iterator[Row]:
        """Every name, in order."""
        return (self._rows[name] for name in sorted(self._rows))

    # What the manager does

    def begin(self, name: str, source: str) -> None:
        """A load starts."""
        row = self._rows.setdefault(name, Row(name))
        self._failed.pop(name, None)
        row.loading = Loading(state=AdapterState.RESOLVING, source=source, started_at=self._clock())

    def advance(self, name: str, state: AdapterState, *, done: int = 0, total: int | None = None) -> bool:
        """A load got on; True if its state is another one now."""
        row = self._rows.get(name)
        if row is None or row.loading is None:
            return False
        has_changed = row.loading.state is not state
        row.loading.state, row.loading.done_bytes, row.loading.total_bytes = state, done, total
        return has_changed

    def publish(
        self,
        name: str,
        spec: AdapterSpec,
        *,
        source: str,
        base_model_name: str | None = None,
        uri: str = "",
        revision: str | None = None,
        pinned: bool = False,
        origin: Origin = Origin.API,
        version: int | None = None,
    ) -> AdapterRef:
        """Move a name, in one step, to content that the engine has loaded.

        Requests that run keep the version that they lease. `version` is the next one unless given.

        Raises:
            AdapterNameRefused: no adapter may have this name.
        """
        require_adapter_name(name, self.base_names)
        now = self._clock()
        row = self._rows.setdefault(name, Row(name))
        self._failed.pop(name, None)
        old = row.current
        ref = AdapterRef(
            name=name,
            version=version or self.next_version(name),
            source=source,
            parent=base_model_name if base_model_name in self.base_names else self.base_names[0],
            created=old.ref.created if old else int(now),
            loaded_at=now,
            spec=spec,
            uri=uri,
            revision=revision,
            pinned=pinned,
            origin=origin,
            targets=tuple(sorted({module.module.rpartition(".")[2] for module in spec.modules})),
        )
        row.current, row.loading, row.failure = Version(ref), None, None
        self._last_versions.pop(name, None)
        if old is not None:
            self._retire(row, old)
        return ref

    def next_version(self, name: str) -> int:
        """The number of the version that `publish` would make."""
        ref = self.current(name)
        return 1 + (ref.version if ref else self._last_versions.get(name, 0))

    def amend(self, name: str, *, pinned: bool, origin: Origin) -> AdapterRef:
        """The current version is pinned from now on, or no longer, and wanted by somebody else."""
        row = self._rows[name]
        assert row.current is not None, f"{name} has no current version"
        row.current.ref = replace(row.current.ref, pinned=pinned, origin=origin)
        return row.current.ref

    def settle(self, name: str) -> None:
        """A load ended and changed nothing."""
        row = self._rows.get(name)
        if row is not None:
            row.loading, row.failure = None, None

    def fail(self, name: str, failure: Failure | None) -> None:
        """A load ended with an error; None if nothing of it is worth to be shown."""
        row = self._rows.get(name)
        if row is None:
            return
        row.loading, row.failure = None, failure
        if row.current is None and not row.draining:
            self._failed[name] = None
            if failure is None:
                self._forget(row)
            while len(self._failed) > _MAX_FAILED:
                self._forget(self._rows[next(iter(self._failed))])

    def remove(self, name: str) -> AdapterRef | None:
        """Forget a name at once; its version drains. None if it stood for nothing."""
        row = self._rows.get(name)
        if row is None:
            return None
        old, row.current, row.failure = row.current, None, None
        if old is not None:
            self._last_versions[name] = old.ref.version
            while len(self._last_versions) > _MAX_REMEMBERED:
                self._last_versions.popitem(last=False)
            self._retire(row, old)
        self._forget(row)
        return old.ref if old else None

    def leases_of(self, ref: AdapterRef) -> int:
        """How many requests hold a version."""
        row = self._rows.get(ref.name)
        versions = [] if row is None else [*([row.current] if row.current else []), *row.draining]
        return sum(version.leases for version in versions if version.ref.version == ref.version)

    def _released(self, version: Version) -> None:
        version.leases -= 1
        version.last_used = self._clock()
        if version.leases == 0 and not version.is_current:
            row = self._rows[version.ref.name]
            row.draining.remove(version)
            self._forget(row)
            self.on_unused(version.ref)

    def _retire(self, row: Row, version: Version) -> None:
        version.is_current = False
        if version.leases:
            row.draining.append(version)
        else:
            self.on_unused(version.ref)

    def _forget(self, row: Row) -> None:
        """Drop a row that says nothing any more, or only that a name failed which is gone."""
        if row.current is None and row.loading is None and not row.draining:
            self._rows.pop(row.name, None)
            self._failed.pop(row.name, None)


def answer_headers(adapter: AdapterRef | None) -> dict[str, str]:
    """The header that says which adapter answers; a name's unusual characters are percent-encoded."""
    if adapter is None:
        return {}
    name = quote(adapter.name, safe="/:@+=,()[]!*'~$&;")
    return {"x-loramux-adapter": f"{name}@{adapter.version} sha256:{adapter.digest}"}


def fingerprint(adapter: AdapterRef | None) -> str:
    """The `system_fingerprint` of an answer: the server's version and the weights' identity."""
    weights = "base" if adapter is None else f"sha256:{adapter.digest[:16]}"
    return f"loramux-{__version__}-{weights}"
