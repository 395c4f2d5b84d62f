"""What a parser of tool calls is: text in, pieces of text and of calls out.

A model writes calls in the format that it was trained on. A parser reads that format while it
arrives, and what it says does not depend on how the text was cut. Text that may become a call is held
back until that is decided; what turns out to be no call comes out again as text. No text makes a
parser raise, and its time is linear in the text: each character is looked at a fixed number of times.

Once a call has a name and its arguments have begun, it cannot be taken back: if the text then breaks
off or goes wrong, the call ends with the arguments so far, and what follows is text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """Text that is no part of a call."""

    text: str


class CallStart(NamedTuple):
    """A call begins; its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """The next part of the arguments of the call that began last; joined they are a JSON object."""

    text: str


Event = Text | CallStart | CallArguments


class ToolParser(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> list[Event]:
        """What the next piece of the answer settles."""
        ...

    def finish(self) -> list[Event]:
        """What is left when the answer has ended; nothing may be fed afterwards."""
        ...


# Makes the parser of one answer; takes the names of the tools that the request declares.
ParserFactory = Callable[[Collection[str]], ToolParser]
