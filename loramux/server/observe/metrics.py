"""All metrics of one server: who counts what, and the page that a scrape reads.

Everything is counted in the event loop's thread and collected there, between two awaits, so that a scrape
sees one moment. Names, labels and buckets under `vllm:` are vLLM's; `loramux:` has what vLLM does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from loramux.engine.config import EngineConfig
from loramux.engine.types import EngineInfo, EngineStats
from loramux.server.adapters import AdapterTable
from loramux.server.errors import ERRORS
from loramux.server.observe.adapter_metrics import AdapterMetrics
from loramux.server.observe.call_record import CallRecord
from loramux.server.observe.engine_metrics import EngineMetrics
from loramux.server.observe.http_metrics import HttpMetrics
from loramux.server.observe.lora_metrics import collect_adapters
from loramux.server.observe.request_metrics import RequestMetrics
from loramux.server.observe.series import Families, Family, LabelledCounter

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class EngineView(Protocol):
    """What is asked of the engine at a scrape."""

    num_restarts: int

    @property
    def info(self) -> EngineInfo:
        """What it said of itself."""
        ...

    @property
    def is_alive(self) -> bool:
        """True while it serves requests."""
        ...


class StoreView(Protocol):
    """What is asked of the local store at a scrape."""

    num_evicted: int
    num_bytes: int


class Metrics:
    """Counts, and makes the page.

    Args:
        engine: the running engine.
        config: what it was started with.
        table: the adapters' names.
        model_name: the first served name.
        max_adapters: adapters with counts of their own.
        rejections: calls that were turned away, by reason; read at every scrape.
        store: adapters on the disk; None without LoRA.
    """

    def __init__(
        self,
        engine: EngineView,
        config: EngineConfig,
        table: AdapterTable,
        *,
        model_name: str,
        max_adapters: int,
        rejections: Mapping[str, int],
        store: StoreView | None = None,
    ) -> None:
        self.requests = RequestMetrics(engine.info.max_model_len)
        self.engine = EngineMetrics()
        self.adapters = AdapterMetrics(max_adapters)
        self.http = HttpMetrics([entry.code for entry in ERRORS.values()])
        self.calls: Collection[CallRecord] = ()  # in flight
        self._engine = engine
        self._config = config
        self._table = table
        self._rejections = rejections
        self._store = store
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self._make = Families({"model_name": model_name, "engine": "0"})
        self._make_named = Families({"model_name": model_name})
        self._make_plain = Families()

    def finished(self, call: CallRecord) -> None:
        """Count a request that is over."""
        self.http.add(call.route, call.method, call.status, call.ended_s - call.started_s, call.told_error)
        self.requests.add(call)
        self.adapters.add(call)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        lines = [line for family in self._collect() for line in family.lines]
        return "\n".join((*lines, "")).encode() + generate_latest(self._process)

    def _collect(self) -> Iterator[Family]:
        """Every family, also before anything happened."""
        make, plain = self._make, self._make_plain
        is_alive, info = self._engine.is_alive, self._engine.info
        yield from self.engine.collect(make, plain, self._config, info, is_alive=is_alive)
        yield self._evictions(plain)
        yield from self.requests.collect(make)
        yield from collect_adapters(
            make,
            plain,
            table=self._table,
            calls=self.calls,
            stats=self.engine.last if is_alive else EngineStats(),
            max_loras=self._config.max_loras if self._config.enable_lora else 0,
        )
        engine = self.engine
        yield from self.adapters.collect(plain, engine.host_load_s, engine.device_load_s)
        yield plain.gauges(
            "loramux:adapter_resident_bytes",
            "Bytes of adapters by tier.",
            ["tier"],
            [
                (("disk",), self._store.num_bytes if self._store else 0),
                (("host",), engine.last.host_bytes if is_alive else 0),
                (("device",), engine.device_bytes(info) if is_alive else 0),
            ],
        )
        yield plain.counter(
            "loramux:engine_restarts", "Engines that took a lost one's place.", self._engine.num_restarts
        )
        yield from self._turned_away(plain)
        yield from self.http.collect(plain)

    def _evictions(self, plain: Families) -> Family:
        evictions = LabelledCounter(["tier", "reason"])
        evictions.add("device", "capacity", by=self.engine.device_evictions)
        evictions.add("host", "capacity", by=self.engine.host_evictions)
        evictions.add("disk", "capacity", by=self._store.num_evicted if self._store else 0)
        return plain.counters(
            "loramux:adapter_evictions", "Adapters that lost their place in a tier.", evictions
        )

    def _turned_away(self, plain: Families) -> Iterator[Family]:
        reasons = LabelledCounter(["reason"])
        for reason, count in self._rejections.items():
            reasons.add(reason, by=count)
        yield plain.counters("loramux:queue_rejections", "Calls turned away, by reason.", reasons)
        yield self._make_named.counters("vllm:admission_rejections", "Calls turned away, by reason.", reasons)
