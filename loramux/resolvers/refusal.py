"""How an adapter is refused: one class, one way to show untrusted values in a message."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Final, TypeVar

from loramux.engine.errors import AdapterIncompatible, LoramuxError

CONFIG_FILE: Final = "adapter_config.json"

_shortened = reprlib.Repr()
_shortened.maxstring = 120  # tensor keys are up to ~90 characters long and must stay readable
_shortened.maxother = 120
_shortened.maxlevel = 3


def shown(value: object) -> str:
    """`value` for a message: escaped, and short whatever a file's author put there."""
    return _shortened.repr(value)


def examples(names: Collection[str], limit: int = 3) -> str:
    """The first few names, quoted."""
    return ", ".join(shown(name) for name in sorted(names)[:limit])


def refused(message: str, *, param: str) -> AdapterIncompatible:
    """The error to raise; `param` is the file or the config field at fault."""
    return AdapterIncompatible(message, param=param)


def config_refused(field: str, problem: str) -> AdapterIncompatible:
    """The error to raise about one field of the adapter's config."""
    return AdapterIncompatible(f"{CONFIG_FILE}: {field} {problem}", param=field)


_Error = TypeVar("_Error", bound=LoramuxError)


def same_again(error: _Error) -> _Error:
    """A copy to raise of an error that is kept, whose traceback would grow each time that it is raised."""
    return type(error)(error.message, param=error.param)
