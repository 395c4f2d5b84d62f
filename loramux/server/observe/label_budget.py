"""Per-adapter metrics for the busiest names only, so that thousands of names cannot grow a scrape.

At most `size` names have counts of their own; all others share `other`. A name outside that becomes twice
as busy as the least busy one inside takes its place: the series of the latter ends, and begins at 0 should
it come back. How busy a name is fades by half every `_HALF_LIFE_S`. Names outside are watched in a table
of four times the size, which forgets the least recently seen.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

OTHER: Final = "other"
_HALF_LIFE_S: Final = 300.0
_WATCHED_TIMES: Final = 4


class LabelBudget(Generic[T]):
    """Something for each of a bounded set of names.

    Args:
        size: names with an entry of their own; 0 = none.
        make: a new entry.
        clock: monotonic seconds.
    """

    def __init__(self, size: int, make: Callable[[], T], clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._make = make
        self._clock = clock
        self._entries: dict[str, T] = {}
        self._other = make()
        self.watched: OrderedDict[str, float] = OrderedDict()  # names outside, and how busy
        self._inside: dict[str, float] = {}
        self._faded_s = clock()

    def items(self) -> list[tuple[str, T]]:
        """Names and their entries; `other` is always there."""
        return [*self._entries.items(), (OTHER, self._other)]

    def of(self, name: str) -> T:
        """The entry that an event of this name counts in; each call is one event."""
        self._fade()
        if name == OTHER:
            return self._other
        if name in self._inside:
            self._inside[name] += 1.0
            return self._entries[name]
        if len(self._inside) < self._size:
            return self._enter(name, 1.0)
        busy = self._watch(name)
        if self._inside:
            least = min(self._inside, key=self._inside.__getitem__)
            if busy >= 2.0 * self._inside[least] and busy >= 2.0:
                del self._entries[least], self._inside[least]
                del self.watched[name]
                return self._enter(name, busy)
        return self._other

    def _enter(self, name: str, busy: float) -> T:
        self._inside[name] = busy
        entry = self._entries[name] = self._make()
        return entry

    def _watch(self, name: str) -> float:
        busy = self.watched.pop(name, 0.0) + 1.0
        self.watched[name] = busy
        while len(self.watched) > _WATCHED_TIMES * max(self._size, 1):
            self.watched.popitem(last=False)
        return busy

    def _fade(self) -> None:
        now_s = self._clock()
        if now_s - self._faded_s < _HALF_LIFE_S:
            return
        factor = 0.5 ** ((now_s - self._faded_s) / _HALF_LIFE_S)
        self._faded_s = now_s
        for table in (self._inside, self.watched):
            for name in table:
                table[name] *= factor
