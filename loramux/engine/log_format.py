"""How both processes write log lines: text for people, or one JSON object a line for machines.

Names and paths come from clients. Whatever could end a line, move a cursor or turn text around is written as
an escape, in messages as well as in fields, so that nobody can forge a line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from types import TracebackType
from typing import Any, Final

FORMATS: Final = ("text", "json")

_logger: Final = logging.getLogger("loramux")
_console: Final = logging.getLogger("loramux.console")
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_PLAIN: Final = re.compile(r"[\w.:/@+%~,-]+", re.ASCII)
_INDENT: Final = "\n    | "


def set_up(level: int, log_format: str, *, process: str = "") -> None:
    """Write what the process logs to stderr.

    Args:
        level: of the root logger.
        log_format: one of FORMATS.
        process: a name for this process that is added to every line; "" = none.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    _console.setLevel(logging.INFO)
    _console.propagate = log_format == "json"
    if log_format == "text" and not _console.handlers:
        plain = logging.StreamHandler(sys.stderr)
        plain.setFormatter(logging.Formatter("loramux: %(message)s"))
        _console.addHandler(plain)


def say(line: str) -> None:
    """A line for the person who started the process, whatever the log level."""
    _console.info("%s", escape(line))


def escape(text: str) -> str:
    """The same text with every character that is not printable written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a record carries beside its message (`extra=`), but nothing that is None."""
    return {name: value for name, value in vars(record).items() if name not in _OWN and value is not None}


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123 INFO loramux.request: message name=value ...`

    Lines of a traceback begin with a bar, so that none of them looks like a line of its own.
    """

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = f"{process} " if process else ""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and those of its traceback."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{moment}.{int(record.msecs):03d} {record.levelname} {self._process}{record.name}:"
        fields = "".join(f" {name}={_shown(value)}" for name, value in fields_of(record).items())
        line = f"{head} {escape(record.getMessage())}{fields}"
        trace = _traceback(self, record)
        return line + "".join(_INDENT + escape(part) for part in trace.splitlines()) if trace else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, the fields, exception."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._process,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if trace := _traceback(self, record):
            entry["exception"] = trace
        return json.dumps(entry, default=str)  # plain ASCII


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What ends the process is a log line as well."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    _logger.critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _shown(value: object) -> str:
    """A field's value: plain words as they are, everything else in quotes."""
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    return value if _PLAIN.fullmatch(value) else json.dumps(escape(value), ensure_ascii=False)


def _escaped(char: str) -> str:
    number = ord(char)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
