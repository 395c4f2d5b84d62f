"""The times of one request, as `--enable-per-request-metrics` shows them in its answer."""

from __future__ import annotations

from loramux.server.observe.call_record import CallRecord
from loramux.server.schemas.common import RequestMetrics


def request_metrics(record: CallRecord) -> RequestMetrics | None:
    """What a request took; None if it has several choices or prompts, or made no token."""
    if len(record.sequences) != 1 or not record.sequences[0].first_s:
        return None
    sequence = record.sequences[0]
    generation_s = sequence.last_s - sequence.first_s
    between = sequence.num_output - 1
    return RequestMetrics(
        time_to_first_token_ms=(sequence.first_s - record.started_s) * 1e3,
        generation_time_ms=generation_s * 1e3,
        queue_time_ms=None if sequence.queue_s is None else sequence.queue_s * 1e3,
        mean_itl_ms=generation_s / between * 1e3 if between > 0 else None,
        tokens_per_second=between / generation_s if between > 0 and generation_s > 0 else None,
    )
