"""Which adapters are where, and who waits for them: what routers in front of several servers look at."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from loramux.engine.types import EngineStats
from loramux.server.adapters import AdapterState, AdapterTable
from loramux.server.observe.call_record import CallRecord
from loramux.server.observe.series import Families, Family

_MAX_LISTED: Final = 512  # names in one label of lora_requests_info
_MAX_LOADED: Final = 1000  # series of lora_adapter_loaded


def collect_adapters(
    make: Families,
    plain: Families,
    *,
    table: AdapterTable,
    calls: Collection[CallRecord],
    stats: EngineStats,
    max_loras: int,
) -> Iterator[Family]:
    """The families about adapters as they are now.

    Args:
        make: with vLLM's labels.
        plain: with none.
        table: the names.
        calls: requests in flight.
        stats: the engine's last snapshot.
        max_loras: how many adapters the lanes are made for; 0 without LoRA.
    """
    running, waiting = names_in_use(calls, stats, table)
    yield plain.gauges(
        "vllm:lora_requests_info",
        "Adapters with running and with waiting requests; the value is the time in Unix seconds.",
        ["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        [((str(max_loras), _joined(waiting), _joined(running)), time.time())],
    )
    levels = {**dict.fromkeys(stats.host_adapters, "cpu"), **dict.fromkeys(stats.device_adapters, "gpu")}
    rows = list(table.rows())
    refs = [row.current.ref for row in rows if row.current is not None]
    loaded = [
        ((ref.name, levels[ref.digest], str(ref.pinned).lower()), 1.0) for ref in refs if ref.digest in levels
    ]
    loaded.sort(key=lambda item: item[0][1] != "gpu")
    yield make.gauges(
        "vllm:lora_adapter_loaded",
        "1 for each adapter whose weights are in lanes (gpu) or in host memory (cpu).",
        ["adapter_name", "level", "pinned"],
        loaded[:_MAX_LOADED],
    )
    yield make.gauge(
        "vllm:num_gpu_loaded_lora_adapters", "Adapter contents in lanes.", len(stats.device_adapters)
    )
    yield make.gauge(
        "vllm:num_cpu_loaded_lora_adapters", "Adapter contents in host memory.", len(stats.host_adapters)
    )
    counts = dict.fromkeys(AdapterState, 0)
    for row in rows:
        counts[row.state] += 1
    yield plain.gauges(
        "loramux:adapters",
        "Adapter names by state.",
        ["state"],
        [((state.value,), count) for state, count in counts.items() if state is not AdapterState.GONE],
    )


def names_in_use(
    calls: Iterable[CallRecord], stats: EngineStats, table: AdapterTable
) -> tuple[set[str], set[str]]:
    """The names of adapters with running requests, and of those with waiting ones.

    A request runs from its first token on, or as soon as the engine says that its content runs and none
    of it waits; before, also while its adapter is being loaded, it waits. Unknown names are left out.
    """
    in_batch, in_queue = set(stats.running_adapters), set(stats.waiting_adapters)
    running: set[str] = set()
    waiting: set[str] = set()
    for call in calls:
        if call.adapter is None:
            if call.waits_for is not None and table.row(call.waits_for) is not None:
                waiting.add(call.waits_for)
            continue
        digest = call.adapter_digest
        runs = call.has_begun or (digest in in_batch and digest not in in_queue)
        (running if runs else waiting).add(call.adapter)
    return running, waiting


def _joined(names: set[str]) -> str:
    """With commas between; a comma in a name is written as %2C."""
    return ",".join(name.replace(",", "%2C") for name in sorted(names)[:_MAX_LISTED])
