"""How calls of tools and reasoning are found in answers, as the operator says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loramux.engine.errors import InvalidConfig
from loramux.server.reasoning import REASONING_FORMATS
from loramux.server.tool_parsers.registry import TOOL_FORMATS

AUTO: Final = "auto"  # as the chat template says
NONE: Final = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolConfig:
    """Formats by name, and what may be done with them."""

    tool_parser: str = AUTO
    reasoning_parser: str = AUTO
    auto_tool_choice: bool | None = None  # None = if a format is known; True = it must be
    exclude_when_none: bool = False  # tool_choice "none" keeps the tools out of the prompt


def tool_config(values: Mapping[str, Any]) -> ToolConfig:
    """The part of the configuration that is about tools and reasoning.

    Args:
        values: of the flags that were given, by attribute name.

    Raises:
        InvalidConfig: names the flag at fault.
    """
    given: dict[str, Any] = {}
    formats = (("tool_call_parser", "tool_parser", TOOL_FORMATS),)
    for flag, name, known in (*formats, ("reasoning_parser", "reasoning_parser", REASONING_FORMATS)):
        value = values.get(flag)
        if not value:  # vLLM's own default for --reasoning-parser is ""
            continue
        if value not in (AUTO, NONE, *known):
            option = f"--{flag.replace('_', '-')}"
            names = ", ".join((*known, AUTO, NONE))
            raise InvalidConfig(f"{option} must be one of {names}, got {value!r}", param=option)
        given[name] = value
    if "enable_auto_tool_choice" in values:
        given["auto_tool_choice"] = values["enable_auto_tool_choice"]
    if values.get("exclude_tools_when_tool_choice_none"):
        given["exclude_when_none"] = True
    return ToolConfig(**given)
