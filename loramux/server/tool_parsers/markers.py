"""Find the marks of a format in a text that arrives in pieces."""

from __future__ import annotations

import re


class MarkerSearch:
    """Searches for the first of some marks; an end of the text that may become one is held back.

    Args:
        marks: plain strings, none empty.
    """

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._longest = max(map(len, marks))
        self._pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        self._held = ""  # always a proper start of a mark

    def feed(self, text: str, start: int = 0) -> tuple[str, str | None, int]:
        """Read from `start`, up to a mark.

        Returns:
            the text before it that is settled, the mark (None: all was read), and where it ended.
        """
        settled = ""
        if self._held:
            window = self._held + text[start : start + self._longest]
            if match := self._pattern.search(window):
                end = start + match.end() - len(self._held)
                self._held = ""
                return window[: match.start()], match[0], end
            if start + self._longest >= len(text):  # the window holds all there is
                return self._split(window, len(text))
            settled, self._held = self._held, ""
        match = self._pattern.search(text, start)
        if match:
            return settled + text[start : match.start()], match[0], match.end()
        shown, mark, end = self._split(text[start:], len(text))
        return settled + shown, mark, end

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _split(self, text: str, end: int) -> tuple[str, None, int]:
        """Hold back the longest end of the text that is a start of a mark."""
        tail = text[-self._longest :]
        for begin in range(len(tail)):
            if any(mark.startswith(tail[begin:]) for mark in self._marks):
                keep = len(tail) - begin
                self._held = text[len(text) - keep :]
                return text[: len(text) - keep], None, end
        self._held = ""
        return text, None, end
