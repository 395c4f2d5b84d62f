"""One line a request. Names and codes only: prompts and outputs are written only if the operator asks."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Final

from loramux.server.observe.call_record import CLIENT_GONE, CallRecord

logger = logging.getLogger("loramux.request")

_MAX_PATH_CHARS: Final = 200


class RequestLog:
    """Writes a line for each request that is over.

    Calls that asked the model for something always get one; others unless access lines are turned off.

    Args:
        access_lines: whether other requests get lines.
        quiet_paths: paths whose requests get none.
    """

    def __init__(self, *, access_lines: bool, quiet_paths: Collection[str] = ()) -> None:
        self._access_lines = access_lines
        self._quiet_paths = frozenset(quiet_paths)

    def finished(self, call: CallRecord) -> None:
        """Write the line."""
        level = logging.ERROR if (call.status or 0) >= 500 else logging.INFO
        if not logger.isEnabledFor(level) or call.path in self._quiet_paths:
            return
        if not call.is_inference and not self._access_lines:
            return
        shown = call.route or call.path[:_MAX_PATH_CHARS]
        status = call.status if call.status is not None else "-"
        logger.log(level, "%s %s %s", call.method, shown, status, extra=_fields(call))


def _fields(call: CallRecord) -> dict[str, Any]:
    """What is known of a request, in the order in which it is read; nothing that is None."""
    fields: dict[str, Any] = {
        "request_id": call.request_id or None,
        "key_id": call.key_id,
        "trace_id": call.trace_id,
        "status": call.status,
        "route": call.route,
        "model": call.model,
        "adapter": f"{call.adapter}@{call.adapter_version}" if call.adapter else None,
        "total_ms": _ms(call.ended_s - call.started_s),
        "error": call.error or (CLIENT_GONE if call.status is None else None),
    }
    if call.sequences:
        sequences = call.sequences
        queued = [sequence.queue_s for sequence in sequences if sequence.queue_s is not None]
        fields |= {
            "prompt_tokens": sum(sequence.num_prompt for sequence in sequences[:: max(call.n, 1)]),
            "cached_tokens": sum(sequence.num_cached for sequence in sequences[:: max(call.n, 1)]),
            "output_tokens": sum(sequence.num_output for sequence in sequences),
            "n": call.n,
            "adapter_wait_ms": _ms(call.adapter_wait_s) if call.had_to_load else None,
            "queue_ms": _ms(max(queued)) if queued else None,
            "ttft_ms": _ms(call.first_token_s),
            "finish_reason": call.finish_reason,
        }
    return {name: value for name, value in fields.items() if value is not None}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
