"""Filling the store ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux.engine.errors import AdapterNotFound, InvalidRequest
from loramux.resolvers.base import Progress
from loramux.resolvers.prefetch import fill_store, from_command_line
from loramux.resolvers.settings import SourceSettings, settings_from
from tests.hub_server import HubServer
from tests.resolvers.remote_adapters import WEIGHTS, OpenSources, adapter_files, contents

pytestmark = pytest.mark.anyio


async def test_one_bad_address_harms_no_other(
    tmp_path: Path, hub: HubServer, open_sources: OpenSources
) -> None:
    for number in range(6):
        hub.commit(f"team/a{number}", adapter_files(number))
    uris = [f"team/a{number}" for number in range(6)]
    settings = SourceSettings(store_dir=tmp_path / "store", hf_endpoint=hub.url, min_free_bytes=0)
    seen: list[tuple[str, Progress]] = []

    results = await fill_store(
        settings,
        [*uris, "team/missing", "x://y", uris[0]],
        lambda uri, progress: seen.append((uri, progress)),
    )

    assert [result.uri for result in results] == [*uris, "team/missing", "x://y", uris[0]]
    assert [type(result.error) for result in results[6:]] == [AdapterNotFound, InvalidRequest, type(None)]
    for number, result in enumerate(results[:6]):
        assert result.fetched is not None
        assert contents(result.fetched.folder) == adapter_files(number)
    assert hub.count(WEIGHTS) == 6
    assert {uri for uri, _ in seen} >= set(uris)
    offline = open_sources(offline=True)
    assert (await offline.fetch("team/a3")).downloaded_bytes == 0


def test_a_folder_of_the_command_line_is_relative_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)

    assert from_command_line("org/here") == str(tmp_path / "org" / "here")
    assert from_command_line("./new") == str(tmp_path / "new")
    assert from_command_line("~/a") == str(Path.home() / "a")
    for text in ("org/there", "/abs/path", "hf://org/here", "s3://bucket/a"):
        assert from_command_line(text) == text


def test_the_environment_sets_what_client_libraries_use(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-login\n")
    environ = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "https://hub.example/",
        "HF_HUB_OFFLINE": "1",
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "AWS_DEFAULT_REGION": "eu-1",
        "LORAMUX_S3_ADDRESSING_STYLE": "path",
        "LORAMUX_S3_ANONYMOUS": "true",
        "XDG_CACHE_HOME": "/cache",
    }

    settings = settings_from(environ, max_store_bytes=7)

    assert settings.hf_token == "from-login"
    assert (settings.hf_endpoint, settings.offline) == ("https://hub.example", True)
    assert (settings.s3_endpoint, settings.s3_region) == ("http://minio:9000", "eu-1")
    assert (settings.s3_addressing_style, settings.s3_anonymous) == ("path", True)
    assert (settings.store_dir, settings.max_store_bytes) == (Path("/cache/loramux"), 7)
