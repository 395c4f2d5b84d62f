"""One load, from what was asked for to the name that stands for it: resolve, fetch, inspect, load, move."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from loramux.engine.background import step_back
from loramux.engine.errors import AdapterIncompatible, InvalidRequest, LoramuxError, ModelNotFound
from loramux.engine.types import AdapterSpec
from loramux.resolvers.base import FetchedAdapter, PinnedSource, Progress, ProgressCallback, SourceFetcher
from loramux.resolvers.chain import ResolverChain
from loramux.resolvers.uri import parse_uri
from loramux.server.adapter_copies import EngineCopies
from loramux.server.adapter_events import AdapterEvents
from loramux.server.adapter_orders import IfLoaded, Loaded, LoadOrder, Outcome
from loramux.server.adapter_upload import SHOWN_SOURCE
from loramux.server.adapters import AdapterState, AdapterTable, Origin
from loramux.server.errors import AdapterConflict, lookup
from loramux.server.journal import Journal, JournalEntry
from loramux.server.observe.adapter_metrics import AdapterMetrics, LoadWatch

logger = logging.getLogger(__name__)

_PARALLEL_INSPECTIONS: Final = 4


class Inspect(Protocol):
    """Checks a fetched folder; called in a thread."""

    def __call__(self, folder: Path) -> AdapterSpec:
        """The adapter in it.

        Raises:
            AdapterError: it cannot be served.
        """
        ...


class BringUp:
    """What every load goes through.

    Args:
        table: the names.
        copies: the engine's side.
        events: where every step is told.
        fetcher: from a source to a folder; None = the engine takes no adapters.
        inspect: from a folder to a spec.
        chain: finds names that nobody loaded; None = nobody does.
        journal: where the changes of clients are written down, if anywhere.
    """

    def __init__(
        self,
        table: AdapterTable,
        copies: EngineCopies,
        events: AdapterEvents,
        fetcher: SourceFetcher | None,
        inspect: Inspect,
        *,
        chain: ResolverChain | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.table = table
        self.copies = copies
        self.events = events
        self.fetcher = fetcher
        self.chain = chain
        self.journal = journal
        self.metrics = AdapterMetrics(0)  # where loads are counted
        self._inspect = inspect
        self._threads = ThreadPoolExecutor(
            _PARALLEL_INSPECTIONS, thread_name_prefix="inspect", initializer=step_back
        )

    async def run(self, order: LoadOrder) -> Loaded:
        """Bring one adapter up; there must be no other load of the same name.

        Raises:
            AdapterConflict: the name stands for other content, and the order does not want to replace it.
            LoramuxError: it cannot be had, or not be served. The name stays what it was.
        """
        watch = LoadWatch(self.metrics)
        try:
            loaded = await self._run(order, watch)
        except BaseException as error:
            if not isinstance(error, ModelNotFound):  # a name that nobody knows is no load
                watch.end("failed")
            raise
        watch.end(loaded.outcome.value)
        return loaded

    async def _run(self, order: LoadOrder, watch: LoadWatch) -> Loaded:
        watch.enter("resolve")
        source = order.source or await self._resolve(order.name)
        watch.found(str(parse_uri(source)), is_upload=order.shown_source == SHOWN_SOURCE)
        shown = order.shown_source or PinnedSource(str(parse_uri(source))).public
        self.table.begin(order.name, shown)
        self.events.moved(order.name, AdapterState.RESOLVING, shown)
        fetched = await self.fetch(source, progress=partial(self._progress, order.name, shown, watch))
        try:
            watch.enter("verify")
            spec = await self.inspect(fetched, order)
            watch.enter(None)
            outcome = self._check_against_current(order, spec)
        except BaseException:
            fetched.lease.release()
            raise
        return await self._move_name(order, fetched, spec, outcome)

    async def fetch(self, source: str, *, progress: ProgressCallback | None = None) -> FetchedAdapter:
        """Bring an adapter's files here.

        Raises:
            InvalidRequest: the server was started without LoRA, or the address is wrong.
            AdapterError: they cannot be had.
        """
        if self.fetcher is None:
            raise InvalidRequest("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        return await self.fetcher.fetch(source, progress=progress)

    async def _resolve(self, name: str) -> str:
        try:
            resolution = await self.chain.resolve(name) if self.chain is not None else None
        except LoramuxError as error:
            self.metrics.resolver_errors.add(lookup(error).code)
            raise
        if resolution is None:
            raise self.table.not_found(name)
        logger.info("adapter %r: resolver %s found %s", name, resolution.resolver, resolution.uri)
        return resolution.uri

    async def inspect(self, fetched: FetchedAdapter, order: LoadOrder) -> AdapterSpec:
        """Check what was fetched, in a thread.

        Raises:
            AdapterIncompatible: it cannot be served, or is not what the order expects.
        """
        self.table.advance(order.name, AdapterState.VERIFYING)
        loop = asyncio.get_running_loop()
        spec = await loop.run_in_executor(self._threads, self._inspect, fetched.folder)
        if order.digest is not None and order.digest != spec.digest:
            raise AdapterIncompatible(
                f"digest must be that of the adapter's content, sha256:{spec.digest}, got"
                f" sha256:{order.digest[:64]}",
                param="digest",
            )
        return spec

    def _check_against_current(self, order: LoadOrder, spec: AdapterSpec) -> Outcome:
        current = self.table.current(order.name)
        if current is None:
            return Outcome.ADDED
        if current.digest == spec.digest:
            return Outcome.UNCHANGED
        if order.if_loaded is IfLoaded.REPLACE:
            return Outcome.REPLACED
        raise AdapterConflict(
            f"The lora adapter '{order.name}' stands for sha256:{current.digest}, and the source holds"
            f" sha256:{spec.digest}; set 'load_inplace' to True to replace it.",
            param="load_inplace",
        )

    async def _move_name(
        self, order: LoadOrder, fetched: FetchedAdapter, spec: AdapterSpec, outcome: Outcome
    ) -> Loaded:
        """The engine loads and tries the new version; then, in one step, the name is moved to it."""
        name, old = order.name, self.table.current(order.name)
        pinned = order.pinned if order.pinned is not None else (old.pinned if old else False)
        parent = order.base_model_name or (old.parent if old else None)
        shown = order.shown_source or fetched.source.public
        self._progress_to(name, AdapterState.LOADING, shown)
        await self.copies.take(spec, fetched.lease, pinned=pinned)
        source, version = fetched.source, _version(order, spec, self.table.next_version(name))
        if old is not None and outcome is Outcome.UNCHANGED:
            source, shown, version = PinnedSource(old.uri, old.revision), old.source, old.version
        try:
            if self.journal is not None and order.origin is Origin.API:
                entry = JournalEntry(
                    name=name,
                    source=source.uri,
                    shown_source=shown,
                    digest=spec.digest,
                    version=version,
                    pinned=pinned,
                    base_model_name=parent,
                )
                await self.journal.record(entry)
            elif self.journal is not None and order.origin is Origin.FILE:
                await self.journal.forget(name)  # the file says it from now on
        except BaseException:
            self.copies.give_back(spec.digest)
            raise
        if old is not None and outcome is Outcome.UNCHANGED:
            self.copies.give_back(spec.digest)
            self.table.settle(name)
            return Loaded(self.table.amend(name, pinned=pinned, origin=order.origin), outcome)
        leases = self.table.leases_of(old) if old else 0
        ref = self.table.publish(
            name,
            spec,
            source=shown,
            base_model_name=parent,
            uri=fetched.source.uri,
            revision=fetched.source.revision,
            pinned=pinned,
            origin=order.origin,
            version=version,
        )
        self.events.ready(ref)
        if old is not None and leases:
            self.events.draining(old, leases)
        return Loaded(ref, outcome)

    def _progress(self, name: str, shown: str, watch: LoadWatch, progress: Progress) -> None:
        watch.progressed(progress.phase)
        state = AdapterState(progress.phase)
        if self.table.advance(name, state, done=progress.done_bytes, total=progress.total_bytes):
            self.events.moved(name, state, shown)

    def _progress_to(self, name: str, state: AdapterState, shown: str) -> None:
        if self.table.advance(name, state):
            self.events.moved(name, state, shown)


def _version(order: LoadOrder, spec: AdapterSpec, following: int) -> int:
    """The number for a new version: no other content may have had it."""
    if order.last is None:
        return following
    version, digest = order.last
    return max(following, version if digest == spec.digest else version + 1)
