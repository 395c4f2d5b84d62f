"""Grammars: what the text of a sequence must look like, token by token.

llguidance compiles a JSON schema, a regular expression or a grammar in Lark into an automaton over the
tokenizer's tokens. A sequence walks through it with a `GrammarMatcher`; before each of its tokens, a
mask says which ones the grammar allows, and `GrammarMasks` computes those of a whole step at once.

The tokenizer gets one more token than the model has: END, which a grammar allows exactly where a text
may end. It is never sampled. Where it is allowed, the tokens that end the request are.

Everything here is native code with bounds on its work (`PARSER_LIMITS`) that lets other threads run.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from loramux.engine.errors import InvalidRequest
from loramux.engine.types import GrammarSpec

PARAM: Final = "structured_outputs"  # the field at fault, unless the server knows better
END: Final = "<|loramux:end of grammar|>"
MAX_LEXER_STATES: Final = 50_000  # 1 to 2 KB each; a schema of a page needs some hundreds
PARSER_LIMITS: Final = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
_MAX_REASON_CHARS: Final = 300
_LARK_STARTS: Final = ("start:", "start :", "?start", "%llguidance")

_SOURCES: Final[dict[str, Callable[[str], str]]] = {
    "json_schema": LLMatcher.grammar_from_json_schema,
    # \d is [0-9], as in JSON schema and in what people mean by it; \w and \s know all of Unicode.
    "regex": lambda text: LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'd')}/"),
    "lark": LLMatcher.grammar_from_lark,
}


def load_tokenizer(folder: Path) -> LLTokenizer:
    """The tokenizer of a model folder as grammars need it.

    No other thread runs Python meanwhile: about 0.2 s for 49,000 tokens.

    Raises:
        InvalidRequest: there is no tokenizer.json, or it cannot be used.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidRequest("the model has no tokenizer.json, which grammars need", param=PARAM)
    try:
        text, end_id = _with_end(path.read_bytes())
        return LLTokenizer(text, eos_token=end_id)
    except Exception as error:  # the libraries raise bare exceptions
        message = f"the model's tokenizer cannot be used for grammars: {_reason(str(error))}"
        raise InvalidRequest(message, param=PARAM) from error


def _with_end(tokenizer_json: bytes) -> tuple[str, int]:
    """A tokenizer.json with END as a further special token, and END's id.

    The parts of the file that do not matter are copied without a look.
    """
    top = msgspec.json.decode(tokenizer_json, type=dict[str, msgspec.Raw])
    model = msgspec.json.decode(top["model"], type=dict[str, msgspec.Raw])
    vocabulary = msgspec.json.decode(model["vocab"], type=dict[str, int] | list[msgspec.Raw])
    added = msgspec.json.decode(top["added_tokens"], type=list[dict[str, Any]])
    # As the tokenizers library counts: the id that it gives to a token that it has not seen.
    end_id = max([len(vocabulary), *(token["id"] + 1 for token in added)])
    if isinstance(vocabulary, dict) and end_id <= max(vocabulary.values(), default=-1):
        raise ValueError("the ids of its vocabulary have gaps")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": end_id, "content": END, "special": True, **flags})
    top |= {"added_tokens": msgspec.Raw(msgspec.json.encode(added))}
    top |= {"truncation": msgspec.Raw(b"null"), "padding": msgspec.Raw(b"null")}
    return msgspec.json.encode(top).decode(), end_id


def translate(spec: GrammarSpec) -> GrammarSpec:
    """The same grammar in a form that llguidance takes; may take time for a hostile text.

    Raises:
        InvalidRequest: it is neither GBNF nor Lark.
    """
    if spec.kind != "ebnf":
        return spec
    if "::=" not in spec.text or spec.text.lstrip().startswith(_LARK_STARTS):
        return GrammarSpec("lark", spec.text)
    try:
        return GrammarSpec("lark", gbnf_to_lark(spec.text))
    except Exception as error:  # the converter raises bare exceptions
        reason = f"the grammar cannot be read as GBNF: {_reason(str(error))}"
        raise InvalidRequest(reason, param=PARAM) from error


def compile_grammar(spec: GrammarSpec, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the start of the grammar, to make copies of.

    Raises:
        InvalidRequest: the grammar is wrong, too large, or no text can match it.
    """
    spec = translate(spec)
    try:
        source = _SOURCES[spec.kind](spec.text)
    except ValueError as error:
        raise InvalidRequest(f"the grammar cannot be read: {_reason(str(error))}", param=PARAM) from error
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=PARSER_LIMITS)
    if not matcher.is_error():
        mask = np.empty((1, _num_words(tokenizer)), dtype=np.int32)
        fill_next_token_bitmask(matcher, mask)  # what is found on the way is shared by all copies
    if matcher.is_error():
        raise InvalidRequest(f"the grammar cannot be used: {_reason(matcher.get_error())}", param=PARAM)
    return matcher


class GrammarMatcher:
    """Where one sequence stands in its grammar.

    It is made empty and becomes ready in another thread, when the grammar is compiled. From then on
    it belongs to the step loop.
    """

    __slots__ = ("_matcher", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._matcher: LLMatcher | None = None

    @property
    def is_ready(self) -> bool:
        """True once the grammar is compiled."""
        return self._matcher is not None

    def start(self, compiled: LLMatcher) -> None:
        """Become ready, at the start of the grammar."""
        self._matcher = compiled.deep_copy()

    @property
    def matcher(self) -> LLMatcher:
        """llguidance's own; only when ready."""
        assert self._matcher is not None
        return self._matcher

    def accept(self, token_id: int) -> None:
        """Go on by one token that the mask allowed."""
        self.matcher.consume_token(token_id)

    @property
    def is_finished(self) -> bool:
        """True if the text is complete and nothing may follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def error(self) -> str:
        """Why it cannot go on, empty if it can."""
        return _reason(self.matcher.get_error()) if self.matcher.is_error() else ""


@dataclass(frozen=True, slots=True)
class MaskRow:
    """A sequence of the step that has a grammar."""

    matcher: GrammarMatcher
    end_token_ids: Sequence[int]  # tokens that may end its text, where the grammar allows an end


@dataclass(frozen=True, slots=True)
class FilledMasks:
    """The masks of one step."""

    forbidden: npt.NDArray[np.bool_]  # [num_rows, vocab_size]; rows in `ended` and `failed` forbid nothing
    ended: list[int] = field(default_factory=list)  # rows whose text is complete: no token can follow
    failed: dict[int, str] = field(default_factory=dict)  # rows that cannot go on, and why


class GrammarMasks:
    """Computes the masks of a step, in parallel over its rows."""

    def __init__(self, vocab_size: int, *, num_threads: int = 1) -> None:
        """Args:
        vocab_size: columns of the model's logits; may exceed the tokenizer's tokens, which are padded
            with forbidden ones, or fall short of them.
        num_threads: that compute masks, beside those of the model.
        """
        self._vocab_size = vocab_size
        self._executor = LLExecutor(num_threads)

    def fill(self, rows: Sequence[MaskRow], tokenizer: LLTokenizer) -> FilledMasks:
        """The masks for the next token of each row."""
        bits = np.zeros((len(rows), _num_words(tokenizer)), dtype=np.int32)
        if len(rows) == 1:
            fill_next_token_bitmask(rows[0].matcher.matcher, bits)
        else:
            pairs = [(row.matcher.matcher, index) for index, row in enumerate(rows)]
            fill_next_token_bitmask_par(self._executor, pairs, bits)
        words = bits.view(np.uint32)
        word, bit = divmod(tokenizer.eos_token, 32)
        may_end = (words[:, word] >> bit) & 1
        words[:, word] &= ~np.uint32(1 << bit)
        filled = FilledMasks(self._unpack(bits))
        goes_on = np.any(bits, axis=1, keepdims=True)
        for index, row in enumerate(rows):
            if goes_on[index, 0]:
                if may_end[index]:
                    filled.forbidden[index, row.end_token_ids] = False
                continue
            filled.forbidden[index] = False
            reason = row.matcher.error
            if reason or not may_end[index]:
                filled.failed[index] = f"the grammar cannot be followed further: {reason or 'no token fits'}"
            else:
                filled.ended.append(index)
        return filled

    def _unpack(self, bits: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """[num_rows, words] of packed bits as [num_rows, vocab_size] of what is not allowed."""
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=None)
        forbidden = np.ones((len(bits), self._vocab_size), dtype=np.bool_)
        width = min(allowed.shape[1], self._vocab_size)
        np.equal(allowed[:, :width], 0, out=forbidden[:, :width])
        return forbidden


def _num_words(tokenizer: LLTokenizer) -> int:
    return -(-tokenizer.vocab_size // 32)


def _reason(text: str) -> str:
    """llguidance's words on one line, not too many."""
    if text.startswith("NoExtension"):
        return "no text can match it"
    return " ".join(text.replace("<non-verbose/>", "").split())[:_MAX_REASON_CHARS] or "unknown error"
