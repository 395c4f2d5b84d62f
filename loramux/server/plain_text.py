"""Control tokens that stand in messages as plain text stay plain text.

A tokenizer that meets the text "<|im_end|>" makes the control token of it, wherever it came from, so
that a user could end their own turn and begin a system's. Here control tokens come only from the chat
template: what a message brings is taken out before the template runs, and put back afterwards as
ordinary characters, in any role and any field.

A conversation without such a text is not touched, and its ids are exactly the tokenizer's own.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import tokenizers

from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.server.tokenizer import Tokenizer, encode_text

_FIRST_MARK: Final = 0xF0000  # one character of the private planes stands for each hidden text
_MAX_MARKS: Final = 32768
_PRIVATE: Final = re.compile("[\U000f0000-\U0010fffd]")  # a message's own such characters are hidden, too


class Hidden:
    """The texts that were taken out of one conversation, and the marks that stand for them."""

    def __init__(self, names: re.Pattern[str]) -> None:
        self._names = names
        self._marks: dict[str, str] = {}  # text -> mark

    def __bool__(self) -> bool:
        return bool(self._marks)

    def hide(self, value: Any) -> Any:
        """The value with every control token in its texts replaced by a mark; objects are copied."""
        if isinstance(value, str):
            if not value.isascii():
                value = _PRIVATE.sub(self._mark, value)
            return self._names.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(entry) for entry in value]
        return value

    def show(self, text: str) -> str:
        """The text with the marks replaced by what they stand for."""
        if not self._marks:
            return text
        originals = {ord(mark): original for original, mark in self._marks.items()}
        return text.translate(originals)

    def _mark(self, match: re.Match[str]) -> str:
        mark = self._marks.get(match[0])
        if mark is None:
            if len(self._marks) >= _MAX_MARKS:
                message = f"messages hold more than {_MAX_MARKS} different private-use characters"
                raise InvalidRequest(message, param="messages")
            mark = self._marks[match[0]] = chr(_FIRST_MARK + len(self._marks))
        return mark


class ControlTokenGuard:
    """Hides control tokens of messages from the template and from the tokenizer.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = re.compile(_any_of(set(tokenizer.control_tokens)) or r"(?!)")
        self._twin = _Twin(tokenizer)  # now, for it takes half a second

    def open(self) -> Hidden:
        """A fresh record for one conversation."""
        return Hidden(self._names)

    def encode(self, text: str, hidden: Hidden, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a rendered text with marks: its own control tokens count, hidden ones do not."""
        if not hidden:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        aliased = self._names.sub(lambda match: self._twin.aliases[match[0]], text)
        ids = self._twin.encode(hidden.show(aliased))
        if not add_special_tokens:
            return ids
        around = self._tokenizer.encode("", add_special_tokens=True)
        start = 1 if around[:1] == [self._tokenizer.bos_token_id] else 0
        return [*around[:start], *ids, *around[start:]]


def _any_of(words: set[str]) -> str:
    """A pattern for the longest of several words. As a tree, since it is tried at every "<" of every text:
    a flat list of 250 words takes a second a megabyte, this half a millisecond.
    """
    longer = words - {""}
    if not longer:
        return ""
    branches: list[str] = []
    for first in sorted({word[0] for word in longer}):
        group = [word for word in longer if word[0] == first]
        prefix = os.path.commonprefix(group)  # noqa: RUF071 (characters are what is meant)
        branches.append(re.escape(prefix) + _any_of({word[len(prefix) :] for word in group}))
    if len(branches) == 1 and "" not in words:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if "" in words else "")


class _Twin:
    """The same tokenizer with other, unguessable names for its control tokens.

    So the real names are ordinary characters to it, split and merged as the model's tokenizer does
    with any text, while an alias is the control token, with the same handling of the space around it.

    Raises:
        InvalidConfig: the tokenizer cannot be rebuilt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        definition = msgspec.json.decode(tokenizer.definition())
        definition["post_processor"] = None
        nonce = secrets.token_hex(16)
        self.aliases = {
            name: f"\U0010fffd{nonce}.{id_}\U0010fffd" for name, id_ in tokenizer.control_tokens.items()
        }
        wanted: dict[str, int] = {}
        for token in definition["added_tokens"]:
            token["content"] = self.aliases.get(token["content"], token["content"])
            wanted[token["content"]] = token["id"]
        self._rename(definition["model"])
        try:
            self._backend = tokenizers.Tokenizer.from_str(msgspec.json.encode(definition).decode())
        except Exception as error:  # the library raises bare Exception
            message = (
                f"control tokens in messages cannot be told from text with this tokenizer: {error}; "
                "--parse-special-tokens-in-messages does without"
            )
            raise InvalidConfig(message, param="--parse-special-tokens-in-messages") from error
        # An alias that the vocabulary does not have is numbered in the twin's own way.
        self._real_ids = {self._backend.token_to_id(name): id_ for name, id_ in wanted.items()}

    def encode(self, text: str) -> list[int]:
        ids = encode_text(self._backend, text, add_special_tokens=False)
        return [self._real_ids.get(id_, id_) for id_ in ids]

    def _rename(self, model: dict[str, Any]) -> None:
        """Take the real names out of the vocabulary as well: a unigram model would find them there."""
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, list):
            model["vocab"] = [[self.aliases.get(piece, piece), score] for piece, score in vocabulary]
        elif isinstance(vocabulary, dict):
            model["vocab"] = {self.aliases.get(piece, piece): id_ for piece, id_ in vocabulary.items()}
        if model.get("unk_token") in self.aliases:
            model["unk_token"] = self.aliases[model["unk_token"]]
