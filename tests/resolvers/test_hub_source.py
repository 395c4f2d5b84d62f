"""Adapters on a Hub, over real HTTP: pinned, verified, continued, and every fault told apart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loramux.engine.errors import (
    AdapterIncompatible,
    AdapterNotFound,
    AdapterSourceAuth,
    AdapterUnavailable,
)
from loramux.resolvers.base import Progress
from tests.hub_server import HubServer
from tests.resolvers.remote_adapters import (
    CONFIG,
    WEIGHTS,
    OpenSources,
    adapter_files,
    below,
    contents,
    left_behind,
)

pytestmark = pytest.mark.anyio

REPO = "team/pirate"


async def test_a_branch_is_pinned_to_its_commit_once(hub: HubServer, open_sources: OpenSources) -> None:
    files = adapter_files()
    commit = hub.commit(REPO, files | {"README.md": b"no", "model.safetensors": b"x" * 999})
    sources = open_sources(hf_endpoint=hub.url)

    first = await sources.fetch(f"hf://{REPO}")
    again = await sources.fetch(REPO)
    pinned = await sources.fetch(f"{REPO}@{commit}")

    assert contents(first.folder) == files
    assert first.source.uri == f"hf://{REPO}@{commit}"
    assert first.source.revision == commit
    assert first.downloaded_bytes == first.nbytes == sum(map(len, files.values()))
    assert again.folder == pinned.folder == first.folder
    assert again.downloaded_bytes == pinned.downloaded_bytes == 0
    assert hub.count("/resolve/") == 2
    assert hub.count("/revision/") == 2  # not for the commit
    assert hub.count(rf"/resolve/(?!{commit})") == 0  # every file by commit, never by branch


async def test_a_new_commit_is_another_adapter(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit(REPO, adapter_files(seed=1))
    sources = open_sources(hf_endpoint=hub.url)
    old = await sources.fetch(REPO)

    hub.commit(REPO, adapter_files(seed=2))
    new = await sources.fetch(REPO)

    assert contents(new.folder) == adapter_files(seed=2)
    assert contents(old.folder) == adapter_files(seed=1)


async def test_a_folder_and_a_branch_of_a_repository(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit(REPO, below("en/v1", adapter_files(1)) | below("en/v1/checkpoint", adapter_files(2)), "dev/x")
    hub.faults.page_entries = 1

    fetched = await open_sources(hf_endpoint=hub.url).fetch(f"hf://{REPO}/en/v1@dev/x")

    assert contents(fetched.folder) == adapter_files(1)
    assert hub.count("cursor=") == 2  # a folder and two files, one a page


async def test_parallel_fetches_of_one_address_are_one_download(
    hub: HubServer, open_sources: OpenSources
) -> None:
    hub.commit(REPO, adapter_files())
    sources = open_sources(hf_endpoint=hub.url, max_store_bytes=100_000)

    fetched = await asyncio.gather(*(sources.fetch(REPO) for _ in range(20)))

    assert hub.count("/resolve/") == 2
    for one in fetched[:-1]:
        one.lease.release()
        one.lease.release()
    with pytest.raises(AdapterUnavailable, match="in use"):  # the last lease still holds
        await asyncio.to_thread(sources.store.make_room, 100_000)
    fetched[-1].lease.release()
    await asyncio.to_thread(sources.store.make_room, 100_000)
    assert not fetched[0].folder.exists()


@pytest.mark.parametrize(
    ("status", "headers", "error", "says"),
    [
        (401, {}, AdapterSourceAuth, "HF_TOKEN"),
        (403, {}, AdapterSourceAuth, "HF_TOKEN"),
        (401, {"x-error-code": "RepoNotFound"}, AdapterNotFound, "private"),
        (404, {"x-error-code": "RevisionNotFound"}, AdapterNotFound, "no such branch"),
        (404, {}, AdapterNotFound, "No adapter found for"),
        (429, {"retry-after": "0"}, AdapterUnavailable, "429"),
        (500, {}, AdapterUnavailable, "500"),
        (503, {}, AdapterUnavailable, "503"),
        (418, {}, AdapterUnavailable, "418"),
        (200, {}, AdapterUnavailable, "HF_ENDPOINT"),
    ],
)
async def test_what_the_hub_answers_decides_the_error(
    hub: HubServer,
    open_sources: OpenSources,
    status: int,
    headers: dict[str, str],
    error: type[Exception],
    says: str,
) -> None:
    hub.commit(REPO, adapter_files())
    hub.faults.status, hub.faults.headers, hub.faults.num_status = status, headers, -1

    with pytest.raises(error, match=says):
        await open_sources(hf_endpoint=hub.url).fetch(REPO)

    assert len(hub.requests) == (4 if status in (429, 500, 503) else 1)


async def test_a_source_that_was_down_is_asked_again(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit(REPO, adapter_files())
    sources = open_sources(hf_endpoint=hub.url)
    hub.faults.status, hub.faults.num_status = 500, 3

    fetched = await sources.fetch(REPO)

    assert contents(fetched.folder) == adapter_files()


async def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: HubServer, open_sources: OpenSources, tmp_path: Path
) -> None:
    hub.commit(REPO, adapter_files())
    hub.repos[REPO].token = "secret-token"

    with pytest.raises(AdapterSourceAuth):
        await open_sources(hf_endpoint=hub.url).fetch(REPO)
    with pytest.raises(AdapterSourceAuth) as caught:
        await open_sources(hf_endpoint=hub.url, hf_token="other-secret").fetch(REPO)
    fetched = await open_sources(hf_endpoint=hub.url, hf_token="secret-token").fetch(REPO)

    assert "secret" not in str(caught.value) + repr(open_sources(hf_token="secret").settings)
    assert "secret" not in fetched.source.uri
    notes = (tmp_path / "store" / "sources").iterdir()
    assert all(b"secret" not in note.read_bytes() for note in notes)


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://169.254.169.254/latest",
        "https://localhost/x",
        "https://[::1]/x",
        "https://10.0.0.1/x",
        "http://example.com/x",
        "file:///etc/passwd",
        "//metadata.google.internal/x",
        "http://[bad",
    ],
)
async def test_redirects_into_the_network_or_to_plain_http_are_not_followed(
    hub: HubServer, open_sources: OpenSources, target: str
) -> None:
    hub.commit(REPO, adapter_files())
    hub.faults.redirect_to = target

    with pytest.raises(AdapterUnavailable, match="redirect"):
        await open_sources(hf_endpoint=hub.url).fetch(REPO)


async def test_redirects_in_a_circle_end(hub: HubServer, open_sources: OpenSources) -> None:
    commit = hub.commit(REPO, adapter_files())
    hub.faults.redirect_to = f"/{REPO}/resolve/{commit}/{CONFIG}"

    with pytest.raises(AdapterUnavailable, match="more than 5 redirects"):
        await open_sources(hf_endpoint=hub.url).fetch(REPO)


async def test_a_cut_connection_continues_where_it_broke(hub: HubServer, open_sources: OpenSources) -> None:
    files = adapter_files()
    hub.commit(REPO, files)
    hub.faults.cut_after_bytes, hub.faults.num_cuts = 500, 3

    fetched = await open_sources(hf_endpoint=hub.url).fetch(REPO)

    assert contents(fetched.folder) == files
    assert fetched.downloaded_bytes == fetched.nbytes  # no byte came twice
    asked = [headers.get("range") for _, path, headers in hub.requests if path.endswith(WEIGHTS)]
    assert asked == [None, "bytes=500-", "bytes=1000-", "bytes=1500-"]


async def test_a_server_without_ranges_is_read_from_the_start(
    hub: HubServer, open_sources: OpenSources
) -> None:
    hub.commit(REPO, adapter_files())
    hub.faults.cut_after_bytes, hub.faults.num_cuts, hub.faults.ignore_range = 1000, 1, True

    fetched = await open_sources(hf_endpoint=hub.url).fetch(REPO)

    assert contents(fetched.folder) == adapter_files()


async def test_a_connection_that_is_always_cut_gives_up_and_keeps_what_came(
    hub: HubServer, open_sources: OpenSources, tmp_path: Path
) -> None:
    hub.commit(REPO, adapter_files())
    sources = open_sources(hf_endpoint=hub.url)
    hub.faults.cut_after_bytes, hub.faults.num_cuts = 500, -1

    with pytest.raises(AdapterUnavailable, match="tried 4 times"):
        await sources.fetch(REPO)

    assert any(name.endswith(WEIGHTS) for name in left_behind(tmp_path / "store"))
    hub.faults.num_cuts = 0
    fetched = await sources.fetch(REPO)
    assert contents(fetched.folder) == adapter_files()
    assert fetched.downloaded_bytes == len(adapter_files()[WEIGHTS]) - 2000
    assert left_behind(tmp_path / "store") == []


async def test_a_stalled_download_is_cut_and_continued(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit(REPO, adapter_files())
    hub.faults.stall_after_bytes, hub.faults.num_stalls = 1500, 1

    fetched = await open_sources(hf_endpoint=hub.url, stall_timeout_s=0.2).fetch(REPO)

    assert hub.stalled.is_set()
    assert contents(fetched.folder) == adapter_files()
    assert fetched.downloaded_bytes == fetched.nbytes


async def test_bytes_with_the_wrong_hash_are_fetched_again_and_never_kept(
    hub: HubServer, open_sources: OpenSources, tmp_path: Path
) -> None:
    hub.commit(REPO, adapter_files())
    sources = open_sources(hf_endpoint=hub.url)
    hub.faults.wrong_bytes = -1

    with pytest.raises(AdapterUnavailable, match="does not have the sha256"):
        await sources.fetch(REPO)
    assert list((tmp_path / "store" / "cache").iterdir()) == []

    hub.faults.wrong_bytes = 1
    fetched = await sources.fetch(REPO)
    assert contents(fetched.folder) == adapter_files()


async def test_bytes_of_another_commit_are_refused(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit(REPO, adapter_files())
    hub.faults.commit_header = "f" * 40

    with pytest.raises(AdapterUnavailable, match="keeps changing"):
        await open_sources(hf_endpoint=hub.url).fetch(REPO)


async def test_size_is_checked_before_anything_is_downloaded(
    hub: HubServer, open_sources: OpenSources
) -> None:
    hub.commit(REPO, adapter_files())

    with pytest.raises(AdapterIncompatible, match="--max-adapter-bytes"):
        await open_sources(hf_endpoint=hub.url, max_adapter_bytes=1000).fetch(REPO)

    assert hub.count("/resolve/") == 0


async def test_a_repository_without_an_adapter_says_what_it_lacks(
    hub: HubServer, open_sources: OpenSources
) -> None:
    hub.commit("team/base", {"config.json": b"{}"})
    hub.commit("team/pickle", {CONFIG: b"{}", "adapter_model.bin": b"x"})
    sources = open_sources(hf_endpoint=hub.url)

    with pytest.raises(AdapterNotFound, match=r"no adapter_config\.json"):
        await sources.fetch("team/base")
    with pytest.raises(AdapterIncompatible, match="pickle"):
        await sources.fetch("team/pickle")
    with pytest.raises(AdapterNotFound):
        await sources.fetch("hf://team/base/no/such/folder")


async def test_progress_tells_phases_and_bytes(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit(REPO, adapter_files())
    seen: list[Progress] = []

    fetched = await open_sources(hf_endpoint=hub.url).fetch(REPO, progress=seen.append)
    await asyncio.sleep(0)  # let the last callback run

    assert seen[0].phase == "resolving"
    assert seen[-1] == Progress("verifying", fetched.nbytes, fetched.nbytes)
    assert Progress("downloading", 0, fetched.nbytes) in seen


async def test_a_download_that_nobody_waits_for_stops(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit(REPO, adapter_files())
    hub.faults.stall_after_bytes, hub.faults.num_stalls = 1500, 1
    sources = open_sources(hf_endpoint=hub.url, stall_timeout_s=0.3)
    waiting = [asyncio.create_task(sources.fetch(REPO)) for _ in range(2)]
    await asyncio.to_thread(hub.stalled.wait)

    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    fetched = await sources.fetch(REPO)  # takes over from where the first came to

    assert contents(fetched.folder) == adapter_files()
    assert 0 < fetched.downloaded_bytes < fetched.nbytes
    assert hub.count(WEIGHTS) == 2
