"""Adapters of one engine: the store's decisions carried out by the loader and the runner.

`AdapterStore` decides who is where; `AdapterLoader` does the slow part in its thread; this class
holds the weights in between and answers those who wait: a load when its adapter is on the host (and
was tried in lanes, when some were free), an unload when the last sequence is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.loader import AdapterLoader, Finished, JobKind
from loramux.engine.adapters.packed import HostWeights
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.errors import LoramuxError
from loramux.engine.tally import Tally
from loramux.engine.types import MOVE_S_BOUNDS, AdapterSpec, FreedMemory

OnLoaded = Callable[[LoramuxError | None], None]
OnGone = Callable[[FreedMemory], None]


@dataclass(slots=True)
class _Known:
    spec: AdapterSpec
    host: HostWeights | None = None
    on_loaded: list[OnLoaded] = field(default_factory=list)
    on_gone: list[OnGone] = field(default_factory=list)
    was_loaded: bool = False


class AdapterResidency:
    """Loads, tiers and unloads the adapters of one engine."""

    def __init__(
        self,
        store: AdapterStore,
        *,
        read: Callable[[AdapterSpec], HostWeights],
        fill: Callable[[HostWeights, LaneSpan], None],
        forget_host: Callable[[str], None],
        keep_tables: Callable[[Set[str]], None],
        forget_kv: Callable[[str], int],
        fail_waiting: Callable[[str, LoramuxError], None],
    ) -> None:
        """Args:
        read: files → host weights; called in the loader's thread.
        fill: host weights → lanes; called in the loader's thread.
        forget_host: called when an adapter's host weights are freed.
        keep_tables: free what adapters other than these hold on the device beside their lanes.
        forget_kv: drop an adapter's cached KV, returns the number of blocks.
        fail_waiting: end the waiting sequences of an adapter that cannot be had.
        """
        self.store = store
        self._read = read
        self._fill = fill
        self._forget_host = forget_host
        self._keep_tables = keep_tables
        self._forget_kv = forget_kv
        self._fail_waiting = fail_waiting
        self._known: dict[str, _Known] = {}
        self.loader = AdapterLoader()  # its thread ends with `loader.close`
        self.wake_fd = self.loader.wake_fd
        self.host_load_s = Tally(MOVE_S_BOUNDS)
        self.device_load_s = Tally(MOVE_S_BOUNDS)

    def load(self, spec: AdapterSpec, on_loaded: OnLoaded, *, pinned: bool = False) -> None:
        """Make an adapter usable; `on_loaded` is called with None, or with the reason why not."""
        self._drop()  # so that a former life of the same content is over before this one begins
        known = self._known.setdefault(spec.digest, _Known(spec))
        for on_gone in known.on_gone:  # it was retiring, and is taken up again: nothing is freed
            on_gone(FreedMemory(lanes=0, host_bytes=0, kv_blocks=0))
        known.on_gone.clear()
        if known.host is None:
            known.spec = spec  # the newest place to read the same content from
        self.store.add(spec.digest, spec.rank, pinned=pinned)
        known.on_loaded.append(on_loaded)
        self._try_device(spec.digest)
        self._answer_if_loaded(spec.digest, known)

    def restore(self, spec: AdapterSpec) -> None:
        """Know an adapter that was proven before, as if it had been evicted since."""
        known = self._known.setdefault(spec.digest, _Known(spec))
        known.was_loaded = True
        self.store.add(spec.digest, spec.rank)

    def unload(self, digest: str, on_gone: OnGone) -> None:
        """Refuse new requests at once; `on_gone` is called when the last sequence has ended."""
        self._known[digest].on_gone.append(on_gone)
        self.store.retire(digest)

    def advance(self) -> None:
        """Take in what the loader finished, drop what left, and `hand_out`.

        Called once a step; costs next to nothing when nothing moves.
        """
        for finished in self.loader.finished():
            self._finish(finished)
        self.hand_out()

    def hand_out(self) -> None:
        """Give the loader what the store wants next; also called as soon as a step is launched, so that what
        the scheduler asked for is on its way while the step runs."""
        jobs = self.store.take_jobs()
        for digest in jobs.reads:
            self.loader.submit(JobKind.READ, digest, partial(self._read, self._known[digest].spec))
        for digest, span in jobs.copies:
            host = self._known[digest].host
            assert host is not None
            self.loader.submit(JobKind.COPY, digest, partial(self._copy, host, span))
        if self._drop() or jobs.copies:  # somebody may have lost its lanes
            self._keep_tables(set(self.store.lanes.residents))

    def wait(self, timeout_s: float) -> None:
        """Sleep until the loader has finished something."""
        self.loader.wait(timeout_s)

    def _copy(self, host: HostWeights, span: LaneSpan) -> HostWeights:
        self._fill(host, span)
        return host

    def _finish(self, finished: Finished) -> None:
        digest, result = finished.digest, finished.result
        known = self._known[digest]
        if isinstance(result, LoramuxError):
            self._fail(finished.kind, digest, known, result)
            return
        if finished.kind is JobKind.COPY:
            self.device_load_s.add(finished.seconds)
            self.store.device_ready(digest)
        else:
            self.host_load_s.add(finished.seconds)
            known.host = result
            self.store.host_ready(digest, result.nbytes)
            if known.on_loaded and self.store.is_loaded(digest):
                self._try_device(digest)
        self._answer_if_loaded(digest, known)

    def _try_device(self, digest: str) -> None:
        """Into lanes, if some are free, before anybody relies on it; nobody's lanes are taken for that."""
        self.store.prefetch(digest, keep=set(self.store.lanes.residents))

    def _answer_if_loaded(self, digest: str, known: _Known) -> None:
        """Once it is in lanes, or on the host when no lanes were free for it."""
        if not known.on_loaded or not self.store.is_known(digest):
            return
        waits_for_lanes = self.store.lanes.span(digest) is not None  # being filled, unless it is there
        if self.store.is_on_device(digest) or (known.host is not None and not waits_for_lanes):
            known.was_loaded = True
            waiting, known.on_loaded = known.on_loaded, []
            for on_loaded in waiting:
                on_loaded(None)

    def _fail(self, kind: JobKind, digest: str, known: _Known, error: LoramuxError) -> None:
        """A first load that failed is undone, a return from below fails those who wait for it."""
        if kind is JobKind.READ:
            self.store.read_failed(digest)
        else:
            self.store.copy_failed(digest)
        self._fail_waiting(digest, error)
        waiting, known.on_loaded = known.on_loaded, []
        if not known.was_loaded and self.store.is_known(digest):
            self.store.retire(digest)
        for on_loaded in waiting:
            on_loaded(error)

    def _drop(self) -> bool:
        """True if an adapter is gone."""
        dropped = self.store.take_dropped()
        for digest in dropped.from_host:
            known = self._known[digest]
            host_bytes = known.host.nbytes if known.host else 0
            known.host = None
            self._forget_host(digest)
            if digest not in dropped.gone:
                continue
            del self._known[digest]
            freed = FreedMemory(
                lanes=self.store.lanes.lanes_for(known.spec.rank),
                host_bytes=host_bytes,
                kv_blocks=self._forget_kv(digest),
            )
            for on_gone in known.on_gone:
                on_gone(freed)
        return bool(dropped.gone)
