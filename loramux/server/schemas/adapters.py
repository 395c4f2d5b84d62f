"""The shapes of the adapter API: ours, vLLM's, Dynamo's and SageMaker's."""

from __future__ import annotations

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from loramux.engine.types import FreedMemory
from loramux.resolvers.explain import AdapterReport
from loramux.server.desired_state import DesiredReport

# Requests. Unknown fields are ignored, as everywhere.


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class LoadLoraAdapter(_Body):
    """vLLM's `POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    base_model_name: str | None = None
    pinned: bool | None = None


class UnloadLoraAdapter(_Body):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: str


class PutAdapter(_Body):
    """`PUT /v1/lora_adapters/{name}`."""

    source: str
    pinned: bool | None = None
    base_model_name: str | None = None
    digest: str | None = None
    load_inplace: bool | None = None


class DynamoSource(_Body):
    """Where an adapter is, as Dynamo says it."""

    uri: str


class DynamoLoad(_Body):
    """Dynamo's `POST /v1/loras`."""

    lora_name: str
    source: DynamoSource


class SageMakerLoad(_Body):
    """SageMaker's `POST /adapters`."""

    name: str
    src: str
    pin: bool | None = None
    load_inplace: bool | None = None
    preload: bool | None = Field(default=None, description="accepted; an adapter is always loaded at once")


# Answers.


class AdapterError(msgspec.Struct, frozen=True, kw_only=True):
    """Why the last load came to nothing."""

    message: str
    code: str
    param: str | None
    at: float  # Unix seconds
    retry_at: float | None  # before that the same load is not tried again


class AdapterUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """A load under way."""

    state: str
    source: str
    started_at: float
    done_bytes: int
    total_bytes: int | None


class DrainingVersion(msgspec.Struct, frozen=True, kw_only=True):
    """An older version that requests still run on."""

    version: int
    digest: str
    leases: int


class AdapterView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one adapter."""

    name: str
    object: str = "lora_adapter"
    state: str
    version: int | None = None
    digest: str | None = None
    source: str | None = None
    revision: str | None = None
    parent: str | None = None  # the served base name
    trained_on: str | None = None  # what its config says
    rank: int | None = None
    num_modules: int | None = None
    modules: list[str] = []  # the kinds of layers it changes
    bytes: int | None = None
    tier: str | None = None  # device, host or disk; null while the engine does not answer
    pinned: bool = False
    origin: str | None = None
    leases: int = 0  # requests on the current version
    created: int | None = None
    loaded_at: float | None = None
    last_used: float | None = None
    error: AdapterError | None = None
    update: AdapterUpdate | None = None
    draining: list[DrainingVersion] = []


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """Every adapter, by name."""

    object: str = "list"
    data: list[AdapterView]
    desired: DesiredReport | None = None  # how this compares to --adapters-file


class PutResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a PUT did."""

    outcome: str  # added, replaced or unchanged
    adapter: AdapterView


class DeleteResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a DELETE did: the name is gone; its memory goes with the last request."""

    name: str
    object: str = "lora_adapter.deleted"
    deleted: bool = True
    state: str  # gone or draining
    leases: int  # requests that still run
    freed: FreedMemory | None  # null while it drains, or if the content stays for other names
    shared_with: list[str]


class DynamoList(msgspec.Struct, frozen=True, kw_only=True):
    """Dynamo's `GET /v1/loras`."""

    status: str = "success"
    loras: dict[str, int]
    count: int


class DynamoResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Dynamo's answer to a load or an unload."""

    status: str
    message: str
    lora_name: str
    lora_id: int | None = None
    hot_swap: bool = False


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """What a load would meet; nothing was loaded."""

    name: str
    object: str = "lora_adapter.dry_run"
    name_is_taken: bool
    report: AdapterReport
