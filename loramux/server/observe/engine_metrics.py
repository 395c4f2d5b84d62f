"""What the engine tells about itself, as metrics that outlive its process.

The engine counts from its start. When another one takes its place, its counts begin at 0 again; here each
snapshot adds what is new in it, so that the metrics only grow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from loramux.engine.config import EngineConfig
from loramux.engine.types import MOVE_S_BOUNDS, STEP_TOKENS_BOUNDS, Distribution, EngineInfo, EngineStats
from loramux.server.observe.series import Families, Family, Histogram

_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


class EngineMetrics:
    """The engine's counts, and its last snapshot."""

    def __init__(self) -> None:
        self.last = EngineStats()
        self.taken_s = 0.0  # when that came (monotonic seconds)
        self.cpu_s = 0.0
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.device_evictions = 0
        self.host_evictions = 0
        self.step_tokens = Histogram(STEP_TOKENS_BOUNDS)
        self.host_load_s = Histogram(MOVE_S_BOUNDS)
        self.device_load_s = Histogram(MOVE_S_BOUNDS)

    def take(self, now: EngineStats) -> None:
        """Add what happened since the last snapshot, of this engine or of the one before it."""
        last = self.last if self.last.started_at == now.started_at else EngineStats()
        self.cpu_s += now.cpu_s - last.cpu_s
        self.num_preemptions += now.num_preemptions - last.num_preemptions
        self.prefix_queries += now.prefix_cache_queries - last.prefix_cache_queries
        self.prefix_hits += now.prefix_cache_hits - last.prefix_cache_hits
        self.device_evictions += now.device_evictions - last.device_evictions
        self.host_evictions += now.host_evictions - last.host_evictions
        _add(self.step_tokens, now.step_tokens, last.step_tokens)
        _add(self.host_load_s, now.host_load_s, last.host_load_s)
        _add(self.device_load_s, now.device_load_s, last.device_load_s)
        self.last = now
        self.taken_s = time.monotonic()

    def collect(
        self, make: Families, plain: Families, config: EngineConfig, info: EngineInfo, *, is_alive: bool
    ) -> Iterator[Family]:
        """Every family; of an engine that is down, what it holds is 0.

        Args:
            make: with vLLM's labels.
            plain: with none.
            config: what the engine was started with.
            info: what it said of itself.
            is_alive: whether it runs.
        """
        now = self.last if is_alive else EngineStats(kv_blocks_total=info.num_kv_blocks)
        yield make.gauge("vllm:num_requests_running", "Sequences in the batch.", now.num_running)
        yield make.gauge("vllm:num_requests_waiting", "Sequences in the engine's queue.", now.num_waiting)
        yield make.gauges(
            "vllm:num_requests_waiting_by_reason",
            "The same by what they wait for: room, or (deferred) their adapter.",
            ["reason"],
            [
                (("capacity",), now.num_waiting - now.num_deferred),
                (("deferred",), now.num_deferred),
            ],
        )
        used = now.kv_blocks_used / now.kv_blocks_total if now.kv_blocks_total else 0.0
        yield make.gauge("vllm:kv_cache_usage_perc", "Used share of the KV cache, 1 = all.", used)
        yield _cache_config(make, config, info)
        yield make.gauges(
            "vllm:engine_sleep_state",
            "1 at the state of the engine, which never sleeps.",
            ["sleep_state"],
            [(("awake",), 1.0), (("weights_offloaded",), 0.0), (("discard_all",), 0.0)],
        )
        yield make.counter("vllm:num_preemptions", "Sequences that made room.", self.num_preemptions)
        yield make.counter(
            "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", self.prefix_queries
        )
        yield make.counter("vllm:prefix_cache_hits", "Tokens found there.", self.prefix_hits)
        yield make.histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", self.step_tokens)
        yield plain.gauge("loramux:engine_up", "1 while the engine serves requests.", float(is_alive))
        yield plain.counter("loramux:engine_cpu_seconds", "CPU time of the engine's process.", self.cpu_s)
        yield plain.gauge(
            "loramux:engine_resident_memory_bytes", "Memory of the engine's process.", now.resident_bytes
        )
        yield plain.gauge("loramux:lanes_used", "Rank lanes that hold adapters.", now.lanes_used)
        yield plain.gauge("loramux:lanes", "Rank lanes in all.", info.num_lanes)

    def device_bytes(self, info: EngineInfo) -> int:
        """What adapters hold on the device: their lanes at every site, and tables beside them."""
        size = _DTYPE_BYTES.get(info.dtype, 2)
        lane = sum(site.in_features + site.out_features for site in info.lora_sites.values())
        return self.last.lanes_used * lane * size + self.last.table_bytes


def _add(histogram: Histogram, now: Distribution, last: Distribution) -> None:
    """Count what is in `now` and not in `last`."""
    before = last.counts or [0] * len(now.counts)
    counts = [new - old for new, old in zip(now.counts, before, strict=True)]
    histogram.add(counts, now.total - last.total)


def _cache_config(make: Families, config: EngineConfig, info: EngineInfo) -> Family:
    shown = {
        "block_size": info.block_size,
        "cache_dtype": info.dtype,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "num_gpu_blocks": info.num_kv_blocks,
        "num_gpu_blocks_override": config.num_kv_blocks,
        "prefix_caching_hash_algo": "sha256",
    }
    values = tuple(value if isinstance(value, str) else str(value) for value in shown.values())
    return make.gauges("vllm:cache_config_info", "The KV cache's settings.", list(shown), [(values, 1.0)])
