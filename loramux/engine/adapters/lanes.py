"""Device lanes: which adapter holds which rank rows of the pool. Pure bookkeeping.

A lane is one rank row at every wrapped site of every layer. Lanes are handed out in groups of 8; an
adapter of rank r holds ceil(r / 8) consecutive groups, the same indices everywhere, so mixed ranks
pack without padding. A resident adapter that no sequence uses stays until its space is needed
(least recently used first). First fit from below: the kernels read a prefix of the pool, so the
lower the lanes in use end, the less is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass

from loramux.engine.config import LANE_GROUP


@dataclass(frozen=True, slots=True)
class LaneSpan:
    """Consecutive lanes of one adapter."""

    first: int  # index of the first lane
    count: int  # lanes held, a multiple of LANE_GROUP
    rank: int  # lanes that carry weights; the rest are zero

    @property
    def end(self) -> int:
        """One past the last lane held."""
        return self.first + self.count


@dataclass(slots=True)
class _Resident:
    span: LaneSpan
    pins: int = 0


class LaneTable:
    """Allocates, pins and evicts lane spans by adapter digest."""

    def __init__(self, num_lanes: int) -> None:
        assert num_lanes % LANE_GROUP == 0
        self.num_lanes = num_lanes
        self.num_evictions = 0
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first

    @property
    def num_used(self) -> int:
        """Lanes held by resident adapters."""
        return sum(resident.span.count for resident in self._residents.values())

    @property
    def residents(self) -> list[str]:
        """Digests on the device, least recently used first."""
        return list(self._residents)

    def span(self, digest: str) -> LaneSpan | None:
        """Where a resident adapter lies, None when it is not on the device."""
        resident = self._residents.get(digest)
        return resident.span if resident else None

    @staticmethod
    def lanes_for(rank: int) -> int:
        """Lanes that an adapter of this rank takes."""
        return -(-rank // LANE_GROUP) * LANE_GROUP

    def fits(self, rank: int) -> bool:
        """True if an adapter of this rank fits into the empty pool."""
        return self.lanes_for(rank) <= self.num_lanes

    def place(self, digest: str, rank: int, *, keep: Set[str] = frozenset()) -> LaneSpan | None:
        """Make room for an adapter that is not resident, evicting unpinned ones as needed.

        Returns None, and evicts nothing, when pinned adapters and those in `keep` leave no gap of
        that size.
        """
        assert digest not in self._residents
        count = self.lanes_for(rank)
        victims: list[str] = []
        unpinned = [d for d, resident in self._residents.items() if not resident.pins and d not in keep]
        while (first := self._first_gap(count, without=victims)) is None:
            if not unpinned:
                return None
            victims.append(unpinned.pop(0))
        for victim in victims:
            del self._residents[victim]
        self.num_evictions += len(victims)
        span = LaneSpan(first, count, rank)
        self._residents[digest] = _Resident(span)
        return span

    def pin(self, digest: str) -> None:
        """Keep a resident adapter on the device until `unpin`; counts."""
        self._residents[digest].pins += 1
        self._residents.move_to_end(digest)

    def unpin(self, digest: str) -> None:
        """Give back one `pin`."""
        resident = self._residents[digest]
        resident.pins -= 1
        assert resident.pins >= 0, f"adapter {digest} unpinned twice"

    def remove(self, digest: str) -> None:
        """Free the lanes of an unpinned adapter; nothing happens if it is not resident."""
        resident = self._residents.pop(digest, None)
        assert resident is None or resident.pins == 0, f"adapter {digest} is pinned"

    def check_invariants(self) -> None:
        """Spans lie in the pool and do not overlap. For tests."""
        spans = sorted((resident.span for resident in self._residents.values()), key=lambda s: s.first)
        end = 0
        for span in spans:
            assert span.first >= end
            assert span.first % LANE_GROUP == 0
            assert span.rank <= span.count
            end = span.end
        assert end <= self.num_lanes

    def _first_gap(self, count: int, *, without: list[str]) -> int | None:
        spans = sorted(
            (resident.span for digest, resident in self._residents.items() if digest not in without),
            key=lambda span: span.first,
        )
        start = 0
        for span in spans:
            if span.first - start >= count:
                return start
            start = span.end
        return start if self.num_lanes - start >= count else None
