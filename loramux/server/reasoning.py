"""A model's reasoning apart from its answer: the text between `<think>` and `</think>`.

Only a block at the beginning counts. Line breaks beside the marks belong to neither text. Many chat
templates open the block in the prompt, so that the answer begins inside it; a prompt that ends with
the closing mark (reasoning switched off) makes everything the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from loramux.server.tool_parsers.markers import MarkerSearch

OPEN: Final = "<think>"
CLOSE: Final = "</think>"
MARKS: Final = (OPEN, CLOSE)
_MAX_START: Final = 256  # characters in which the block must have opened


class Beginning(Enum):
    """Where an answer begins."""

    BEFORE = 1  # a block of reasoning may follow
    INSIDE = 2
    AFTER = 3  # the prompt has closed the block


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its reasoning."""

    name: str
    always_reasons: bool  # the answer begins inside the block, whether or not the prompt opens it

    def beginning(self, prompt_end: str) -> Beginning:
        """Where an answer to the prompt that ends so begins.

        Args:
            prompt_end: at least the last characters of the prompt's text.
        """
        end = prompt_end.rstrip()
        if end.endswith(CLOSE):
            return Beginning.AFTER
        return Beginning.INSIDE if self.always_reasons or end.endswith(OPEN) else Beginning.BEFORE

    def splitter(self, prompt_end: str) -> ReasoningSplitter:
        """A splitter for an answer to the prompt that ends so."""
        return ReasoningSplitter(self.beginning(prompt_end))


REASONING_FORMATS: Final = {
    "qwen3": ReasoningFormat("qwen3", always_reasons=False),
    "deepseek_r1": ReasoningFormat("deepseek_r1", always_reasons=True),
}


def reasoning_of_template(source: str) -> ReasoningFormat | None:
    """The format that a chat template is sure to go with; None if it never mentions the marks."""
    return REASONING_FORMATS["qwen3"] if OPEN in source and CLOSE in source else None


class Split(NamedTuple):
    """Parts of a text."""

    reasoning: str
    content: str


class ReasoningSplitter:
    """Splits one answer while it arrives.

    Args:
        beginning: where it begins; inside the block, an opening mark is allowed, and dropped.
    """

    def __init__(self, beginning: Beginning) -> None:
        self.is_over = beginning is Beginning.AFTER  # the block is closed, or there is none
        self._is_inside = beginning is Beginning.INSIDE
        self._search = MarkerSearch(CLOSE)
        self._start = ""  # what was read before it was clear whether an opening mark comes
        self._is_started = self.is_over
        self._breaks: list[str] = []  # line breaks that may stand before the closing mark
        self._skips_breaks = False  # those after a mark

    @property
    def has_block(self) -> bool:
        """Whether there is reasoning, as far as the text has been read."""
        return self._is_inside

    def feed(self, text: str) -> Split:
        """The parts that the next piece settles."""
        if not self._is_started:
            text = self._begin(text)
        if not text:
            return Split("", "")
        if self.is_over:
            return Split("", self._content(text))
        shown, mark, position = self._search.feed(text)
        reasoning = self._reasoning(shown)
        if mark is None:
            return Split(reasoning, "")
        self._breaks.clear()
        self.is_over = self._skips_breaks = True
        return Split(reasoning, self._content(text[position:]))

    def finish(self) -> Split:
        """What is left when the answer has ended."""
        start, self._start = self._start, ""
        if self.is_over or not self._is_inside:
            return Split("", start)
        return Split(self._reasoning(start + self._search.finish()), "")

    def _begin(self, text: str) -> str:
        """Decide whether a block opens; returns the text that follows the mark."""
        self._start += text
        bare = self._start.lstrip()
        if OPEN.startswith(bare) and len(bare) < len(OPEN) and len(self._start) < _MAX_START:
            return ""
        text, self._start, self._is_started = self._start, "", True
        if bare.startswith(OPEN):
            self._is_inside = True
            text = bare[len(OPEN) :]
        elif not self._is_inside:
            self.is_over = True
            return text
        self._skips_breaks = True
        return text

    def _content(self, text: str) -> str:
        if self._skips_breaks:
            text = text.lstrip("\n")
            self._skips_breaks = not text
        return text

    def _reasoning(self, text: str) -> str:
        """The text without line breaks at its ends; those at its end wait for more text."""
        if self._skips_breaks:
            text = text.lstrip("\n")
            self._skips_breaks = not text
        kept = text.rstrip("\n")
        if not kept:
            self._breaks.append(text)
            return ""
        ready = "".join((*self._breaks, kept))
        self._breaks = [text[len(kept) :]]
        return ready
