"""What happens around the copies into lanes, with a device that cannot take everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

import pytest

from loramux.engine.adapters.lanes import LaneSpan, LaneTable
from loramux.engine.adapters.packed import HostWeights
from loramux.engine.adapters.residency import AdapterResidency
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.adapters.weights import HostAdapter
from loramux.engine.errors import LoramuxError
from loramux.engine.types import AdapterSpec, FreedMemory

TURNS = 1000


class Device:
    """Lanes for two adapters; filling `full` fails, as when memory runs out."""

    def __init__(self) -> None:
        self.full: set[str] = set()
        self.kept: set[str] = set()
        self.failed: list[tuple[str, LoramuxError]] = []
        self.residency = AdapterResidency(
            AdapterStore(LaneTable(16)),
            read=lambda spec: HostAdapter(spec.digest, spec.rank, {}),
            fill=self._fill,
            forget_host=lambda _: None,
            keep_tables=self._keep,
            forget_kv=lambda digest: 0,
            fail_waiting=lambda digest, error: self.failed.append((digest, error)),
        )

    def _fill(self, adapter: HostWeights, span: LaneSpan) -> None:
        if adapter.digest in self.full:
            raise MemoryError("the device is full")

    def _keep(self, residents: Set[str]) -> None:
        self.kept = set(residents)

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(TURNS):
            self.residency.advance()
            if done():
                return
            self.residency.wait(0.1)
        raise AssertionError("nothing happened")

    def load(self, digest: str) -> LoramuxError | None:
        answers: list[LoramuxError | None] = []
        spec = AdapterSpec(digest=digest, path="", rank=8, nbytes=0, modules=[], files=[])
        self.residency.load(spec, answers.append)
        self.until(lambda: bool(answers))
        return answers[0]


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.residency.loader.close()


def test_load_fails_when_its_lanes_cannot_be_filled(device: Device) -> None:
    device.full.add("a")

    error = device.load("a")

    assert error is not None
    assert "the device is full" in error.message
    assert not device.residency.store.is_loaded("a")
    assert device.residency.store.lanes.num_used == 0


def test_return_to_lanes_that_fails_fails_those_who_wait_and_can_be_tried_again(device: Device) -> None:
    store = device.residency.store
    for digest in "abc":
        assert device.load(digest) is None
    away = next(digest for digest in "abc" if not store.is_on_device(digest))
    device.full.add(away)

    store.prefetch(away)
    device.until(lambda: bool(device.failed))
    assert device.failed[0][0] == away
    assert store.is_loaded(away)
    assert not store.is_on_device(away)

    device.full.clear()
    store.prefetch(away)
    device.until(lambda: store.is_on_device(away))


def test_tables_are_kept_for_residents_only(device: Device) -> None:
    store = device.residency.store
    for digest in "abc":
        device.load(digest)
    away = next(digest for digest in "abc" if not store.is_on_device(digest))

    store.prefetch(away)
    device.until(lambda: store.is_on_device(away))
    assert device.kept == set(store.on_device)

    gone: list[FreedMemory] = []
    device.residency.unload(away, gone.append)
    device.until(lambda: bool(gone))
    assert away not in device.kept
