"""Adapters that come and go: the manager with a real store and the stand-in engine's process."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from loramux.engine.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterNotFound,
    AdapterUnavailable,
    InvalidRequest,
    LoramuxError,
    ModelNotFound,
)
from loramux.server.adapter_events import AdapterEvent
from loramux.server.adapter_names import AdapterNameRefused
from loramux.server.adapter_orders import IfLoaded, Loaded, LoadOrder, Outcome
from loramux.server.adapters import AdapterLease, AdapterState, Origin
from loramux.server.errors import AdapterConflict, AdapterExists
from tests.adapter_files import llama_sites, write_adapter
from tests.server.adapter_world import World, adapter_world

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_load_passes_through_every_state_and_ends_ready(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        loaded = await world.manager.load(world.order("a", 1))

        assert loaded.outcome is Outcome.ADDED
        assert world.states("a") == ["resolving", "downloading", "verifying", "loading", "ready"]
        assert world.manager.table.lookup("a") == loaded.ref
        assert await world.engine_digests() == {loaded.ref.digest}
        assert loaded.ref.source == "adapter-1"  # not its path


async def test_parallel_loads_of_one_name_are_one_load(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        order = world.order("a", 1)

        loaded = await asyncio.gather(*(world.manager.load(order) for _ in range(8)))

        assert {one.ref.version for one in loaded} == {1}
        assert world.states("a").count("ready") == 1


async def test_a_name_that_is_taken_is_refused_kept_or_replaced_as_the_caller_says(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        first = (await world.manager.load(world.order("a", 1))).ref

        with pytest.raises(AdapterExists, match=r"has already been loaded.*'load_inplace' to True"):
            await world.manager.load(world.order("a", 1))
        with pytest.raises(AdapterConflict, match="load_inplace"):
            await world.manager.load(world.order("a", 2, if_loaded=IfLoaded.KEEP))
        kept = await world.manager.load(world.order("a", 1, if_loaded=IfLoaded.KEEP))
        same = await world.manager.load(world.order("a", 1, if_loaded=IfLoaded.REPLACE))
        replaced = await world.manager.load(world.order("a", 2, if_loaded=IfLoaded.REPLACE))

        assert kept == same == Loaded(first, Outcome.UNCHANGED)
        assert (replaced.outcome, replaced.ref.version) == (Outcome.REPLACED, 2)
        assert replaced.ref.digest != first.digest
        assert replaced.ref.created == first.created


async def test_a_request_keeps_its_version_until_it_ends(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.manager.load(world.order("a", 1))
        lease = await world.manager.lease("a")

        new = (await world.manager.load(world.order("a", 2, if_loaded=IfLoaded.REPLACE))).ref

        assert await world.engine_digests() == {lease.ref.digest, new.digest}
        assert (await world.manager.lease("a")).ref.version == 2
        assert world.states("a")[-1] == "draining"
        lease.release()
        lease.release()  # a second time does nothing
        await until_told(world, "a", "gone")
        assert await world.engine_digests() == {new.digest}


async def test_an_unload_refuses_new_requests_at_once_and_frees_with_the_last_one(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.manager.load(world.order("a", 1))
        lease = await world.manager.lease("a")

        unloaded = await world.manager.unload("a")

        assert (unloaded.is_gone, unloaded.leases, unloaded.freed) == (False, 1, None)
        with pytest.raises(ModelNotFound):
            await world.manager.lease("a")
        row = world.manager.table.row("a")
        assert row is not None
        assert row.state is AdapterState.DRAINING
        waiting = asyncio.create_task(world.manager.unload("a"))
        with pytest.raises(AdapterNotFound, match="The lora adapter 'a' cannot be found"):
            await waiting
        lease.release()
        gone = await until_told(world, "a", "gone")
        assert gone.freed is not None
        assert gone.freed.host_bytes == lease.ref.spec.nbytes
        assert await world.engine_digests() == set()
        assert world.manager.table.row("a") is None


async def test_an_unload_can_wait_for_the_last_request(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.manager.load(world.order("a", 1))
        lease = await world.manager.lease("a")
        unloading = asyncio.create_task(world.manager.unload("a", drain_timeout_s=60))
        await until_told(world, "a", "draining")

        lease.release()

        assert (await unloading).is_gone


async def test_a_version_number_is_never_used_twice(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.manager.load(world.order("a", 1))
        await world.manager.unload("a")

        again = await world.manager.load(world.order("a", 2))

        assert again.ref.version == 2


async def test_two_names_with_one_content_share_one_copy(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        other = write_adapter(tmp_path / "other folder", llama_sites(), seed=1)
        a = await world.manager.load(world.order("a", 1))
        b = await world.manager.load(LoadOrder(name="b", source=str(other)))
        assert a.ref.digest == b.ref.digest

        first = await world.manager.unload("a")
        digests = await world.engine_digests()
        second = await world.manager.unload("b")

        assert digests == {b.ref.digest}
        assert (first.freed, first.shared_with) == (None, ("b",))
        assert second.freed is not None
        assert await world.engine_digests() == set()


async def test_a_load_that_fails_leaves_the_name_as_it_was(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        ref = (await world.manager.load(world.order("a", 1))).ref
        bad = world.order("a", 2, if_loaded=IfLoaded.REPLACE)
        (tmp_path / "adapter-2" / "adapter_config.json").write_text("{")

        with pytest.raises(AdapterIncompatible, match=r"Loading lora a failed: .*not valid JSON"):
            await world.manager.load(bad)

        row = world.manager.table.row("a")
        assert row is not None
        assert row.state is AdapterState.READY
        assert row.failure is not None
        assert row.failure.code == "adapter_incompatible"
        assert world.manager.table.lookup("a") == ref
        assert world.states("a")[-1] == "failed"


async def test_an_adapter_that_the_engine_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        order = world.order("a", 1, if_loaded=IfLoaded.KEEP)
        world.adapter(1, base_model_name_or_path="!refuse")

        with pytest.raises(AdapterIncompatible, match="refused"):
            await world.manager.load(order)

        assert world.manager.table.all() == []
        assert len(world.manager.bring_up.copies) == 0
        world.adapter(1)
        assert (await world.manager.load(order)).outcome is Outcome.ADDED


async def test_an_unload_stops_a_load_that_is_under_way(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        order = world.order("a", 1)
        world.adapter(1, base_model_name_or_path="!stuck")
        loading = asyncio.create_task(world.manager.load(order))
        await until_told(world, "a", "loading")

        unloaded = await world.manager.unload("a")

        assert unloaded.ref is None
        with pytest.raises(AdapterNotFound, match="was unloaded while it was loading"):
            await loading
        assert world.manager.table.row("a") is None
        while len(world.manager.bring_up.copies):
            await asyncio.sleep(0)
        assert await world.engine_digests() == set()


async def test_a_caller_who_gives_up_does_not_stop_the_load(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        loading = asyncio.create_task(world.manager.load(world.order("a", 1)))
        await until_told(world, "a", "resolving")
        loading.cancel()

        assert (await world.manager.lease("a")).ref.version == 1


async def test_a_request_waits_for_a_load_but_not_for_ever(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, load_timeout_s=0.05) as world:
        order = world.order("a", 1)
        world.adapter(1, base_model_name_or_path="!stuck")
        loading = asyncio.create_task(world.manager.load(order))
        await until_told(world, "a", "resolving")

        with pytest.raises(AdapterUnavailable, match="--adapter-load-timeout"):
            await world.manager.lease("a")

        assert not loading.done()
        loading.cancel()


@pytest.mark.parametrize("name", ["", "tiny", "alias", "a/../b", "a\nb", "x" * 257])
async def test_a_name_that_no_adapter_may_have_is_refused(tmp_path: Path, name: str) -> None:
    async with adapter_world(tmp_path) as world:
        with pytest.raises(AdapterNameRefused):
            await world.manager.load(world.order(name, 1))

        assert world.told == []


async def test_an_address_that_is_none_is_refused_before_anything_is_told(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        with pytest.raises(InvalidRequest, match="unknown scheme"):
            await world.manager.load(LoadOrder(name="a", source="gopher://a/b"))

        assert world.told == []


async def test_content_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        ref = (await world.manager.load(world.order("a", 1))).ref

        with pytest.raises(AdapterIncompatible, match="digest must be"):
            await world.manager.load(world.order("b", 2, digest=ref.digest))
        same = await world.manager.load(world.order("b", 1, digest=ref.digest))

        assert same.outcome is Outcome.ADDED


async def test_names_that_failed_are_shown_but_not_without_end(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        for number in range(300):
            with pytest.raises(AdapterError):
                await world.manager.load(LoadOrder(name=f"a{number}", source=str(tmp_path / "none")))

        rows = list(world.manager.table.rows())
        assert len(rows) == 256
        assert all(row.state is AdapterState.FAILED for row in rows)
        assert world.manager.table.all() == []


# Resolvers


def resolver_environ(tmp_path: Path) -> dict[str, str]:
    return {"LORAMUX_LORA_RESOLVER_CACHE_DIR": str(tmp_path)}


async def test_parallel_first_requests_resolve_and_load_once(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, environ=resolver_environ(tmp_path)) as world:
        world.adapter(1)

        leases = await asyncio.gather(*(world.manager.lease("adapter-1") for _ in range(16)))

        assert {lease.ref.version for lease in leases} == {1}
        assert leases[0].ref.origin is Origin.RESOLVER
        assert world.states("adapter-1").count("ready") == 1
        assert world.manager.table.leases_of(leases[0].ref) == 16


async def test_a_name_that_no_resolver_knows_leaves_no_trace(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, environ=resolver_environ(tmp_path)) as world:
        for name in ("nobody", "../adapter-1", "a" * 256):
            with pytest.raises(ModelNotFound, match="does not exist"):
                await world.manager.lease(name)

        assert list(world.manager.table.rows()) == []
        assert world.told == []


async def test_a_reserved_name_is_not_looked_for(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, environ=resolver_environ(tmp_path)) as world:
        write_adapter(tmp_path / "events", llama_sites())

        with pytest.raises(ModelNotFound, match="does not exist"):
            await world.manager.lease("events")

        assert list(world.manager.table.rows()) == []
        assert world.told == []


async def test_a_found_adapter_that_cannot_be_served_is_not_read_again_at_once(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, environ=resolver_environ(tmp_path)) as world:
        folder = Path(world.adapter(1, rank=300))

        for _ in range(3):
            with pytest.raises(AdapterIncompatible, match="rank 300"):
                await world.manager.lease(folder.name)

        assert world.states(folder.name).count("failed") == 1
        good = write_adapter(tmp_path / "good", llama_sites())
        assert (await world.manager.load(LoadOrder(name=folder.name, source=str(good)))).ref.version == 1


# The journal


async def test_the_journal_brings_back_what_clients_loaded(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with adapter_world(tmp_path, state_dir=state) as world:
        a = (await world.manager.load(world.order("a", 1, pinned=True))).ref
        await world.manager.load(world.order("b", 2))
        await world.manager.load(world.order("b", 3, if_loaded=IfLoaded.REPLACE))
        await world.manager.load(world.order("c", 3))
        await world.manager.load(world.order("from a flag", 4, origin=Origin.FLAG))
        await world.manager.unload("c")

    async with adapter_world(tmp_path, state_dir=state) as world:
        journal = world.manager.journal
        assert journal is not None
        assert sorted(journal.entries) == ["a", "b"]
        assert (journal.entries["b"].version, journal.entries["a"].pinned) == (2, True)
        assert journal.entries["a"].digest == a.digest
    assert {path.name for path in state.iterdir()} == {"adapters.json", "lock"}


async def until_told(world: World, name: str, state: str) -> AdapterEvent:
    """The event of a state, when it comes."""
    while state not in world.states(name):
        await asyncio.sleep(0.001)
    return next(event for event in reversed(world.told) if (event.name, event.state) == (name, state))


async def test_the_adapters_file_wins_over_the_journal(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with adapter_world(tmp_path, state_dir=state) as world:
        await world.manager.load(world.order("a", 1))
        await world.manager.load(world.order("a", 2, if_loaded=IfLoaded.REPLACE, origin=Origin.FILE))

        assert world.manager.journal is not None
        assert world.manager.journal.entries == {}


# Churn


async def test_whatever_happens_the_engine_holds_what_is_used_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(5)
    leases: list[AdapterLease] = []
    async with adapter_world(tmp_path) as world:
        orders = [world.order(name, seed, if_loaded=IfLoaded.REPLACE) for name in "abc" for seed in range(4)]

        async def act() -> None:
            match rng.choice(["load", "load", "unload", "lease", "lease", "release"]):
                case "load":
                    await world.manager.load(rng.choice(orders))
                case "unload":
                    await world.manager.unload(rng.choice("abc"))
                case "lease":
                    lease = await world.manager.lease(rng.choice("abc"))
                    assert lease.ref.digest in await world.engine_digests()
                    leases.append(lease)
                case "release" if leases:
                    leases.pop(rng.randrange(len(leases))).release()

        for _ in range(60):
            results = await asyncio.gather(*(act() for _ in range(5)), return_exceptions=True)
            errors = [one for one in results if isinstance(one, BaseException)]
            assert all(isinstance(error, LoramuxError) for error in errors), errors
        while world.manager.num_under_way():
            await asyncio.sleep(0.001)
        used = {lease.ref.digest for lease in leases} | {ref.digest for ref in world.manager.table.all()}
        assert await world.engine_digests() == used
        for lease in leases:
            lease.release()
        for ref in world.manager.table.all():
            await world.manager.unload(ref.name)
        while world.manager.num_under_way():
            await asyncio.sleep(0.001)

        assert await world.engine_digests() == set()
        assert len(world.manager.bring_up.copies) == 0
        assert list(world.manager.table.rows()) == []
    sessions = list((tmp_path / "store" / "sessions").iterdir())
    assert sessions == []
    shutil.rmtree(tmp_path / "store")
