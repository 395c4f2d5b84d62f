"""The local store: whole or absent, within its budget, and shared without harm."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from loramux.engine.errors import AdapterUnavailable
from loramux.resolvers.cache import SourceRecord, Store, StoredFile, StoreLease, content_key, source_key
from tests.resolvers.remote_adapters import contents, left_behind


def never() -> bool:
    return False


def store_adapter(store: Store, name: str, size: int = 100) -> StoreLease:
    """Publish one file whose content depends on `name`."""
    data = name.encode() * size
    data = data[:size]
    with store.partial(source_key(name), never) as partial:
        (partial / "adapter_config.json").write_bytes(data)
        file = StoredFile("adapter_config.json", size, hashlib.sha256(data).hexdigest())
        return store.publish(partial, [file])


def digests(store: Store) -> set[str]:
    return {path.name for path in (store.folder / "cache").iterdir()}


def test_the_digest_tells_names_and_contents_apart() -> None:
    one, two = StoredFile("a", 1, "x"), StoredFile("b", 1, "y")

    assert content_key([one, two]) == content_key([two, one])
    assert len({content_key([one]), content_key([two]), content_key([StoredFile("a", 1, "y")])}) == 3


def test_places_with_similar_names_never_share_a_key() -> None:
    assert source_key("s3://b/x") != source_key("s3://b_x")
    assert source_key("a", "b") != source_key("ab") != source_key("a\0b", "")


def test_the_least_recently_used_goes_first_and_leased_ones_stay(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=300)
    leases = [store_adapter(store, name) for name in "abc"]
    for lease in leases:
        lease.release()
    for number, lease in enumerate(leases):
        os.utime(lease.folder, (number, number))
    used_again = store.lease(leases[0].digest)
    assert used_again is not None

    store.make_room(150)

    assert digests(store) == {leases[0].digest}
    assert used_again.folder.exists()
    with pytest.raises(AdapterUnavailable, match="--max-store-bytes"):
        store.make_room(250)
    used_again.release()
    store.make_room(250)
    assert digests(store) == set()
    assert left_behind(tmp_path) == []
    store.close()


def test_what_another_process_leases_is_spared_until_it_ends(tmp_path: Path) -> None:
    ours, theirs = Store(tmp_path, max_bytes=150), Store(tmp_path, max_bytes=150)
    lease = store_adapter(theirs, "a")

    with pytest.raises(AdapterUnavailable):
        ours.make_room(100)
    assert lease.folder.exists()

    theirs.close()
    ours.make_room(100)
    assert digests(ours) == set()
    ours.close()


def test_a_full_disk_is_named_with_its_free_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path, min_free_bytes=1 << 60)
    store_adapter(store, "a").release()

    with pytest.raises(AdapterUnavailable) as caught:
        store.make_room(5)

    assert str(tmp_path) in caught.value.message
    assert "bytes are free" in caught.value.message
    assert digests(store) == set()  # what nobody needs was given up first
    store.close()


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(AdapterUnavailable, match="cannot be used"):
        Store(tmp_path / "file" / "store")


def test_a_damaged_folder_is_not_given_out_and_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lease = store_adapter(store, "a")
    store.remember("key", SourceRecord("hf://a/b@c", "c", lease.digest))
    lease.release()
    path = lease.folder / "adapter_config.json"
    path.chmod(0o644)
    path.write_bytes(b"cut off")

    assert store.find("key") is None
    again = store_adapter(store, "a")

    assert again.digest == lease.digest
    assert contents(again.folder)["adapter_config.json"] == b"a" * 100
    assert store.find("key") is not None
    store.close()


def test_a_record_holds_only_for_what_it_was_made_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lease = store_adapter(store, "a")
    store.remember("key", SourceRecord("s3://b/a", "etag", lease.digest, "etag"))

    assert store.find("key", "etag") is not None
    assert store.find("key", "another etag") is None
    assert store.find("key") is not None
    (tmp_path / "sources" / "key.json").write_bytes(b"{torn")
    assert store.find("key") is None
    store.close()


def test_stored_files_are_read_only(tmp_path: Path) -> None:
    store = Store(tmp_path)

    lease = store_adapter(store, "a")

    assert all(path.stat().st_mode & 0o222 == 0 for path in lease.folder.glob("adapter*"))
    store.close()


def test_cleaning_spares_who_lives_and_removes_what_the_dead_left(tmp_path: Path) -> None:
    theirs = Store(tmp_path)
    lease = store_adapter(theirs, "leased")
    ours = Store(tmp_path)
    dead = tmp_path / "sessions" / "dead"
    dead.mkdir()
    (dead / lease.digest).touch()
    abandoned = tmp_path / "partial" / "abandoned"
    abandoned.mkdir()
    (abandoned / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "partial" / "abandoned.lock").touch()
    (tmp_path / "trash" / "x").mkdir()
    ours.remember("gone", SourceRecord("hf://a/b@c", "c", "0" * 64))

    with theirs.partial("running", never) as running:
        (running / "adapter_model.safetensors").write_bytes(b"half")
        ours.clean()

        assert (running / "adapter_model.safetensors").exists()
    assert not dead.exists()
    assert not abandoned.exists()
    assert list((tmp_path / "trash").iterdir()) == []
    assert ours.record("gone") is None
    assert lease.folder.exists()
    theirs.close()
    ours.clean()
    assert left_behind(tmp_path) == []
    assert len(list((tmp_path / "sessions").iterdir())) == 1
    ours.close()


def test_one_download_at_a_time_for_one_place(tmp_path: Path) -> None:
    store, other = Store(tmp_path), Store(tmp_path)
    waits, done = threading.Event(), threading.Event()

    def second() -> None:
        waits.set()
        with other.partial("key", never) as partial:
            assert (partial / "beginning").read_bytes() == b"half"  # continues what the first left
            done.set()

    thread = threading.Thread(target=second)
    with store.partial("key", never) as partial:
        thread.start()
        waits.wait()
        (partial / "beginning").write_bytes(b"half")
        assert not done.is_set()
    thread.join()

    assert done.is_set()
    store.close()
    other.close()


def test_waiting_for_another_download_can_be_given_up(tmp_path: Path) -> None:
    store, other = Store(tmp_path), Store(tmp_path)

    with (
        store.partial("key", never),
        pytest.raises(AdapterUnavailable, match="cancelled"),
        other.partial("key", lambda: True),
    ):
        pass  # not reached

    store.close()
    other.close()


def test_many_threads_that_lease_and_evict_never_lose_a_leased_folder(tmp_path: Path) -> None:
    stores = [Store(tmp_path, max_bytes=350) for _ in range(2)]
    problems: list[str] = []

    def churn(number: int) -> None:
        store = stores[number % 2]
        for step in range(25):
            try:
                store.make_room(100)
                lease = store_adapter(store, "abcdef"[(number + step) % 6])
            except AdapterUnavailable:
                continue  # all of the others are leased: as it should be
            if contents(lease.folder).keys() != {"adapter_config.json"}:
                problems.append(lease.digest)
            lease.release()

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert problems == []
    assert left_behind(tmp_path) == []
    assert all(not store._leases for store in stores)
    for store in stores:
        store.close()
    assert list((tmp_path / "sessions").iterdir()) == []
