"""The errors that the engine, the resolvers and the server raise.

A class here knows what went wrong (message, `param`) but nothing of HTTP: `loramux.server.errors`
holds the one table that maps a class to a status. An error that crosses the process boundary
travels as `(class name, message, param)` and is rebuilt by `from_wire`.

    LoramuxError
    ├── InvalidRequest            a field of a request has a value that cannot be served
    │   └── ContextTooLong        prompt, or prompt + max_tokens, exceeds the model's context
    ├── ModelNotFound             the name is neither the base model nor a registered adapter
    ├── AdapterError              (abstract) something is wrong with an adapter
    │   ├── AdapterNotFound       no adapter at that path or under that name
    │   ├── AdapterIncompatible   it exists, but this server cannot serve it; never retry
    │   ├── AdapterUnavailable    its source was down or slow; retry later
    │   └── AdapterSourceAuth     its source refused the server's credentials
    ├── UnsupportedModel          the base model cannot be served; start-up stops
    ├── InvalidConfig             a flag, variable or file entry is wrong; start-up stops
    ├── Overloaded                the caller must come back later
    └── EngineDead                the engine process is gone
"""

from __future__ import annotations

from typing import Final


class LoramuxError(Exception):
    """Base of every error that loramux raises on purpose.

    Args:
        message: one clear sentence; names field, value and limit.
        param: the request field, flag or file key at fault, if there is one.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(LoramuxError):
    """A request field has a value that cannot be served."""


class ContextTooLong(InvalidRequest):
    """The prompt (and the tokens asked for) do not fit into the model's context."""


class ModelNotFound(LoramuxError):
    """The requested model is neither the base model nor a registered adapter."""


class AdapterError(LoramuxError):
    """Something is wrong with one adapter."""


class AdapterNotFound(AdapterError):
    """There is no adapter at that path or under that name."""


class AdapterIncompatible(AdapterError):
    """The adapter exists but cannot be served by this base model or configuration."""


class AdapterUnavailable(AdapterError):
    """The adapter's source was down or slow; a later try may succeed."""


class AdapterSourceAuth(AdapterError):
    """The adapter's source refused the credentials that this server has for it."""


class UnsupportedModel(LoramuxError):
    """The base model cannot be served."""


class InvalidConfig(LoramuxError):
    """A flag, environment variable or configuration entry is wrong."""


class Overloaded(LoramuxError):
    """There is no room for the request now.

    Args:
        message, param: as everywhere.
        retry_after_s: when the caller should come back.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class EngineDead(LoramuxError):
    """The engine process is gone; everything in flight is lost."""


def _subclasses(cls: type[LoramuxError]) -> list[type[LoramuxError]]:
    return [cls, *(deeper for sub in cls.__subclasses__() for deeper in _subclasses(sub))]


_BY_NAME: Final[dict[str, type[LoramuxError]]] = {cls.__name__: cls for cls in _subclasses(LoramuxError)}


def from_wire(name: str, message: str, param: str | None) -> LoramuxError:
    """Rebuild an error that was sent as `(class name, message, param)`."""
    return _BY_NAME.get(name, LoramuxError)(message, param=param)
