"""How a linear site computes its LoRA part in a step: one table, from what is static in a captured graph.

`site_plans_h200.json` holds rules in order of preference; the first that fits decides. What there is to
choose:

    shrink  augmented   more rows of the base product, [weight; lanes in use]: no launch, but every
                        token is multiplied with every lane in use
            product     the same as a product of its own; also where a weight has no room for lanes
            tiles       a kernel over tiles of one adapter's tokens, at its true rank
    expand  fused       by the kernel that reads the site's output
            separate    a kernel of its own, in place
    by tile             an expand takes tiles of one adapter's tokens; otherwise each token by itself
    planes              ranges of input features that a shrink in tiles computes at the same time

No Triton here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

TABLE: Final = Path(__file__).with_name("site_plans_h200.json")


class Shrink(Enum):
    """Who computes it, see the module."""

    AUGMENTED = "augmented"
    PRODUCT = "product"
    TILES = "tiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """See the module."""

    shrink: Shrink
    is_fused: bool  # the expand
    by_tile: bool
    planes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRule:
    """A plan and where it is best; None = anywhere."""

    sites: tuple[str, ...] | None = None
    max_tokens: int | None = None
    max_lanes: int | None = None
    decode_only: bool | None = None
    plan: SitePlan

    def fits(self, site: str, num_tokens: int, num_lanes: int, decode_only: bool) -> bool:
        """Whether the rule speaks of this step at this site."""
        return (
            (self.sites is None or site in self.sites)
            and (self.max_tokens is None or num_tokens <= self.max_tokens)
            and (self.max_lanes is None or num_lanes <= self.max_lanes)
            and (self.decode_only is None or self.decode_only == decode_only)
        )


class PlanTable:
    """The rules, and what they said before."""

    def __init__(self, rules: list[PlanRule]) -> None:
        self._rules = rules
        self._known: dict[tuple[str, int, int, bool], SitePlan] = {}

    def plan(self, site: str, num_tokens: int, num_lanes: int, decode_only: bool) -> SitePlan:
        """What the table says of a step.

        Args:
            site: qkv | attn_out | mlp_in | mlp_out
            num_tokens: of the step, padding included.
            num_lanes: prefix of the pool in use.
            decode_only: every sequence computes one token.
        """
        key = (site, num_tokens, num_lanes, decode_only)
        found = self._known.get(key)
        if found is None:
            found = next(rule.plan for rule in self._rules if rule.fits(*key))
            self._known[key] = found
        return found


def always(plan: SitePlan) -> PlanTable:
    """One plan for everything."""
    return PlanTable([PlanRule(plan=plan)])


def read_plans(path: Path = TABLE) -> PlanTable:
    """A table from its file."""
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return PlanTable([_rule(entry) for entry in entries])


def _rule(entry: dict[str, Any]) -> PlanRule:
    return PlanRule(
        sites=tuple(entry["sites"]) if "sites" in entry else None,
        max_tokens=entry.get("max_tokens"),
        max_lanes=entry.get("max_lanes"),
        decode_only=entry.get("decode_only"),
        plan=SitePlan(
            shrink=Shrink(entry["shrink"]),
            is_fused=entry["expand"] == "fused",
            by_tile=entry["by_tile"],
            planes=entry.get("planes", 1),
        ),
    )
