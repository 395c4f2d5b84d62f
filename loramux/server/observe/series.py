"""Counts and histograms that cost next to nothing to add to, and how they become Prometheus' text.

All of them are written by the event loop's thread alone, so there is no lock. `prometheus_client`'s own
counters and histograms take one for each observation, and there is one of those for every token.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar


class Histogram:
    """How many observations lie at or below each bound, and their sum.

    Args:
        bounds: ascending; what is above the last one is counted as well.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, counts: Sequence[int], total: float) -> None:
        """Count what somebody else has observed with the same bounds."""
        for index, count in enumerate(counts):
            self.counts[index] += count
        self.total += total

    @property
    def num_observed(self) -> int:
        """Observations in all."""
        return sum(self.counts)


class LabelledCounter:
    """Counts by label values, those known beforehand present from the start.

    Args:
        labels: their names.
        known: label values that are shown as 0 before anything happened.
    """

    __slots__ = ("_counts", "labels")

    def __init__(self, labels: Sequence[str], known: Iterable[tuple[str, ...]] = ()) -> None:
        self.labels = tuple(labels)
        self._counts: dict[tuple[str, ...], float] = dict.fromkeys(known, 0.0)

    def add(self, *values: str, by: float = 1.0) -> None:
        """Count something; the values must come from a small set."""
        self._counts[values] = self._counts.get(values, 0.0) + by

    def items(self) -> list[tuple[tuple[str, ...], float]]:
        """Label values and their counts."""
        return list(self._counts.items())


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all of its series, as lines of Prometheus' text format."""

    name: str
    lines: list[str]


class Families:
    """Makes metric families whose every series carries some common labels.

    A line is a prefix (name and labels) and a number. Prefixes are kept from one page to the next: routers
    read the page many times a second, and building them is most of the work.

    Args:
        common: label names and values of every series.
    """

    def __init__(self, common: Mapping[str, str] | None = None) -> None:
        common = common or {}
        self._names = tuple(common)
        self._values = tuple(common.values())
        self._prefixes: dict[_Key, str] = {}
        self._bucket_prefixes: dict[_Key, list[str]] = {}

    def counter(self, name: str, text: str, value: float) -> Family:
        """One number that only grows; `_total` is added to its name."""
        return self._family(f"{name}_total", "counter", text, (), [((), value)])

    def counters(self, name: str, text: str, counts: LabelledCounter) -> Family:
        """The same by label."""
        return self._family(f"{name}_total", "counter", text, counts.labels, counts.items())

    def gauge(self, name: str, text: str, value: float) -> Family:
        """One number of now."""
        return self._family(name, "gauge", text, (), [((), value)])

    def gauges(
        self, name: str, text: str, labels: Sequence[str], values: Iterable[tuple[tuple[str, ...], float]]
    ) -> Family:
        """The same by label."""
        return self._family(name, "gauge", text, labels, values)

    def histogram(self, name: str, text: str, histogram: Histogram) -> Family:
        """A distribution."""
        return self.histograms(name, text, (), [((), histogram)])

    def histograms(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        histograms: Iterable[tuple[tuple[str, ...], Histogram]],
    ) -> Family:
        """The same by label."""
        lines = _head(name, "histogram", text)
        for values, histogram in histograms:
            prefixes = self._bucket_prefixes.get((name, values))
            if prefixes is None:
                prefixes = self._histogram_prefixes(name, labels, values, histogram.bounds)
                _remember(self._bucket_prefixes, (name, values), prefixes)
            so_far = list(itertools.accumulate(histogram.counts))
            numbers = (*so_far, so_far[-1], histogram.total)
            lines += [f"{prefix}{number}" for prefix, number in zip(prefixes, numbers, strict=True)]
        return Family(name, lines)

    def _family(
        self,
        name: str,
        kind: str,
        text: str,
        labels: Sequence[str],
        series: Iterable[tuple[tuple[str, ...], float]],
    ) -> Family:
        lines = _head(name, kind, text)
        for values, number in series:
            prefix = self._prefixes.get((name, values))
            if prefix is None:
                prefix = self._prefix(name, labels, values)
                _remember(self._prefixes, (name, values), prefix)
            lines.append(f"{prefix}{number}")
        return Family(name, lines)

    def _prefix(self, name: str, labels: Sequence[str], values: Sequence[str]) -> str:
        pairs = zip((*self._names, *labels), (*self._values, *values), strict=True)
        inside = ",".join(f'{label}="{_escape(value)}"' for label, value in pairs)
        return f"{name}{{{inside}}} " if inside else f"{name} "

    def _histogram_prefixes(
        self, name: str, labels: Sequence[str], values: tuple[str, ...], bounds: Sequence[float]
    ) -> list[str]:
        """For each bucket, for the count and for the sum."""
        ends = [*(str(bound) for bound in bounds), "+Inf"]
        return [
            *(self._prefix(f"{name}_bucket", (*labels, "le"), (*values, end)) for end in ends),
            self._prefix(f"{name}_count", labels, values),
            self._prefix(f"{name}_sum", labels, values),
        ]


_T = TypeVar("_T")
_Key = tuple[str, tuple[str, ...]]  # a metric and the values of its labels
_MAX_REMEMBERED: Final = 2000  # prefixes; names of adapters come and go
_MAX_CHARS: Final = 600  # of a prefix that is kept; lists of names are longer, and new on every page


def _remember(table: dict[_Key, _T], key: _Key, value: _T) -> None:
    if sum(map(len, key[1])) > _MAX_CHARS:
        return
    if len(table) >= _MAX_REMEMBERED:
        table.clear()
    table[key] = value


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _escape(value: str) -> str:
    """A label's value as the text format wants it."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
