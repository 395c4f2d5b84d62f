"""The prompt of a completion call: a text, token ids, or a list of either."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import ValidatorFunctionWrapHandler, WrapValidator

_WANTED: Final = "must be a text, a list of texts, a list of token ids, or a list of lists of token ids"


def _check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Check lists at the speed of C.

    Pydantic looks at every item once for each kind of list, and makes an error object of each that does
    not fit: 300,000 items of mixed kinds took it six seconds.
    """
    if not isinstance(value, list):
        return handler(value)
    kinds = set(map(type, value))
    if kinds <= {int} or kinds == {str}:
        return value
    if kinds == {list} and all(set(map(type, part)) <= {int} for part in value):
        return value
    raise ValueError(_WANTED)


PromptInput = Annotated[str | list[str] | list[int] | list[list[int]], WrapValidator(_check)]
