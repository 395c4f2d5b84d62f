"""Why an adapter can or cannot be served, in figures: for `loramux doctor` and for dry runs.

Only the config and the headers of the weights are read. The verdict is `inspect_adapter`'s own; the rest is
counted without its strictness, so that there is something to say about an adapter that is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from loramux.engine.config import LANE_GROUP
from loramux.engine.errors import AdapterError
from loramux.engine.types import LoraSite
from loramux.resolvers.adapter_folder import AdapterFolder
from loramux.resolvers.adapter_weights import AdapterTensor, open_weights
from loramux.resolvers.base_match import is_same_base
from loramux.resolvers.inspect import inspect_adapter
from loramux.resolvers.peft_config import MAX_CONFIG_BYTES
from loramux.resolvers.refusal import CONFIG_FILE

_MAX_EXAMPLES: Final = 5
_PREFIX: Final = "base_model.model."


class AdapterReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an adapter from its headers."""

    can_be_served: bool
    problem: str | None = None  # why not
    param: str | None = None  # the file or field at fault
    warnings: list[str] = []
    trained_on: str | None = None  # the base model that its config names
    rank: int | None = None  # the largest
    max_lora_rank: int
    lanes: int | None = None  # that it takes on the device
    lanes_total: int
    bytes: int = 0  # of all tensors
    dtypes: list[str] = []
    num_tensors: int = 0
    num_matched: int = 0  # tensors that belong to a module of the base model
    num_unmatched: int = 0
    unmatched: list[str] = []  # the first few of them


def explain_adapter(
    path: Path,
    sites: Mapping[str, LoraSite],
    *,
    max_lora_rank: int,
    num_lanes: int,
    base_model_name: str | None = None,
) -> AdapterReport:
    """Look at an adapter's folder without reading its tensors.

    Args:
        path: the folder.
        sites: the base model's modules.
        max_lora_rank: the server's limit.
        num_lanes: the server's lane pool.
        base_model_name: what is served, to be compared with what the adapter was trained on.

    Raises:
        AdapterNotFound: there is no adapter.
    """
    folder = AdapterFolder(path)
    config: dict[str, object] = {}
    tensors: list[AdapterTensor] = []
    problem, param, rank = None, None, None
    with contextlib.suppress(AdapterError):
        config = folder.read_json(CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    with contextlib.suppress(AdapterError), contextlib.ExitStack() as stack:
        tensors = open_weights(folder, stack)
    try:
        rank = inspect_adapter(path, sites, max_lora_rank=max_lora_rank, read_tensors=False).rank
    except AdapterError as error:
        problem, param = error.message, error.param
        rank = config["r"] if isinstance(config.get("r"), int) else None  # type: ignore[assignment]
    lanes = -(-rank // LANE_GROUP) * LANE_GROUP if rank is not None else None
    if problem is None and lanes is not None and lanes > num_lanes:
        problem = (
            f"rank {rank} needs {lanes} lanes, and the pool has {num_lanes}; raise --max-loras or --num-lanes"
        )
        param = "r"
    unmatched = [tensor.key for tensor in tensors if not _is_of_base(tensor.key, sites)]
    trained_on = config.get("base_model_name_or_path")
    trained_on = trained_on if isinstance(trained_on, str) else None
    return AdapterReport(
        can_be_served=problem is None,
        problem=problem,
        param=param,
        warnings=_warnings(trained_on, base_model_name),
        trained_on=trained_on,
        rank=rank,
        max_lora_rank=max_lora_rank,
        lanes=lanes,
        lanes_total=num_lanes,
        bytes=sum(tensor.entry.nbytes for tensor in tensors),
        dtypes=sorted({tensor.entry.dtype for tensor in tensors}),
        num_tensors=len(tensors),
        num_matched=len(tensors) - len(unmatched),
        num_unmatched=len(unmatched),
        unmatched=unmatched[:_MAX_EXAMPLES],
    )


def _is_of_base(key: str, sites: Mapping[str, LoraSite]) -> bool:
    """True if a tensor's name begins with a module of the base model."""
    module = key.removeprefix(_PREFIX)
    while module:
        if module in sites:
            return True
        module = module.rpartition(".")[0]
    return False


def _warnings(trained_on: str | None, base_model_name: str | None) -> list[str]:
    if not trained_on or not base_model_name or is_same_base(trained_on, base_model_name, "basename"):
        return []
    return [
        f"its config says that it was trained on {trained_on[:200]!r}, and {base_model_name!r} is served: if"
        " these are different weights, answers will be wrong although everything fits"
    ]
