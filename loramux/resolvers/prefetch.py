"""Fetch several adapters at once: for `loramux fetch`, and for `--lora-modules` when a server starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loramux.engine.errors import LoramuxError
from loramux.resolvers.base import FetchedAdapter, Progress, SourceFetcher
from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.sources import Sources

UriProgress = Callable[[str, Progress], None]


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What became of one address: exactly one of `fetched` and `error` is set."""

    uri: str  # as asked for
    fetched: FetchedAdapter | None = None
    error: LoramuxError | None = None


async def fetch_all(
    sources: SourceFetcher, uris: Iterable[str], progress: UriProgress | None = None
) -> list[FetchResult]:
    """Fetch addresses in parallel; one that fails harms no other.

    Args:
        sources: where they are fetched; limits how many at a time.
        uris: addresses; one that stands twice is fetched once.
        progress: called in the event loop with the address and how far it is.

    Returns:
        One result for each address, in the order given. The caller releases the leases.
    """

    async def one(uri: str) -> FetchResult:
        report = partial(progress, uri) if progress is not None else None
        try:
            return FetchResult(uri, fetched=await sources.fetch(uri, progress=report))
        except LoramuxError as error:
            return FetchResult(uri, error=error)

    return await asyncio.gather(*(one(uri) for uri in uris))


async def fill_store(
    settings: SourceSettings, uris: Iterable[str], progress: UriProgress | None = None
) -> list[FetchResult]:
    """Bring adapters into the local store, for a server that starts later or works offline.

    An interrupted call is continued by the next: nothing is tidied up here. The folders stay in the
    store, but are no longer leased when this returns.

    Raises:
        AdapterUnavailable: the store's folder cannot be used.
    """
    sources = Sources(settings)
    try:
        results = await fetch_all(sources, [from_command_line(uri) for uri in uris], progress)
        for result in results:
            if result.fetched is not None:
                result.fetched.lease.release()
        return results
    finally:
        await sources.aclose()


def from_command_line(text: str) -> str:
    """An address that an operator typed: a folder that exists relative to here is made absolute.

    Never for what a client sends: there, `org/name` must not depend on where the server was started.
    """
    if text.startswith("~") or (":" not in text and not text.startswith("/")):
        path = Path(text).expanduser()
        if text.startswith(("~", "./", "../")) or path.is_dir():
            return str(path.resolve())
    return text
