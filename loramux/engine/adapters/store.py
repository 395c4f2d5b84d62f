"""Which adapters exist, where their weights reside, and who uses them. Pure bookkeeping.

Three tiers, each a cache of the one below:

    known (spec: where the files are)  →  host (weights in memory)  →  device (weights in lanes)

Moving up takes time, so it is a job for the loader: `take_jobs` hands out reads (disk → host) and
copies (host → lanes), and the loader's end comes back through `host_ready`, `device_ready`,
`read_failed` or `copy_failed`. Moving down is forgetting: least recently used first, never what a
sequence leases, what is pinned, or what a copy is reading; `take_dropped` says whose host weights are
to be freed.

A sequence leases its adapter from its arrival in the engine to its end, and pins its lanes while it
runs. `retire` forgets an adapter: at once when nobody leases it, otherwise with the last lease.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field
from enum import Enum

from loramux.engine.adapters.lanes import LaneSpan, LaneTable


class HostState(Enum):
    """Whether an adapter's weights are in host memory."""

    ABSENT = "absent"
    READING = "reading"
    READY = "ready"


@dataclass(slots=True)
class _Entry:
    rank: int
    nbytes: int = 0  # in host memory, known once it was read
    host: HostState = HostState.ABSENT
    leases: int = 0
    pinned: bool = False
    retiring: bool = False
    copying: bool = False  # its lanes are being filled


@dataclass(frozen=True, slots=True)
class Jobs:
    """Work for the loader, in the order it was asked for."""

    reads: list[str]
    copies: list[tuple[str, LaneSpan]]


@dataclass(frozen=True, slots=True)
class Dropped:
    """What the owner of the weights must forget."""

    from_host: list[str]  # evicted or gone: free their host weights
    gone: list[str]  # retired, and nobody uses them any more


@dataclass(slots=True)
class AdapterStore:
    """Residency of the known adapters, by digest."""

    lanes: LaneTable
    max_host_bytes: int | None = None
    max_host_adapters: int | None = None
    num_host_evictions: int = 0
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)  # least recently used first
    _reads: list[str] = field(default_factory=list)
    _copies: list[tuple[str, LaneSpan]] = field(default_factory=list)
    _evicted: list[str] = field(default_factory=list)
    _gone: list[str] = field(default_factory=list)

    @property
    def loaded(self) -> list[str]:
        """Digests that requests may use."""
        return [digest for digest, entry in self._entries.items() if not entry.retiring]

    @property
    def on_host(self) -> list[str]:
        """Digests whose weights are in host memory, least recently used first."""
        return [digest for digest, entry in self._entries.items() if entry.host is HostState.READY]

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return sum(entry.nbytes for entry in self._entries.values() if entry.host is HostState.READY)

    @property
    def on_device(self) -> list[str]:
        """Digests whose lanes are filled, least recently used first."""
        return [digest for digest in self.lanes.residents if not self._entries[digest].copying]

    def is_loaded(self, digest: str) -> bool:
        """True if new requests may use it."""
        entry = self._entries.get(digest)
        return entry is not None and not entry.retiring

    def is_known(self, digest: str) -> bool:
        """True if anything of it is left, even if it is retiring."""
        return digest in self._entries

    def is_on_host(self, digest: str) -> bool:
        """True if its weights are in host memory."""
        return self._entries[digest].host is HostState.READY

    def is_on_device(self, digest: str) -> bool:
        """True if its lanes are filled."""
        return self.lanes.span(digest) is not None and not self._entries[digest].copying

    def add(self, digest: str, rank: int, *, pinned: bool = False) -> None:
        """Make an adapter known; one that was there already (or is retiring) is taken up again."""
        entry = self._entries.setdefault(digest, _Entry(rank))
        entry.retiring = False
        entry.pinned = entry.pinned or pinned

    def lease(self, digest: str) -> None:
        """A sequence starts to need it."""
        self._entries[digest].leases += 1
        self._entries.move_to_end(digest)

    def release(self, digest: str) -> None:
        """A sequence has ended."""
        entry = self._entries[digest]
        entry.leases -= 1
        assert entry.leases >= 0, f"adapter {digest} released twice"
        self._forget_if_unused(digest, entry)

    def retire(self, digest: str) -> None:
        """New requests may not use it; it goes when nobody uses it any more."""
        entry = self._entries[digest]
        entry.retiring = True
        self._forget_if_unused(digest, entry)

    def acquire(self, digest: str) -> LaneSpan | None:
        """Pin its lanes for a sequence that starts to run; None while they are not filled."""
        if not self.is_on_device(digest):
            return None
        self.lanes.pin(digest)
        return self.lanes.span(digest)

    def prefetch(self, digest: str, *, keep: Set[str] = frozenset()) -> bool:
        """Start to move it up, as far as there is room; False if lanes are wanted but none are free.

        Args:
            keep: adapters whose lanes must not be taken for it, because somebody waits for them too.
        """
        entry = self._entries[digest]
        if entry.host is HostState.ABSENT and self.lanes.span(digest) is None:
            entry.host = HostState.READING
            self._reads.append(digest)
        if entry.host is not HostState.READY or self.lanes.span(digest) is not None:
            return True
        pinned = {other for other in self.lanes.residents if self._entries[other].pinned}
        span = self.lanes.place(digest, entry.rank, keep=keep | pinned)
        if span is None:
            return False
        self.lanes.pin(digest)  # until it is filled
        entry.copying = True
        self._copies.append((digest, span))
        return True

    def take_jobs(self) -> Jobs:
        """What the loader has to do now; each job is handed out once."""
        jobs = Jobs(self._reads, self._copies)
        self._reads, self._copies = [], []
        return jobs

    def take_dropped(self) -> Dropped:
        """What left since the last call."""
        dropped = Dropped(self._evicted + self._gone, self._gone)
        self._evicted, self._gone = [], []
        return dropped

    def host_ready(self, digest: str, nbytes: int) -> None:
        """Its weights were read; others may have to leave host memory for it."""
        entry = self._entries[digest]
        entry.host = HostState.READY
        entry.nbytes = nbytes
        self._entries.move_to_end(digest)
        self._shrink_host(keep=digest)
        self._forget_if_unused(digest, entry)

    def read_failed(self, digest: str) -> None:
        """Its weights could not be read; a later prefetch tries again."""
        entry = self._entries[digest]
        entry.host = HostState.ABSENT
        self._forget_if_unused(digest, entry)

    def device_ready(self, digest: str) -> None:
        """Its lanes are filled."""
        entry = self._entries[digest]
        entry.copying = False
        self.lanes.unpin(digest)
        self._forget_if_unused(digest, entry)

    def copy_failed(self, digest: str) -> None:
        """Its lanes could not be filled; it gives them back."""
        entry = self._entries[digest]
        entry.copying = False
        self.lanes.unpin(digest)
        self.lanes.remove(digest)
        self._forget_if_unused(digest, entry)

    def check_invariants(self) -> None:
        """Tiers agree with each other. For tests."""
        self.lanes.check_invariants()
        assert set(self.lanes.residents) <= set(self._entries)
        for digest, entry in self._entries.items():
            assert entry.leases >= 0
            assert not entry.copying or entry.host is HostState.READY
            assert not entry.copying or self.lanes.span(digest) is not None
            assert not entry.retiring or entry.leases or entry.copying or entry.host is HostState.READING

    def _shrink_host(self, *, keep: str) -> None:
        for digest, entry in self._entries.items():
            if not self._is_over_budget():
                break
            spared = entry.leases or entry.pinned or entry.copying or digest == keep
            if entry.host is HostState.READY and not spared:
                entry.host = HostState.ABSENT
                self._evicted.append(digest)
                self.num_host_evictions += 1

    def _is_over_budget(self) -> bool:
        if self.max_host_bytes is not None and self.host_bytes > self.max_host_bytes:
            return True
        return self.max_host_adapters is not None and len(self.on_host) > self.max_host_adapters

    def _forget_if_unused(self, digest: str, entry: _Entry) -> None:
        busy = entry.leases or entry.copying or entry.host is HostState.READING
        if entry.retiring and not busy:
            self.lanes.remove(digest)
            del self._entries[digest]
            self._gone.append(digest)
