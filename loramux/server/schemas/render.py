"""The shape of `/render` answers (vLLM's)."""

from __future__ import annotations

from typing import Any

import msgspec


class RenderedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt as the engine would get it."""

    request_id: str
    model: str
    token_ids: list[int]
    sampling_params: dict[str, Any]  # what the request leaves out is filled in
    stream: bool
    stream_options: dict[str, bool] | None
    cache_salt: str | None
    priority: int
