"""Which adapters are loaded, who uses them, and where they reside. Pure bookkeeping.

A loaded adapter has its weights in host memory (`HOST`) and, while it has lanes, on the device too
(`DEVICE`). A sequence leases its adapter from admission into the engine to its end. `retire` forgets
an adapter: at once when nobody leases it, otherwise with the last lease (`RETIRING`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loramux.engine.adapters.lanes import LaneSpan, LaneTable


@dataclass(slots=True)
class _Entry:
    rank: int
    leases: int = 0
    retiring: bool = False


@dataclass(slots=True)
class AdapterStore:
    """Residency of the loaded adapters, by digest."""

    lanes: LaneTable
    _entries: dict[str, _Entry] = field(default_factory=dict)

    @property
    def loaded(self) -> list[str]:
        """Digests that requests may use."""
        return [digest for digest, entry in self._entries.items() if not entry.retiring]

    def is_loaded(self, digest: str) -> bool:
        """True if new requests may use it."""
        entry = self._entries.get(digest)
        return entry is not None and not entry.retiring

    def add(self, digest: str, rank: int) -> bool:
        """Its weights are on the host; False if they were already (a retiring one is revived)."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.retiring = False
            return False
        self._entries[digest] = _Entry(rank)
        return True

    def lease(self, digest: str) -> None:
        """A sequence starts to use it."""
        self._entries[digest].leases += 1

    def release(self, digest: str) -> bool:
        """A sequence has ended; True if that was the end of a retiring adapter."""
        entry = self._entries[digest]
        entry.leases -= 1
        assert entry.leases >= 0, f"adapter {digest} released twice"
        return self._forget_if_unused(digest, entry)

    def retire(self, digest: str) -> bool:
        """New requests may not use it; True if it is gone at once."""
        entry = self._entries[digest]
        entry.retiring = True
        return self._forget_if_unused(digest, entry)

    def on_device(self, digest: str) -> tuple[LaneSpan, bool] | None:
        """Pin it on the device: its lanes, and True if the weights must be copied there first.

        Returns None when pinned adapters leave no room.
        """
        span = self.lanes.span(digest)
        is_new = span is None
        if span is None:
            span = self.lanes.place(digest, self._entries[digest].rank)
            if span is None:
                return None
        self.lanes.pin(digest)
        return span, is_new

    def _forget_if_unused(self, digest: str, entry: _Entry) -> bool:
        if not entry.retiring or entry.leases:
            return False
        self.lanes.remove(digest)
        del self._entries[digest]
        return True
