"""Several processes on one store: killed, starved of disk, cut off the network, at work together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from tests.resolvers.remote_adapters import WEIGHTS, adapter_files, contents, left_behind

REPO = "team/pirate"


def start(store: Path, hub: HubServer, *uris: str, **settings: Any) -> subprocess.Popen[str]:
    settings = {"store_dir": str(store), "hf_endpoint": hub.url, **settings}
    command = [sys.executable, "-m", "tests.resolvers.fetching_process", json.dumps(settings), *uris]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_a_process_killed_inside_a_download_leaves_nothing_for_the_next(
    tmp_path: Path, hub: HubServer
) -> None:
    hub.commit(REPO, adapter_files())
    hub.faults.stall_after_bytes, hub.faults.num_stalls = 1500, 1
    killed = start(tmp_path, hub, REPO)
    assert hub.stalled.wait(20)

    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left_behind(tmp_path) != []
    assert list((tmp_path / "cache").iterdir()) == []
    fetched, other = results(start(tmp_path, hub, REPO, "hf://no/where"))

    assert contents(Path(fetched["folder"])) == adapter_files()
    assert other["error"] == "AdapterNotFound"
    assert left_behind(tmp_path) == []
    assert list((tmp_path / "sessions").iterdir()) == []


def test_two_processes_download_one_adapter_once(tmp_path: Path, hub: HubServer) -> None:
    hub.commit(REPO, adapter_files())

    processes = [start(tmp_path, hub, REPO) for _ in range(3)]
    fetched = [results(process)[0] for process in processes]

    assert len({one["folder"] for one in fetched}) == 1
    assert contents(Path(fetched[0]["folder"])) == adapter_files()
    assert hub.count(WEIGHTS) == 1
    assert sorted(one["downloaded"] for one in fetched)[:2] == [0, 0]
    assert left_behind(tmp_path) == []


def test_a_disk_without_room_is_an_error_that_names_it_and_frees_what_came(
    tmp_path: Path, hub: HubServer
) -> None:
    hub.commit(REPO, adapter_files())

    (refused,) = results(start(tmp_path, hub, REPO, _limit_bytes=2000))

    assert refused["error"] == "AdapterUnavailable"
    assert f"the disk of the local store {tmp_path} is full" in refused["message"]
    assert "bytes are free" in refused["message"]
    assert left_behind(tmp_path) == []
    (fetched,) = results(start(tmp_path, hub, REPO))
    assert contents(Path(fetched["folder"])) == adapter_files()


def test_a_small_file_system_that_fills_up_is_told_apart(tmp_path: Path, hub: HubServer) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system here")
    try:
        hub.commit(REPO, adapter_files() | {WEIGHTS: b"x" * 400_000})
        (refused,) = results(start(disk, hub, REPO))
        assert refused["error"] == "AdapterUnavailable"
        assert "the adapter needs 400" in refused["message"]
        assert left_behind(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_offline_serves_what_is_stored_and_opens_no_socket(tmp_path: Path, hub: HubServer) -> None:
    commit = hub.commit(REPO, adapter_files())
    online = results(start(tmp_path, hub, REPO))
    asked = len(hub.requests)

    branch, pinned, unknown, bucket = results(
        start(
            tmp_path,
            hub,
            *(REPO, f"{REPO}@{commit}", "hf://team/other", "s3://bucket/a"),
            offline=True,
            _no_network=True,
        )
    )

    assert branch == pinned == {"folder": online[0]["folder"], "downloaded": 0}
    assert unknown["error"] == bucket["error"] == "AdapterUnavailable"
    assert "loramux fetch hf://team/other" in unknown["message"]
    assert len(hub.requests) == asked


def test_the_guard_of_the_offline_test_sees_the_network(tmp_path: Path, hub: HubServer) -> None:
    process = start(tmp_path, hub, REPO, _no_network=True)

    _, err = process.communicate(timeout=30)

    assert process.returncode != 0
    assert "the network was used" in err
