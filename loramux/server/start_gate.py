"""Lets only a few requests begin in one turn of the event loop.

To begin a request (parse, check, render, tokenize) costs about a millisecond of the loop. When hundreds
arrive at once, they would all begin in one turn, and whoever only asks for `/health` waits for all of them.
"""

from __future__ import annotations

import asyncio
from typing import Final

STARTS_A_TURN: Final = 8


class StartGate:
    """Counts the starts of this turn; those above the limit wait for the next ones, in no special order."""

    def __init__(self, starts_a_turn: int = STARTS_A_TURN) -> None:
        self._limit = starts_a_turn
        self._started = 0

    async def enter(self) -> None:
        """Return when this turn has room."""
        while self._started >= self._limit:
            await asyncio.sleep(0)
        if self._started == 0:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._started += 1

    def _next_turn(self) -> None:
        self._started = 0
