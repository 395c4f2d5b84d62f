"""From an address to a verified local folder: `Sources`, the `SourceFetcher` of the server.

The event loop only keeps the book of flights (one an address, however many wait for it). What
blocks runs in this object's own threads, so that a slow source never takes a thread that somebody
else needs.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from loramux.engine.background import step_back
from loramux.engine.errors import AdapterError, AdapterIncompatible, AdapterUnavailable
from loramux.resolvers.base import FetchedAdapter, PinnedSource, ProgressCallback
from loramux.resolvers.cache import SourceRecord, Store, StoreLease, source_key
from loramux.resolvers.download import Tries, download, with_retries
from loramux.resolvers.flight import Flight
from loramux.resolvers.hub_source import HubSource
from loramux.resolvers.listing import Listing, Remote, SourceChanged
from loramux.resolvers.local_source import LocalSource
from loramux.resolvers.s3_source import S3Source
from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.uri import Scheme, SourceUri, parse_uri

_MAX_CHANGES: Final = 3  # how often a source may change under a fetch
_REMOTES: Final[dict[Scheme, Callable[[SourceSettings], Remote]]] = {
    "file": LocalSource,
    "pvc": LocalSource,
    "hf": HubSource,
    "s3": S3Source,
}
_NETWORK: Final[frozenset[Scheme]] = frozenset({"hf", "s3"})


class Sources:
    """Fetches adapters into the local store; see `loramux.resolvers.base.SourceFetcher`.

    Args:
        settings: where adapters may come from, and the limits.

    Raises:
        AdapterUnavailable: the store's folder cannot be used.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings
        self.store = Store(
            settings.store_dir, max_bytes=settings.max_store_bytes, min_free_bytes=settings.min_free_bytes
        )
        self._remotes = _Remotes(settings)
        self._flights: dict[str, Flight] = {}
        self._threads = ThreadPoolExecutor(
            settings.max_parallel_downloads, thread_name_prefix="fetch", initializer=step_back
        )

    async def clean(self) -> None:
        """Remove what dead processes left in the store; once, when a server starts."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self.store.clean)

    def is_stored(self, uri: str) -> bool:
        """True if the store has had an address; for `ResolverContext`. Reads one small file."""
        return self.store.record(source_key(str(parse_uri(uri)))) is not None

    async def fetch(self, uri: str, *, progress: ProgressCallback | None = None) -> FetchedAdapter:
        """Fetch an adapter's files into the local store, or find them there."""
        parsed = parse_uri(uri)
        flight = self._flights.get(str(parsed))
        if flight is None or flight.watch.is_cancelled:
            flight = self._take_off(parsed)
        return await flight.wait(progress)

    async def aclose(self) -> None:
        """Stop downloads, release leases that are still held, close connections."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.watch.cancel()
        await asyncio.to_thread(self._remotes.close)
        await asyncio.gather(*(flight.task for flight in flights), return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self.store.close)

    def _take_off(self, uri: SourceUri) -> Flight:
        flight = Flight(
            lambda flight: _Fetch(self.settings, self.store, self._remotes, uri, flight).run(), self._threads
        )
        key = str(uri)
        self._flights[key] = flight
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: str, flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Remotes:
    """One client for each kind of source, opened in the thread of the first fetch that needs it."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._mutex = threading.Lock()
        self._open: dict[Scheme, Remote] | None = {}  # None = closed

    def get(self, scheme: Scheme) -> Remote:
        """The client of a kind; may import what it is made of.

        Raises:
            AdapterUnavailable: `close` was called.
        """
        with self._mutex:
            if self._open is None:
                raise AdapterUnavailable("the download was cancelled", param="lora_path")
            if scheme not in self._open:
                self._open[scheme] = _REMOTES[scheme](self._settings)
            return self._open[scheme]

    def close(self) -> None:
        """Close every client; a read in progress fails, and none is opened any more."""
        with self._mutex:
            remotes, self._open = self._open, None
        for remote in (remotes or {}).values():
            remote.close()


class _Fetch:
    """One fetch, in a thread."""

    def __init__(
        self, settings: SourceSettings, store: Store, remotes: _Remotes, uri: SourceUri, flight: Flight
    ) -> None:
        self._settings = settings
        self._store = store
        self._remotes = remotes
        self._uri = uri
        self._flight = flight

    def run(self) -> FetchedAdapter:
        """The whole of it."""
        self._flight.watch.check()
        self._flight.report("resolving", 0)
        if self._uri.scheme not in _NETWORK and not self._settings.copy_local:
            return self._in_place()
        found = self._without_asking()
        if found is not None:
            return self._fetched(*found)
        for _ in range(_MAX_CHANGES):
            try:
                return self._fetched(*self._ask())
            except SourceChanged as changed:
                why = changed
                self._flight.watch.pause(self._settings.retry_delay_s)
        raise AdapterUnavailable(f"{self._uri} keeps changing while it is read: {why}", param="lora_path")

    def _in_place(self) -> FetchedAdapter:
        """A folder as it is: its files may change, so nothing is promised about them."""
        local = LocalSource(self._settings)
        listing = local.list(self._uri)
        return FetchedAdapter(
            folder=local.find(self._uri),
            source=listing.source,
            lease=_NoLease(),
            digest=None,
            nbytes=listing.nbytes,
            downloaded_bytes=0,
        )

    def _without_asking(self) -> tuple[SourceRecord, StoreLease] | None:
        """What the store knows of an address that cannot change, or that must not be asked.

        Raises:
            AdapterUnavailable: it must not be asked, and the store does not know it.
        """
        is_cut_off = self._settings.offline and self._uri.scheme in _NETWORK
        if not is_cut_off and not self._uri.is_pinned:
            return None
        found = self._store.find(source_key(str(self._uri)))
        if found is None and is_cut_off:
            raise AdapterUnavailable(
                f"{self._uri} is not in the local store {self._store.folder}, and this server is offline;"
                f" `loramux fetch {self._uri}` with the same store brings it there",
                param="lora_path",
            )
        return found

    def _ask(self) -> tuple[SourceRecord, StoreLease]:
        """What is at the address now, downloaded unless the store has it."""
        tries = Tries(self._uri, self._settings, self._flight.watch)
        remote = self._remotes.get(self._uri.scheme)
        listing = with_retries(lambda: remote.list(self._uri), tries)
        if listing.nbytes > self._settings.max_adapter_bytes:
            raise AdapterIncompatible(
                f"{self._uri} has {listing.nbytes} bytes of adapter files, more than the limit of"
                f" {self._settings.max_adapter_bytes} bytes (--max-adapter-bytes)",
                param="lora_path",
            )
        found = self._stored(listing) or self._download(remote, listing)
        alias = source_key(str(self._uri))
        if listing.fingerprint is not None and self._store.record(alias) != found[0]:
            self._store.remember(alias, found[0])  # a branch, for when the source cannot be asked
        return found

    def _stored(self, listing: Listing) -> tuple[SourceRecord, StoreLease] | None:
        if listing.fingerprint is None:
            return None
        return self._store.find(source_key(listing.source.uri), listing.fingerprint)

    def _download(self, remote: Remote, listing: Listing) -> tuple[SourceRecord, StoreLease]:
        flight = self._flight
        once = os.urandom(16).hex()  # what cannot be told apart later is not continued either
        key = source_key(listing.source.uri, once if listing.fingerprint is None else listing.fingerprint)
        with self._store.partial(key, lambda: flight.watch.is_cancelled) as partial:
            found = self._stored(listing)  # another process may have been faster
            if found is not None:
                return found
            self._store.make_room(listing.nbytes)
            flight.total_bytes = listing.nbytes
            flight.report("downloading", 0)
            try:
                files = download(remote, listing, partial, self._settings, flight.watch)
            except OSError as error:
                _empty(partial)
                raise self._store.error_for(error, listing.nbytes) from error
            except (AdapterError, SourceChanged) as error:
                if listing.fingerprint is None or not isinstance(error, AdapterUnavailable):
                    _empty(partial)  # nothing that a later try could continue
                raise
            flight.report("verifying", listing.nbytes)
            lease = self._store.publish(partial, files)
            record = SourceRecord(
                listing.source.uri, listing.source.revision, lease.digest, listing.fingerprint or ""
            )
            if listing.fingerprint is not None:  # before the next process looks, which waits for `partial`
                self._store.remember(source_key(listing.source.uri), record)
        return record, lease

    def _fetched(self, record: SourceRecord, lease: StoreLease) -> FetchedAdapter:
        return FetchedAdapter(
            folder=lease.folder,
            source=PinnedSource(record.uri, record.revision),
            lease=lease,
            digest=lease.digest,
            nbytes=lease.nbytes,
            downloaded_bytes=self._flight.watch.downloaded_bytes,
        )


class _NoLease:
    """The lease of a folder that is not ours."""

    def release(self) -> None:
        """Nothing to let go."""


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
