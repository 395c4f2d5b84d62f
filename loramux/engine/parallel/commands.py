"""What rank 0 tells the other ranks, and what they answer. Pure values, msgpack-encoded.

One stream leads from rank 0 to each of the others, and everything goes through it, so that every rank
does the same things in the same order. Steps are not answered: a rank shows that it has computed one by
taking part in its sums. The commands about adapters are carried out in order, but beside the steps;
rank 0 starts no step on lanes before every rank has answered that they are filled.
"""

from __future__ import annotations

import msgspec

from loramux.engine.types import AdapterSpec

ROW = (
    "handle",  # of the sequence: the same from one step to the next
    "start",  # first token to compute
    "count",  # tokens to compute
    "num_pending",  # of these, whose ids only the devices know
    "num_prompt",  # tokens of the prompt
    "samples",  # 1 = the step produces a new token
    "wants_prompt_logprobs",  # 1 = the logits of every token are wanted
    "num_blocks",  # KV blocks of the sequence
    "first_lane",  # -1 = the base model
    "num_lanes",
    "rank",
)


class Step(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """One batch, sequence by sequence; arrays as the bytes of int64."""

    rows: bytes  # [num_seqs, len(ROW)]
    token_ids: bytes  # to compute, of all sequences; without the pending ones
    block_ids: bytes  # of all sequences
    tables: list[str | None]  # one a sequence: its adapter's digest, if that has tables on the device


class ReadAdapter(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Read this rank's part of an adapter into host memory; answered."""

    spec: AdapterSpec


class FillLanes(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Copy an adapter from host memory into lanes; answered."""

    digest: str
    first: int
    count: int
    rank: int


class DropAdapter(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Free an adapter's host memory."""

    digest: str


class KeepTables(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Free what adapters other than these hold on the device beside their lanes."""

    residents: list[str]


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """End the process."""


Command = Step | ReadAdapter | FillLanes | DropAdapter | KeepTables | Shutdown


class Done(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A command was carried out, or a stage of the start is over."""

    nbytes: int = 0  # in host memory, of an adapter that was read


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """It was not; the error as it crosses process borders."""

    error: str
    message: str
    param: str | None


Answer = Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
