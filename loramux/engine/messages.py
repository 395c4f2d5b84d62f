"""Every message between the server process and the engine process, both directions.

One frame is one msgpack-encoded list of messages; the engine sends at most one frame a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from loramux.engine.types import AdapterSpec, EngineInfo, EngineStats, FreedMemory, Request, SequenceOutput


class AddRequest(msgspec.Struct, frozen=True, tag="add", array_like=True):
    """Start one sequence."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """Stop these sequences now; nothing more is sent for them."""

    request_ids: list[str]


class LoadAdapter(msgspec.Struct, frozen=True, tag="load", array_like=True):
    """Read an adapter into host memory and try it on the device; answered by `Reply`."""

    call_id: int
    spec: AdapterSpec
    pinned: bool = False  # never evicted from host memory, and from lanes only by its own unload


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload", array_like=True):
    """Refuse new requests for an adapter; `Reply` with what was freed when its last sequence has ended."""

    call_id: int
    digest: str


class RestoreAdapters(msgspec.Struct, frozen=True, tag="restore", array_like=True):
    """Adapters that the engine before this one had loaded: usable at once, read when first needed."""

    specs: list[AdapterSpec]


class GetStats(msgspec.Struct, frozen=True, tag="stats", array_like=True):
    """Ask for a snapshot of the engine's load; answered by `Reply`."""

    call_id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    """End the process after the current step."""


ToEngine = AddRequest | Abort | LoadAdapter | UnloadAdapter | RestoreAdapters | GetStats | Shutdown


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The model is loaded and requests are welcome."""

    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed", array_like=True):
    """The model could not be loaded; the process ends."""

    error: str  # class name in loramux.engine.errors
    message: str
    param: str | None = None


class Outputs(msgspec.Struct, frozen=True, tag="outputs", array_like=True):
    """What one step produced."""

    outputs: list[SequenceOutput]


class RequestFailed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """One sequence cannot be served; nothing more is sent for it."""

    request_id: str
    error: str
    message: str
    param: str | None = None


class Reply(msgspec.Struct, frozen=True, tag="reply", array_like=True):
    """The answer to a call; `error` is a class name in loramux.engine.errors, None on success."""

    call_id: int
    error: str | None = None
    message: str = ""
    param: str | None = None
    stats: EngineStats | None = None
    freed: FreedMemory | None = None


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", array_like=True):
    """The step loop is alive; sent about once a second, also while it has other things to say."""

    stats: EngineStats | None = None


FromEngine = Ready | StartFailed | Outputs | RequestFailed | Reply | Heartbeat

EXIT_RANK_LOST = 3  # exit code of an engine that lost another rank's process

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine = msgspec.msgpack.Decoder(list[FromEngine])


def encode(messages: Sequence[ToEngine | FromEngine]) -> bytes:
    """One frame."""
    return _encoder.encode(messages)


def decode_to_engine(frame: bytes) -> list[ToEngine]:
    """The messages of a frame that the server sent."""
    return _to_engine.decode(frame)


def decode_from_engine(frame: bytes) -> list[FromEngine]:
    """The messages of a frame that the engine sent."""
    return _from_engine.decode(frame)
