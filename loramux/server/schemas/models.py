"""The shapes of `/v1/models`."""

from __future__ import annotations

import msgspec


class ModelPermission(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM says about every model; always the same here."""

    id: str
    object: str = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One name that requests may use as `model`."""

    id: str
    object: str = "model"
    created: int  # Unix seconds of its registration
    owned_by: str = "loramux"
    root: str  # where it came from; never a local path
    parent: str | None = None  # the base model's name, for an adapter
    max_model_len: int | None = None
    permission: list[ModelPermission] = []  # of base names only


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Base names first, then adapters by name."""

    object: str = "list"
    data: list[ModelCard]
    first_id: str | None = None
    last_id: str | None = None  # `?after=` of the next page
    has_more: bool = False
