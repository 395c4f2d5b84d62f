from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loramux.engine.adapters.lanes import LaneSpan, LaneTable
from loramux.engine.adapters.store import AdapterStore


def make(
    lanes: int = 16, *, max_host_bytes: int | None = None, max_host_adapters: int | None = None
) -> AdapterStore:
    return AdapterStore(LaneTable(lanes), max_host_bytes=max_host_bytes, max_host_adapters=max_host_adapters)


def read(store: AdapterStore, digest: str, nbytes: int = 100) -> None:
    store.prefetch(digest)
    assert store.take_jobs().reads == [digest]
    store.host_ready(digest, nbytes)


def place(store: AdapterStore, digest: str) -> LaneSpan:
    read(store, digest)
    store.prefetch(digest)
    ((copied, span),) = store.take_jobs().copies
    assert copied == digest
    store.device_ready(digest)
    return span


def test_adapter_moves_up_one_tier_at_a_time() -> None:
    store = make()
    store.add("a", 8)

    span = place(store, "a")

    assert span == LaneSpan(0, 8, 8)
    assert store.acquire("a") == span
    assert (store.on_host, store.on_device) == (["a"], ["a"])


def test_lanes_are_not_usable_before_they_are_filled() -> None:
    store = make()
    store.add("a", 8)
    read(store, "a")
    store.prefetch("a")

    assert store.acquire("a") is None
    assert not store.is_on_device("a")


def test_each_job_is_handed_out_once() -> None:
    store = make()
    store.add("a", 8)
    store.prefetch("a")
    store.take_jobs()

    store.prefetch("a")

    assert store.take_jobs().reads == []


def test_retired_adapter_lives_until_its_last_lease() -> None:
    store = make()
    store.add("a", 8)
    place(store, "a")
    store.lease("a")
    store.lease("a")

    store.retire("a")
    store.release("a")
    assert not store.is_loaded("a")
    assert store.take_dropped().gone == []

    store.release("a")
    assert store.take_dropped().gone == ["a"]
    assert store.lanes.num_used == 0


def test_adapter_retired_while_it_is_read_goes_when_the_read_ends() -> None:
    store = make()
    store.add("a", 8)
    store.prefetch("a")
    store.take_jobs()

    store.retire("a")
    assert store.take_dropped().gone == []
    store.host_ready("a", 100)

    assert store.take_dropped().gone == ["a"]


def test_retired_adapter_is_revived_by_a_new_load() -> None:
    store = make()
    store.add("a", 8)
    store.lease("a")
    store.retire("a")

    store.add("a", 8)
    store.release("a")

    assert store.is_loaded("a")
    assert store.take_dropped().gone == []


def test_adapter_whose_lanes_cannot_be_filled_gives_them_back() -> None:
    store = make(lanes=8)
    store.add("a", 8)
    read(store, "a")
    store.prefetch("a")
    store.take_jobs()

    store.copy_failed("a")

    assert store.acquire("a") is None
    assert (store.on_host, store.on_device, store.lanes.num_used) == (["a"], [], 0)
    assert place_again(store, "a") == LaneSpan(0, 8, 8)


def place_again(store: AdapterStore, digest: str) -> LaneSpan | None:
    store.prefetch(digest)
    store.take_jobs()
    store.device_ready(digest)
    return store.lanes.span(digest)


def test_host_budget_evicts_the_least_recently_used() -> None:
    store = make(max_host_bytes=250)
    for digest in "abc":
        store.add(digest, 8)
        read(store, digest)

    assert store.take_dropped().from_host == ["a"]
    assert store.on_host == ["b", "c"]
    assert store.is_loaded("a")  # it can come back


def test_leased_and_pinned_adapters_are_spared() -> None:
    store = make(max_host_adapters=1)
    store.add("leased", 8)
    store.lease("leased")
    store.add("pinned", 8, pinned=True)
    store.add("plain", 8)
    for digest in ("leased", "pinned", "plain"):
        read(store, digest)
    store.add("newest", 8)
    read(store, "newest")

    assert store.on_host == ["leased", "pinned", "newest"]


def test_pinned_adapter_keeps_its_lanes() -> None:
    store = make(lanes=8)
    store.add("pinned", 8, pinned=True)
    place(store, "pinned")
    store.add("other", 8)
    read(store, "other")

    assert store.prefetch("other") is False
    assert store.on_device == ["pinned"]


class StoreMachine(RuleBasedStateMachine):
    """Random requests, loads, evictions and unloads; tiers, leases and pins always agree."""

    def __init__(self) -> None:
        super().__init__()
        self.store = make(lanes=24, max_host_bytes=300)
        self.reads: list[str] = []
        self.copies: list[str] = []
        self.running: list[str] = []
        self.waiting: list[str] = []

    digests = st.sampled_from("abcdef")

    @rule(digest=digests, rank=st.integers(1, 16), pinned=st.booleans())
    def load(self, digest: str, rank: int, pinned: bool) -> None:
        self.store.add(digest, rank, pinned=pinned and digest == "a")

    @rule(digest=digests)
    def request(self, digest: str) -> None:
        if self.store.is_loaded(digest):
            self.store.lease(digest)
            self.waiting.append(digest)

    @rule()
    def schedule(self) -> None:
        for digest in list(self.waiting):
            if self.store.acquire(digest):
                self.waiting.remove(digest)
                self.running.append(digest)
            else:
                self.store.prefetch(digest)
        jobs = self.store.take_jobs()
        self.reads += jobs.reads
        self.copies += [digest for digest, _ in jobs.copies]

    @rule(fails=st.booleans())
    def finish_read(self, fails: bool) -> None:
        if self.reads:
            digest = self.reads.pop(0)
            if fails:
                self.store.read_failed(digest)
            else:
                self.store.host_ready(digest, 100)

    @rule(fails=st.booleans())
    def finish_copy(self, fails: bool) -> None:
        if self.copies:
            digest = self.copies.pop(0)
            if fails:
                self.store.copy_failed(digest)
            else:
                self.store.device_ready(digest)

    @rule()
    def end(self) -> None:
        if self.running:
            digest = self.running.pop(0)
            self.store.lanes.unpin(digest)
            self.store.release(digest)

    @rule(digest=digests)
    def unload(self, digest: str) -> None:
        if self.store.is_loaded(digest):
            self.store.retire(digest)
        gone = self.store.take_dropped().gone
        assert not set(gone) & set(self.running + self.waiting)

    @invariant()
    def consistent(self) -> None:
        self.store.check_invariants()
        assert all(self.store.is_on_device(digest) for digest in self.running)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
