"""Adapters in a bucket, over the wire from moto's S3 server."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from loramux.engine.errors import AdapterNotFound, AdapterSourceAuth, AdapterUnavailable
from loramux.resolvers.listing import Hiccup, SourceChanged
from loramux.resolvers.s3_client import S3Client
from loramux.resolvers.settings import SourceSettings
from tests.broken_relay import BrokenRelay, running_relay
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


def put(bucket: Any, files: dict[str, bytes]) -> None:
    for key, data in files.items():
        bucket.put_object(Key=key, Body=data)


@pytest.fixture
def relay(s3_url: str) -> Iterator[BrokenRelay]:
    with running_relay(s3_url) as running:
        yield running


async def test_a_prefix_never_pulls_its_longer_sibling(
    bucket: Any, s3_url: str, open_sources: OpenSources
) -> None:
    put(bucket, below("loras/a", adapter_files(1)) | below("loras/a-v2", adapter_files(2)))
    put(bucket, below("loras/a/checkpoint-1", adapter_files(3)) | {"loras/a/": b"", "loras/a/x.bin": b"no"})
    sources = open_sources(s3_endpoint=s3_url)

    fetched = await sources.fetch("s3://adapters/loras/a/")
    sibling = await sources.fetch("s3://adapters/loras/a-v2")

    assert contents(fetched.folder) == adapter_files(1)
    assert contents(sibling.folder) == adapter_files(2)
    assert fetched.source.uri == fetched.source.public == "s3://adapters/loras/a"


async def test_the_etags_are_recorded_and_decide_what_is_new(
    bucket: Any, s3_url: str, open_sources: OpenSources
) -> None:
    put(bucket, below("a", adapter_files(1)))
    sources = open_sources(s3_endpoint=s3_url)
    first = await sources.fetch("s3://adapters/a")

    again = await sources.fetch("s3://adapters/a")
    put(bucket, below("a", adapter_files(2)))
    changed = await sources.fetch("s3://adapters/a")

    etags = [bucket.Object(f"a/{name}").e_tag for name in (CONFIG, WEIGHTS)]
    assert changed.source.revision == f"{CONFIG}={etags[0]} {WEIGHTS}={etags[1]}"
    assert again.downloaded_bytes == 0
    assert again.source == first.source != changed.source
    assert contents(first.folder) == adapter_files(1)
    assert contents(changed.folder) == adapter_files(2)


async def test_keys_that_climb_or_hide_are_never_files(
    bucket: Any, s3_url: str, open_sources: OpenSources
) -> None:
    odd = {
        "a/../../evil.safetensors": b"x",
        "a/adapter\\..\\x.safetensors": b"x",
        "a//adapter_2.safetensors": b"x",
    }
    put(bucket, below("a", adapter_files()) | odd)

    fetched = await open_sources(s3_endpoint=s3_url).fetch("s3://adapters/a")

    assert contents(fetched.folder) == adapter_files()


async def test_a_listing_in_pages_is_read_to_its_end(
    bucket: Any, s3_url: str, open_sources: OpenSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, below("a", {str(number): b"" for number in range(5)} | adapter_files()))
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")  # of moto, which runs in this process

    fetched = await open_sources(s3_endpoint=s3_url).fetch("s3://adapters/a")

    assert contents(fetched.folder) == adapter_files()


@pytest.mark.parametrize("uri", ["s3://adapters/none", "s3://no-such-bucket/a"])
async def test_nothing_there_is_not_found(
    bucket: Any, s3_url: str, open_sources: OpenSources, uri: str
) -> None:
    with pytest.raises(AdapterNotFound, match="No adapter found for"):
        await open_sources(s3_endpoint=s3_url).fetch(uri)


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "AccessDenied", AdapterSourceAuth, "refused the credentials"),
        (403, "SignatureDoesNotMatch", AdapterSourceAuth, "SignatureDoesNotMatch"),
        (400, "ExpiredToken", AdapterSourceAuth, "ExpiredToken"),
        (404, "NoSuchBucket", AdapterNotFound, "no such bucket"),
        (429, "TooManyRequests", AdapterUnavailable, "tried 4 times"),
        (500, "InternalError", AdapterUnavailable, "tried 4 times"),
        (503, "ServiceUnavailable", AdapterUnavailable, "tried 4 times"),
        (400, "AuthorizationHeaderMalformed", AdapterUnavailable, "region"),
    ],
)
async def test_what_s3_answers_decides_the_error(
    relay: BrokenRelay, open_sources: OpenSources, status: int, code: str, error: type[Exception], says: str
) -> None:
    relay.answer = (status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    with pytest.raises(error, match=says):
        await open_sources(s3_endpoint=relay.url).fetch("s3://adapters/a")


async def test_missing_credentials_are_a_matter_of_credentials(
    s3_url: str, open_sources: OpenSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    sources = open_sources(s3_endpoint=s3_url, s3_access_key_id=None, s3_secret_access_key=None)

    with pytest.raises(AdapterSourceAuth, match="LORAMUX_S3_ANONYMOUS"):
        await sources.fetch("s3://adapters/a")


async def test_a_public_bucket_is_read_without_credentials(
    bucket: Any, relay: BrokenRelay, open_sources: OpenSources
) -> None:
    bucket.Acl().put(ACL="public-read")
    for name, data in adapter_files().items():
        bucket.put_object(Key=f"a/{name}", Body=data, ACL="public-read")

    fetched = await open_sources(s3_endpoint=relay.url, s3_anonymous=True).fetch("s3://adapters/a")

    assert contents(fetched.folder) == adapter_files()
    assert b"authorization:" not in relay.received.lower()


async def test_cut_connections_are_continued(
    bucket: Any, relay: BrokenRelay, open_sources: OpenSources
) -> None:
    files = adapter_files() | {WEIGHTS: os.urandom(4 << 20)}
    put(bucket, below("a", files))
    relay.cut_bodies_of, relay.cut_after_bytes, relay.num_cuts = b"GET /adapters/a/adapter_model", 1 << 20, 2

    fetched = await open_sources(s3_endpoint=relay.url).fetch("s3://adapters/a")

    assert contents(fetched.folder) == files
    assert fetched.downloaded_bytes == fetched.nbytes
    starts = [int(start) for start in re.findall(rb"(?i)range: bytes=(\d+)-", relay.received)]
    assert 0 < starts[0] < starts[1] <= 2 << 20


async def test_a_stalled_connection_is_cut_and_continued(
    bucket: Any, relay: BrokenRelay, open_sources: OpenSources
) -> None:
    put(bucket, below("a", adapter_files()))
    relay.cut_bodies_of, relay.cut_after_bytes, relay.num_cuts = b"GET /adapters/a/adapter_model", 1000, 1
    relay.stalls = True

    fetched = await open_sources(s3_endpoint=relay.url, stall_timeout_s=0.2).fetch("s3://adapters/a")

    assert contents(fetched.folder) == adapter_files()


async def test_an_object_overwritten_after_it_was_listed_is_listed_again(
    bucket: Any, relay: BrokenRelay, open_sources: OpenSources
) -> None:
    put(bucket, below("a", adapter_files(1)))
    new = adapter_files(2)
    relay.before = (b"GET /adapters/a/adapter_model", lambda: put(bucket, below("a", new)))

    fetched = await open_sources(s3_endpoint=relay.url).fetch("s3://adapters/a")

    assert contents(fetched.folder) == new


async def test_the_client_tells_a_changed_object_from_a_dead_server(bucket: Any, s3_url: str) -> None:
    put(bucket, {"a": b"one"})
    settings = {"s3_access_key_id": "test", "s3_secret_access_key": "test", "s3_region": "us-east-1"}
    client = S3Client(SourceSettings(store_dir="unused", s3_endpoint=s3_url, **settings))  # type: ignore[arg-type]
    nobody = S3Client(SourceSettings(store_dir="unused", s3_endpoint="http://127.0.0.1:1", **settings))  # type: ignore[arg-type]

    with pytest.raises(SourceChanged):
        await asyncio.to_thread(lambda: list(client.read("adapters", "a", '"another"', 0)))
    with pytest.raises(Hiccup):
        await asyncio.to_thread(nobody.names, "adapters", "")

    await asyncio.to_thread(client.close)
    await asyncio.to_thread(nobody.close)


async def test_a_refused_fetch_leaves_nothing(
    bucket: Any, s3_url: str, open_sources: OpenSources, tmp_path: Any
) -> None:
    put(bucket, {f"a/{CONFIG}": b"{}"})

    with pytest.raises(Exception, match=WEIGHTS):
        await open_sources(s3_endpoint=s3_url).fetch("s3://adapters/a")

    assert left_behind(tmp_path / "store") == []
