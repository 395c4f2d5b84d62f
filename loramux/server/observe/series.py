"""Counts and histograms that cost next to nothing to add to, and how they become Prometheus families.

All of them are written by the event loop's thread alone, so there is no lock. `prometheus_client`'s own
counters and histograms take one for each observation; there is one of those for every token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily


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

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations at or below it), ending with +Inf."""
        pairs: list[tuple[str, float]] = []
        so_far = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            so_far += count
            pairs.append((str(bound), so_far))
        return [*pairs, ("+Inf", so_far + self.counts[-1])]


Labels = Mapping[str, str]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


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


class Families:
    """Makes metric families whose every sample carries some common labels.

    Args:
        common: label names and values of every sample.
    """

    def __init__(self, common: Labels | None = None) -> None:
        self._common = dict(common or {})

    def counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        """One number that only grows; `_total` is added to its name."""
        family = CounterMetricFamily(name, text, labels=list(self._common))
        family.add_metric(list(self._common.values()), value)
        return family

    def counters(self, name: str, text: str, counts: LabelledCounter) -> CounterMetricFamily:
        """The same by label."""
        family = CounterMetricFamily(name, text, labels=[*self._common, *counts.labels])
        for values, count in counts.items():
            family.add_metric([*self._common.values(), *values], count)
        return family

    def gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        """One number of now."""
        return self.gauges(name, text, (), [((), value)])

    def gauges(
        self, name: str, text: str, labels: Sequence[str], values: Iterable[tuple[tuple[str, ...], float]]
    ) -> GaugeMetricFamily:
        """The same by label."""
        family = GaugeMetricFamily(name, text, labels=[*self._common, *labels])
        for label_values, value in values:
            family.add_metric([*self._common.values(), *label_values], value)
        return family

    def histogram(self, name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
        """A distribution."""
        return self.histograms(name, text, (), [((), histogram)])

    def histograms(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        histograms: Iterable[tuple[tuple[str, ...], Histogram]],
    ) -> HistogramMetricFamily:
        """The same by label."""
        family = HistogramMetricFamily(name, text, labels=[*self._common, *labels])
        for values, histogram in histograms:
            family.add_metric(
                [*self._common.values(), *values], histogram.cumulative(), sum_value=histogram.total
            )
        return family
