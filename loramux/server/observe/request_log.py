"""One line a request. Names and codes only: prompts and outputs are written only if the operator asks."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Final

from loramux.server.observe.call_record import CLIENT_GONE, CallRecord
from loramux.server.observe.http_metrics import UNCOUNTED

logger = logging.getLogger("loramux.request")

_MAX_PATH_CHARS: Final = 200


class RequestLog:
    """Writes a line for each request that is over.

    Calls that asked the model for something always get one; others unless access lines are turned off.

    Args:
        access_lines: whether other requests get lines.
        quiet_paths: paths whose requests get none.
        max_chars: of a prompt or an answer, where these are logged; None = all.
    """

    def __init__(
        self, *, access_lines: bool, quiet_paths: Collection[str] = (), max_chars: int | None = None
    ) -> None:
        self._access_lines = access_lines
        self._quiet_paths = frozenset(quiet_paths)
        self._max_chars = max_chars

    def finished(self, call: CallRecord) -> None:
        """Write the line."""
        level = _level(call)
        if not logger.isEnabledFor(level) or self._quiet_paths & {call.path, call.route}:
            return
        if not call.is_inference and not self._access_lines:
            return
        shown = call.route or call.path[:_MAX_PATH_CHARS]
        status = call.status if call.status is not None else "-"
        fields = _fields(call)
        if call.prompts:
            fields["prompts"] = [prompt[: self._max_chars] for prompt in call.prompts]
        if call.keeps_outputs and call.sequences:
            texts = ("".join(sequence.text or ()) for sequence in call.sequences)
            fields["outputs"] = [text[: self._max_chars] for text in texts]
        logger.log(level, "%s %s %s", call.method, shown, status, extra=fields)


def _level(call: CallRecord) -> int:
    """Probes and scrapes come all day; a 503 is the server's way to say no, other 5xx are faults."""
    if call.route is not None and (call.route in UNCOUNTED or call.route.startswith("/metrics")):
        return logging.DEBUG
    status = call.status or 0
    was_cut = status == 200 and call.error not in (None, CLIENT_GONE)  # told in the stream
    if status == 503 or was_cut:
        return logging.WARNING
    return logging.ERROR if status >= 500 else logging.INFO


def _fields(call: CallRecord) -> dict[str, Any]:
    """What is known of a request, in the order in which it is read; nothing that is None."""
    fields: dict[str, Any] = {
        "request_id": call.request_id or None,
        "key_id": call.key_id,
        "trace_id": call.trace.trace_id if call.trace else None,
        "status": call.status,
        "route": call.route,
        "model": call.model,
        "adapter": f"{call.adapter}@{call.adapter_version}" if call.adapter else None,
        "total_ms": _ms(call.ended_s - call.started_s),
        "error": call.told_error,
    }
    if call.sequences:
        queued = [sequence.queue_s for sequence in call.sequences if sequence.queue_s is not None]
        fields |= {
            "prompt_tokens": call.num_prompt_tokens,
            "cached_tokens": call.num_cached_tokens,
            "output_tokens": call.num_output_tokens,
            "n": call.n,
            "adapter_wait_ms": _ms(call.adapter_wait_s) if call.had_to_load else None,
            "queue_ms": _ms(max(queued)) if queued else None,
            "ttft_ms": _ms(call.first_token_s),
            "finish_reason": call.finish_reason,
        }
    return {name: value for name, value in fields.items() if value is not None}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
