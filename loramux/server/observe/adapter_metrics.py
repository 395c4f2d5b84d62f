"""What happens to adapters, and who uses them: loads, waits, and the tokens of the busiest names."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from loramux.engine.types import MOVE_S_BOUNDS
from loramux.server.observe import buckets
from loramux.server.observe.call_record import CallRecord
from loramux.server.observe.label_budget import LabelBudget
from loramux.server.observe.series import Families, Family, Histogram, LabelledCounter

SOURCES: Final = ("hf", "s3", "file", "pvc", "upload", "unknown")
RESULTS: Final = ("added", "replaced", "unchanged", "failed")
PHASES: Final = ("resolve", "download", "verify")  # host and device are the engine's
RESOLVER_ERRORS: Final = (
    *("adapter_unavailable", "adapter_source_auth", "adapter_incompatible", "adapter_error"),
    "internal_error",
)


@dataclass(slots=True)
class AdapterUse:
    """What requests did with one adapter."""

    num_requests: int = 0
    num_prompt: int = 0
    num_generated: int = 0
    first_token_s: Histogram = field(default_factory=lambda: Histogram(buckets.ADAPTER_FIRST_TOKEN_S))


class AdapterMetrics:
    """Counts of adapters.

    Args:
        max_names: adapters with counts of their own.
    """

    def __init__(self, max_names: int) -> None:
        known = [(source, result) for source in SOURCES for result in RESULTS]
        self.loads = LabelledCounter(["source", "result"], known)
        self.phases_s = {phase: Histogram(MOVE_S_BOUNDS) for phase in PHASES}
        self.resolver_errors = LabelledCounter(["code"], [(code,) for code in RESOLVER_ERRORS])
        self.cold_start_s = Histogram(buckets.FIRST_TOKEN_S)
        self.lease_wait_s = Histogram(buckets.FIRST_TOKEN_S)
        self.uses = LabelBudget(max_names, AdapterUse)

    def add(self, call: CallRecord) -> None:
        """Count a request that is over."""
        if call.adapter is None or not call.sequences:
            return
        if call.adapter_wait_s is not None:
            self.lease_wait_s.observe(call.adapter_wait_s)
        first_s = call.first_token_s
        use = self.uses.of(call.adapter)
        use.num_requests += 1
        use.num_generated += sum(sequence.num_output for sequence in call.sequences)
        if first_s is not None:
            use.num_prompt += sum(sequence.num_prompt for sequence in call.sequences)
            use.first_token_s.observe(first_s)
            if call.had_to_load:
                self.cold_start_s.observe(first_s)

    def collect(self, make: Families, host_load_s: Histogram, device_load_s: Histogram) -> Iterator[Family]:
        """Every family.

        Args:
            make: families without common labels.
            host_load_s: the engine's reads into host memory.
            device_load_s: its copies into lanes.
        """
        yield make.counters("loramux:adapter_loads", "Loads of adapters by source and result.", self.loads)
        phases = {**self.phases_s, "host": host_load_s, "device": device_load_s}
        yield make.histograms(
            "loramux:adapter_load_seconds",
            "How long each part of a load took.",
            ["phase"],
            [((phase,), histogram) for phase, histogram in phases.items()],
        )
        yield make.counters(
            "loramux:resolver_errors", "Names that resolvers could not answer for.", self.resolver_errors
        )
        yield make.histogram(
            "loramux:adapter_cold_start_seconds",
            "From a request's arrival to its first token, if its adapter had to be loaded first.",
            self.cold_start_s,
        )
        yield make.histogram(
            "loramux:adapter_lease_wait_seconds",
            "How long requests waited until their adapter could be used.",
            self.lease_wait_s,
        )
        yield from self._uses(make)

    def _uses(self, make: Families) -> Iterator[Family]:
        uses = self.uses.items()
        numbers: Sequence[tuple[str, str]] = (
            ("num_requests", "loramux:adapter_requests"),
            ("num_prompt", "loramux:adapter_prompt_tokens"),
            ("num_generated", "loramux:adapter_generation_tokens"),
        )
        for attribute, name in numbers:
            counts = LabelledCounter(["adapter"])
            for adapter, use in uses:
                counts.add(adapter, by=getattr(use, attribute))
            text = f"{name.removeprefix('loramux:adapter_').replace('_', ' ').capitalize()} by adapter."
            yield make.counters(name, text, counts)
        yield make.histograms(
            "loramux:adapter_time_to_first_token_seconds",
            "From a request's arrival to its first token, by adapter.",
            ["adapter"],
            [((adapter,), use.first_token_s) for adapter, use in uses],
        )


class LoadWatch:
    """Times the phases of one load, and counts its end once."""

    __slots__ = ("_began_s", "_metrics", "_phase", "source")

    def __init__(self, metrics: AdapterMetrics) -> None:
        self._metrics = metrics
        self._phase: str | None = None
        self._began_s = 0.0
        self.source = "unknown"

    def enter(self, phase: str | None) -> None:
        """Another part begins; None = it is the engine's turn, or the end."""
        now_s = time.monotonic()
        if self._phase is not None:
            self._metrics.phases_s[self._phase].observe(now_s - self._began_s)
        self._phase, self._began_s = phase, now_s

    def progressed(self, phase: str) -> None:
        """The source told how far it is."""
        if phase == "downloading" and self._phase == "resolve":
            self.enter("download")

    def found(self, uri: str, *, is_upload: bool) -> None:
        """Where the adapter comes from is known."""
        scheme = uri.partition(":")[0]
        self.source = "upload" if is_upload else scheme if scheme in SOURCES else "file"

    def end(self, result: str) -> None:
        """The load is over."""
        self.enter(None)
        self._metrics.loads.add(self.source, result)
