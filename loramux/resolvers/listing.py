"""What a source holds at one address, and the door that every kind of source has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.resolvers.base import PinnedSource
from loramux.resolvers.refusal import CONFIG_FILE
from loramux.resolvers.uri import SourceUri

# Only what an inspection reads: no pickles, no code, no optimizer states, no full model beside it.
_WANTED: Final = re.compile(r"adapter_config\.json|adapter[\w.-]*\.safetensors(?:\.index\.json)?", re.ASCII)
_PICKLE: Final = re.compile(r"adapter_model.*\.(?:bin|pt|pth)")
_MAX_FILES: Final = 128


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file at a source. The hashes are what the source says of it, as far as it does."""

    name: str  # a plain name, also in the local store
    size: int  # bytes
    key: str = ""  # how the source itself calls it
    etag: str | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of a git blob: over "blob <size>\\0" and the content
    md5: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one adapter at one revision."""

    source: PinnedSource
    fingerprint: str | None  # differs when any file does; None = may change unseen, so never trust it again
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)


class Remote(Protocol):
    """One kind of source. Its methods block; they are called from threads."""

    def list(self, uri: SourceUri) -> Listing:
        """What is at an address now, pinned.

        Raises:
            Hiccup: worth another try.
            LoramuxError: not so.
        """
        ...

    def read(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes of one file from `start` on; ends early only if the connection does.

        Raises:
            Hiccup: worth another try, from the byte that it came to.
            SourceChanged: the file is no longer the one of the listing.
            LoramuxError: neither.
        """
        ...

    def close(self) -> None:
        """Close connections; a read in progress fails."""
        ...


class Hiccup(Exception):
    """A source failed in a way that often passes; says how, as the end of a sentence."""

    def __init__(self, why: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class SourceChanged(Exception):
    """A file changed after it was listed; the listing must be made again."""


def is_wanted(name: str) -> bool:
    """True for the files that are fetched of an adapter's folder."""
    return _WANTED.fullmatch(name) is not None


def check_names(names: Collection[str], place: object) -> list[str]:
    """Which of the names in a source's folder to fetch.

    Args:
        names: all plain names of files in it.
        place: the folder, for messages.

    Raises:
        AdapterNotFound: no adapter_config.json among them.
        AdapterIncompatible: no safetensors file, or too many.
    """
    if CONFIG_FILE not in names:
        what = f"the folder has no {CONFIG_FILE}" if names else "there is nothing at this address"
        raise AdapterNotFound(f"No adapter found for {place}: {what}", param="lora_path")
    wanted = sorted(name for name in names if is_wanted(name))
    if not any(name.endswith(".safetensors") for name in wanted):
        pickle = next((name for name in sorted(names) if _PICKLE.fullmatch(name)), None)
        hint = f", only {pickle}, a pickle, which is never read; save it as safetensors" if pickle else ""
        raise AdapterIncompatible(f"{place} has no adapter_model.safetensors{hint}", param="lora_path")
    if len(wanted) > _MAX_FILES:
        raise AdapterIncompatible(
            f"{place} has {len(wanted)} adapter files, more than the limit of {_MAX_FILES}",
            param="lora_path",
        )
    return wanted
