"""Token ids to text while they arrive: whole characters only, stop strings never shown.

`IncrementalDecoder` turns ids into text. A token alone may be half a character, and some tokenizers
write a token differently after another one, so it decodes a short window (from `prefix` on, the
tokens whose text is out; from `read` on, those whose text is not) and returns what the window gained:

    ... | prefix ........ read ............ end
          text was returned | text is held while it ends inside a character

`StopScanner` searches that text for stop strings and holds back an end that may become one.
`TextStream` is both together, for one sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from loramux.server.tokenizer import Tokenizer

_REPLACEMENT: Final = "\ufffd"
_PROMPT_TAIL: Final = 6  # prompt tokens that the first window starts with, as vLLM does
_MAX_HELD: Final = 64  # tokens; a longer run of broken UTF-8 is not half a character


class IncrementalDecoder:
    """The text of one sequence, piece by piece; the pieces joined are its whole text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown_special_token_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = frozenset(shown_special_token_ids)
        # If some are shown, the others never enter the window, which is the same as skipping them.
        self._sifts = skip_special_tokens and bool(self._shown)
        self._skip_special_tokens = skip_special_tokens and not self._shown
        tail = prompt_token_ids[-_PROMPT_TAIL:]
        self._window = [id_ for id_ in tail if self._is_seen(id_)]
        self._read = len(self._window)  # tokens of the window whose text was returned
        self._prefix_text: str | None = None

    def add(self, token_id: int) -> str:
        """The text that is certain after one more token; "" inside a character."""
        if not self._is_seen(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._read
        if text.endswith(_REPLACEMENT) and held < _MAX_HELD:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What was still held, at the end of the sequence."""
        if self._read == len(self._window):
            return ""
        return self._advance(self._decode(self._window))

    def _is_seen(self, token_id: int) -> bool:
        return not self._sifts or token_id in self._shown or not self._tokenizer.is_special(token_id)

    def _advance(self, text: str) -> str:
        if self._prefix_text is None:
            self._prefix_text = self._decode(self._window[: self._read])
        gained = text[len(self._prefix_text) :]
        if gained:
            self._window = self._window[self._read :]
            self._prefix_text = None
        elif self._skip_special_tokens and self._tokenizer.is_special(self._window[-1]):
            self._window.pop()  # it adds no text, so a run of them must not make the window grow
        self._read = len(self._window)
        return gained

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class StopScanner:
    """Find the first stop string in a text that arrives in pieces."""

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = list(dict.fromkeys(stop))
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def add(self, text: str) -> str:
        """The part of the text so far that can be shown; nothing follows once `matched` is set."""
        text = self._held + text
        found = [(text.find(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            start, _, self.matched = min(found)
            self._held = ""
            return text[: start + len(self.matched)] if self._include_stop else text[:start]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text ends without the rest of a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The shown text of one sequence.

    Args:
        tokenizer: the model's.
        prompt_token_ids: what the sequence continues.
        stop: strings that end it.
        include_stop: show the stop string, or the text of a stop token, that ended it.
        skip_special_tokens: leave control tokens out of the text.
        shown_special_token_ids: those that are shown nevertheless.
        min_tokens: stop strings are not looked for before so many tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown_special_token_ids: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer,
            prompt_token_ids,
            skip_special_tokens=skip_special_tokens,
            shown_special_token_ids=shown_special_token_ids,
        )
        self._scanner = StopScanner(stop, include_stop=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text; nothing more should be added then."""
        return self._scanner.matched

    def add(self, token_id: int) -> str:
        """The text to show after one more token."""
        self._num_tokens += 1
        text = self._decoder.add(token_id)
        return self._scan(text) if text else ""

    def finish(self, stop_token_id: int | None = None) -> str:
        """The rest of the text, when the engine ended the sequence.

        Args:
            stop_token_id: the last token if it ended the sequence; not yet added.
        """
        text = ""
        if stop_token_id is not None and self._include_stop:
            text = self.add(stop_token_id)
        if self.matched_stop is None:
            text += self._scan(self._decoder.flush())
        if self.matched_stop is None:
            text += self._scanner.flush()
        return text

    def _scan(self, text: str) -> str:
        if self._num_tokens < self._min_tokens:
            return text
        return self._scanner.add(text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
