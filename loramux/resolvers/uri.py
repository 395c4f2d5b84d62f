"""The one parser of source addresses. Nothing else takes a URI apart.

    file:///path  /path                         a folder of this machine
    hf://org/repo[/sub][@rev]  huggingface://…  a repository on the Hub, or a folder of it
    org/repo[@rev]                              the same, bare
    s3://bucket[/prefix]                        the objects directly under prefix/
    pvc://claim[/path]                          a folder under the mount root of claims

An address never names an endpoint, a credential or an option: those are the operator's, not the
caller's. So user names, ports, queries and fragments are refused, and with them whatever two parsers
could read differently: backslashes, control characters, empty, `.` and `..` parts.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Final, Literal
from urllib.parse import quote, unquote_to_bytes

from loramux.engine.errors import InvalidRequest
from loramux.resolvers.refusal import shown

Scheme = Literal["file", "hf", "s3", "pvc"]

_MAX_CHARS: Final = 2048
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_SCHEMES: Final[dict[str, Scheme]] = {
    "file": "file",
    "hf": "hf",
    "huggingface": "hf",
    "s3": "s3",
    "pvc": "pvc",
}
# The Hub's own rule for the two halves of an id; "--" and ".." never occur in them.
_HUB_NAME: Final = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,253}[A-Za-z0-9]")
_CLAIM: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")  # a Kubernetes object name
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,254}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, direction marks, line separators


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A parsed address; `str()` gives its canonical form, which parses to the same value."""

    scheme: Scheme
    authority: str = ""  # hf: org/repo; s3: bucket; pvc: claim; file: empty
    path: str = ""  # file: absolute; the others: relative, without slashes at the ends, may be empty
    revision: str | None = None  # hf only: branch, tag or commit as asked for

    def __str__(self) -> str:
        if self.scheme == "file":
            return "file://" + quote(self.path)
        path = f"/{self.path}" if self.path else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{self.authority}{path}{revision}"

    @property
    def is_pinned(self) -> bool:
        """True when it names a commit: what it holds can never change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> SourceUri:
        """The same place at another revision."""
        return replace(self, revision=revision)


def parse_uri(text: str, *, param: str = "lora_path") -> SourceUri:
    """Take an address apart.

    Args:
        text: one of the forms above, as a caller sent it.
        param: the field or flag that it came in, for the error.

    Raises:
        InvalidRequest: anything else; the message says what is wrong with which part.
    """
    try:
        return _parse(text)
    except _Refusal as refusal:
        raise InvalidRequest(f"{param} {shown(text)} {refusal}", param=param) from None


class _Refusal(Exception):
    """What is wrong with an address, as the end of a sentence about it."""


def _parse(text: str) -> SourceUri:
    if not text or len(text) > _MAX_CHARS:
        raise _Refusal(f"must have 1 to {_MAX_CHARS} characters, got {len(text)}")
    _check_characters(text)
    if text.startswith("/"):
        return SourceUri("file", path=_absolute(text))
    match = _SCHEME.fullmatch(text)
    if match is None:
        return _bare(text)
    scheme = _SCHEMES.get(match[1].lower())
    if scheme is None:
        raise _Refusal(f"has the unknown scheme {match[1]!r}; known are {', '.join(_SCHEMES)}")
    if not match[2].startswith("//"):
        raise _Refusal(f"must have // after {match[1]}:")
    rest = match[2][2:]
    if scheme == "file":
        return _file(rest)
    if scheme == "hf":
        return _hub(rest)
    return _bucket_or_claim(scheme, rest)


def _check_characters(text: str) -> None:
    bad = next((char for char in text if char == "\\" or unicodedata.category(char) in _HIDDEN), None)
    if bad is not None:
        raise _Refusal(f"holds the character U+{ord(bad):04X}, which no address may have")


def _bare(text: str) -> SourceUri:
    repo, _, _ = text.partition("@")
    if repo.count("/") == 1 and not repo.startswith((".", "~")):
        return _hub(text)
    raise _Refusal(
        "is neither a URI, an absolute path, nor a Hub id of the form ORGANISATION/NAME;"
        " a folder of a repository is written hf://ORGANISATION/NAME/FOLDER"
    )


def _file(rest: str) -> SourceUri:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise _Refusal("must be of the form file:///absolute/path, without a host")
    if "?" in path or "#" in path:
        raise _Refusal("must have no query and no fragment; write ? as %3F and # as %23")
    try:
        decoded = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise _Refusal("is not UTF-8 once its percent signs are decoded") from None
    _check_characters(decoded)
    return SourceUri("file", path=_absolute("/" + decoded))


def _absolute(path: str) -> str:
    if path.startswith("//"):
        raise _Refusal("must begin with one slash")
    return "/" + _parts(path[1:])


def _hub(rest: str) -> SourceUri:
    address, at, revision = rest.partition("@")
    organisation, _, tail = address.partition("/")
    name, _, sub = tail.partition("/")
    for half in (organisation, name):
        if not _HUB_NAME.fullmatch(half):
            raise _Refusal(f"must name a repository as ORGANISATION/NAME, and {shown(half)} is no such name")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise _Refusal(f"has {shown(revision)} after @, which is no branch, tag or commit")
    _refuse_options(sub)
    return SourceUri("hf", f"{organisation}/{name}", _parts(sub), revision or None)


def _bucket_or_claim(scheme: Scheme, rest: str) -> SourceUri:
    authority, _, path = rest.partition("/")
    rule, what = (_BUCKET, "bucket") if scheme == "s3" else (_CLAIM, "volume claim")
    if not rule.fullmatch(authority) or ".." in authority:
        raise _Refusal(f"must name a {what} after {scheme}://, and {shown(authority)} is no such name")
    _refuse_options(path)
    return SourceUri(scheme, authority, _parts(path))


def _refuse_options(path: str) -> None:
    if "?" in path or "#" in path:
        raise _Refusal("must have no query and no fragment: options of a source are set by the operator")


def _parts(path: str) -> str:
    """The path without one trailing slash; every part of it must be a plain name."""
    path = path.removesuffix("/")
    for part in path.split("/") if path else ():
        if part in ("", ".", ".."):
            raise _Refusal(f"must have no {shown(part)} among the parts of its path")
    return path
