"""How the server looks after its engine: the watchdog, the wait for the next one, the end of patience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loramux.engine.errors import InvalidConfig

_FLAGS: Final = {
    "watchdog_s": "--engine-watchdog-timeout",
    "restart_wait_s": "--engine-restart-wait",
    "max_restarts": "--max-engine-restarts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCare:
    """When an engine is replaced, and who waits for that."""

    watchdog_s: float = 30.0  # silence without computing after which an engine hangs; 0 = never
    restart_wait_s: float = 10.0  # that a request waits for the next engine
    max_restarts: int = 5  # in a row, of engines that finished no request; 0 = the first end is the last


def engine_care(values: Mapping[str, Any]) -> EngineCare:
    """From the values of the flags.

    Raises:
        InvalidConfig: one of them is negative.
    """
    given: dict[str, Any] = {}
    for field, flag in _FLAGS.items():
        value = values.get(flag.removeprefix("--").replace("-", "_"))
        if value is None:
            continue
        if not 0 <= value < float("inf"):
            raise InvalidConfig(f"{flag} must be at least 0, got {value}", param=flag)
        given[field] = value
    return EngineCare(**given)
