"""Adapters in folders of this machine: contained, copied, and never half old and half new."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loramux.engine.errors import AdapterIncompatible, AdapterNotFound, InvalidRequest
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import write_adapter
from tests.resolvers.remote_adapters import SITES, WEIGHTS, OpenSources, contents, left_behind

pytestmark = pytest.mark.anyio


async def test_a_folder_is_copied_and_can_be_inspected_there(
    tmp_path: Path, open_sources: OpenSources
) -> None:
    folder = write_adapter(tmp_path / "a", SITES)
    (folder / "optimizer.pt").write_bytes(b"not wanted")
    sources = open_sources(allowed_local_paths=(tmp_path,))

    fetched = await sources.fetch(str(folder))

    assert fetched.source.uri == f"file://{folder}"
    assert fetched.source.public == "a"
    assert fetched.source.revision is None
    assert fetched.folder.is_relative_to(tmp_path / "store")
    assert contents(fetched.folder) == {
        name: data for name, data in contents(folder).items() if "opt" not in name
    }
    copied, original = (inspect_adapter(path, SITES, max_lora_rank=64) for path in (fetched.folder, folder))
    assert copied.digest == original.digest
    assert fetched.nbytes == sum(len(data) for data in contents(fetched.folder).values())


async def test_rewriting_a_folder_in_place_does_not_reach_the_copy(
    tmp_path: Path, open_sources: OpenSources
) -> None:
    folder = write_adapter(tmp_path / "a", SITES, seed=1)
    sources = open_sources(allowed_local_paths=(tmp_path,))
    first = await sources.fetch(str(folder))
    before = contents(first.folder)

    write_adapter(folder, SITES, seed=2)
    second = await sources.fetch(str(folder))

    assert contents(first.folder) == before
    assert contents(second.folder) == contents(folder) != before
    assert second.digest != first.digest


async def test_two_folders_with_the_same_content_are_stored_once(
    tmp_path: Path, open_sources: OpenSources
) -> None:
    sources = open_sources(allowed_local_paths=(tmp_path,))

    one = await sources.fetch(str(write_adapter(tmp_path / "one", SITES)))
    two = await sources.fetch(str(write_adapter(tmp_path / "two", SITES)))

    assert one.folder == two.folder
    assert len(list((tmp_path / "store" / "cache").iterdir())) == 1


async def test_copying_can_be_turned_off(tmp_path: Path, open_sources: OpenSources) -> None:
    folder = write_adapter(tmp_path / "a", SITES)
    sources = open_sources(allowed_local_paths=(tmp_path,), copy_local=False)

    fetched = await sources.fetch(f"file://{folder}")

    assert fetched.folder == folder
    assert fetched.digest is None
    fetched.lease.release()


@pytest.mark.parametrize("path", ["outside", "link", "missing_outside"])
async def test_nothing_outside_of_the_roots_is_read_or_told_about(
    tmp_path: Path, open_sources: OpenSources, path: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    outside = write_adapter(tmp_path / "outside", SITES)
    (root / "link").symlink_to(outside)
    sources = open_sources(allowed_local_paths=(root,))

    with pytest.raises(InvalidRequest, match="--allowed-local-path") as caught:
        await sources.fetch(str(root / path if path == "link" else tmp_path / path))

    assert caught.value.param == "lora_path"


async def test_a_file_that_links_out_of_the_folder_is_refused(
    tmp_path: Path, open_sources: OpenSources
) -> None:
    folder = write_adapter(tmp_path / "a", SITES)
    secret = tmp_path / "secret"
    (folder / WEIGHTS).rename(secret)
    (folder / WEIGHTS).symlink_to(secret)

    with pytest.raises(AdapterIncompatible, match="link"):
        await open_sources(allowed_local_paths=(tmp_path,)).fetch(str(folder))

    assert left_behind(tmp_path / "store") == []


async def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path, open_sources: OpenSources) -> None:
    folder = write_adapter(tmp_path / "a", SITES)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)

    with pytest.raises(AdapterIncompatible, match="not a regular file"):
        await open_sources(allowed_local_paths=(tmp_path,)).fetch(str(folder))


async def test_what_is_missing_is_not_found(tmp_path: Path, open_sources: OpenSources) -> None:
    sources = open_sources(allowed_local_paths=(tmp_path,))
    (tmp_path / "empty").mkdir()

    for path, reason in (("nothing", "no such folder"), ("empty", "no adapter_config.json")):
        with pytest.raises(AdapterNotFound, match=f"No adapter found for .*{reason}"):
            await sources.fetch(str(tmp_path / path))


async def test_pickles_are_named_and_refused(tmp_path: Path, open_sources: OpenSources) -> None:
    folder = write_adapter(tmp_path / "a", SITES)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")

    with pytest.raises(AdapterIncompatible, match=r"adapter_model\.bin, a pickle"):
        await open_sources(allowed_local_paths=(tmp_path,)).fetch(str(folder))


async def test_an_adapter_over_the_size_limit_is_refused_before_it_is_read(
    tmp_path: Path, open_sources: OpenSources
) -> None:
    folder = write_adapter(tmp_path / "a", SITES)
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)  # a sparse terabyte: reading it would take an hour

    with pytest.raises(AdapterIncompatible, match="--max-adapter-bytes"):
        await open_sources(allowed_local_paths=(tmp_path,)).fetch(str(folder))


async def test_a_claim_is_a_folder_under_its_mount_root(tmp_path: Path, open_sources: OpenSources) -> None:
    write_adapter(tmp_path / "mnt" / "claim-1" / "loras" / "a", SITES)
    (tmp_path / "mnt" / "claim-2").mkdir()
    (tmp_path / "mnt" / "claim-2" / "up").symlink_to(tmp_path / "mnt" / "claim-1" / "loras" / "a")
    sources = open_sources(pvc_root=tmp_path / "mnt")

    fetched = await sources.fetch("pvc://claim-1/loras/a")

    assert fetched.source.uri == fetched.source.public == "pvc://claim-1/loras/a"
    with pytest.raises(InvalidRequest):
        await sources.fetch("pvc://claim-2/up")  # one claim never reads another
    with pytest.raises(AdapterNotFound, match="--pvc-root"):
        await open_sources().fetch("pvc://claim-1/loras/a")


async def test_a_hub_caches_snapshot_is_read_through_its_links(
    tmp_path: Path, open_sources: OpenSources
) -> None:
    repo = tmp_path / "models--org--repo"
    snapshot = repo / "snapshots" / ("0" * 40)
    written = write_adapter(tmp_path / "written", SITES)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(written.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")

    fetched = await open_sources(allowed_local_paths=(repo,)).fetch(str(snapshot))

    assert inspect_adapter(fetched.folder, SITES, max_lora_rank=64).rank == 4
