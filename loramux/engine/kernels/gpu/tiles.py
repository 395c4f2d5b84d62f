"""How the kernels of the linear sites are cut up and launched: a table, tuned on the device it is for.

`tiles_h200.json` holds, for each kernel, rules in order of preference; the first that fits decides. A
rule may name a site's shape and bound the lanes in use (a bucket) and the tokens of a step. It is
written by `benchmarks/tune_tiles.py`, never while serving; its last rules fit every shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

TABLE: Final = Path(__file__).with_name("tiles_h200.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One way to launch a kernel; what a kernel has no use for stays at 1."""

    rows: int = 1  # tokens of a program: without LoRA, and in a shrink
    columns: int = 1  # output features of a program
    lanes: int = 16  # at a time
    features: int = 1  # input features at a time, in a shrink
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A tile and where it is best; None = anywhere."""

    shape: tuple[int, int] | None  # in_features, out_features of the site
    max_lanes: int | None
    max_tokens: int | None
    tile: Tile

    def fits(self, shape: tuple[int, int], num_lanes: int, num_tokens: int) -> bool:
        """Whether the rule speaks of this launch."""
        return (
            (self.shape is None or self.shape == shape)
            and (self.max_lanes is None or num_lanes <= self.max_lanes)
            and (self.max_tokens is None or num_tokens <= self.max_tokens)
        )


_forced: dict[str, Tile] = {}


def read_rules(path: Path = TABLE) -> dict[str, list[Rule]]:
    """A table, by kernel."""
    stored: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    return {kernel: [_rule(entry) for entry in entries] for kernel, entries in stored.items()}


def tile(kernel: str, shape: tuple[int, int], num_lanes: int, num_tokens: int) -> Tile:
    """How to launch a kernel.

    Args:
        shape: in_features and out_features of the site.
        num_lanes: prefix of the pool in use, 0 without LoRA.
        num_tokens: of the step, padding included.
    """
    return _forced.get(kernel) or _from_table(kernel, shape, num_lanes, num_tokens)


@contextmanager
def forced(kernel: str, only: Tile) -> Iterator[None]:
    """Launch a kernel in one way, whatever the table says: for the tuner."""
    _forced[kernel] = only
    try:
        yield
    finally:
        del _forced[kernel]


@cache
def _rules() -> dict[str, list[Rule]]:
    return read_rules()


@cache
def _from_table(kernel: str, shape: tuple[int, int], num_lanes: int, num_tokens: int) -> Tile:
    return next(r.tile for r in _rules()[kernel] if r.fits(shape, num_lanes, num_tokens))


def _rule(entry: dict[str, Any]) -> Rule:
    shape = entry.get("shape")
    return Rule(
        shape=None if shape is None else (int(shape[0]), int(shape[1])),
        max_lanes=entry.get("max_lanes"),
        max_tokens=entry.get("max_tokens"),
        tile=Tile(**entry["tile"]),
    )
