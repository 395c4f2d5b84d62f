"""The three built-in resolvers against real folders, a hub and a bucket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from loramux.engine.errors import (
    AdapterIncompatible,
    AdapterSourceAuth,
    AdapterUnavailable,
    InvalidConfig,
)
from loramux.resolvers import filesystem, hf_hub, s3
from loramux.resolvers.base import Resolver, ResolverContext
from loramux.resolvers.chain import Resolution, ResolverChain
from loramux.resolvers.hub_client import HubClient
from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.uri import parse_uri
from tests.adapter_files import write_adapter
from tests.hub_server import HubServer
from tests.resolvers.remote_adapters import SITES, OpenSources, adapter_files, below, contents

pytestmark = pytest.mark.anyio

BASE = "org/tiny"

Create = Callable[[ResolverContext], Resolver | None]


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Any]]:
    """Creates a resolver from an environment; closes it at the end."""
    made: list[Any] = []

    def create(factory: Create, environ: dict[str, str], **context: Any) -> Any:
        made.append(factory(ResolverContext(environ, **context)))
        return made[-1]

    yield create
    for resolver in made:
        if hasattr(resolver, "aclose"):
            await resolver.aclose()


@pytest.mark.parametrize("factory", [filesystem.create, hf_hub.create, s3.create])
def test_a_resolver_that_is_not_configured_is_not_there(factory: Create) -> None:
    assert factory(ResolverContext({})) is None


@pytest.mark.parametrize(
    ("factory", "environ", "says"),
    [
        (filesystem.create, {"VLLM_LORA_RESOLVER_CACHE_DIR": "/no/such"}, "must be a folder"),
        (
            filesystem.create,
            {"LORAMUX_LORA_RESOLVER_CACHE_DIR": "/", "LORAMUX_LORA_RESOLVER_BASE_MATCH": "x"},
            "exact",
        ),
        (
            filesystem.create,
            {"LORAMUX_LORA_RESOLVER_CACHE_DIR": "/a", "VLLM_LORA_RESOLVER_CACHE_DIR": "/b"},
            "both",
        ),
        (hf_hub.create, {"VLLM_LORA_RESOLVER_HF_REPO_LIST": "org/a,b"}, "neither a URI"),
        (hf_hub.create, {"VLLM_LORA_RESOLVER_HF_REPO_LIST": "hf://org/a/sub"}, "ORGANISATION/NAME"),
        (hf_hub.create, {"VLLM_LORA_RESOLVER_HF_REPO_LIST": "org/a", "HF_ENDPOINT": "ftp://x"}, "endpoint"),
        (s3.create, {"LORAMUX_LORA_RESOLVER_S3_PREFIX": "/a"}, "s3://BUCKET/PREFIX/"),
        (s3.create, {"LORAMUX_LORA_RESOLVER_S3_PREFIX": "s3://bkt/../c"}, "'..'"),
    ],
)
def test_a_wrong_setting_stops_the_start(factory: Create, environ: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidConfig, match=says):
        factory(ResolverContext(environ))


# Folders


async def test_names_are_folders_and_new_ones_are_seen_at_once(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    resolver = make(filesystem.create, {"VLLM_LORA_RESOLVER_CACHE_DIR": str(tmp_path)})
    chain = ResolverChain([resolver], base_model_name=BASE)
    assert await chain.resolve("team/a b:1") is None

    write_adapter(tmp_path / "team" / "a b:1", SITES)

    expected = f"file://{tmp_path}/team/a%20b%3A1"
    assert await chain.resolve("team/a b:1") == Resolution(expected, "lora_filesystem_resolver")
    assert parse_uri(expected).path == f"{tmp_path}/team/a b:1"


async def test_names_never_escape_the_folder(tmp_path: Path, make: Callable[..., Any]) -> None:
    root = tmp_path / "root"
    outside = write_adapter(tmp_path / "outside", SITES)
    write_adapter(root / "inside", SITES)
    write_adapter(root, SITES)  # the root itself is no adapter's name
    (root / "link").symlink_to(outside)
    (root / "current").symlink_to("inside")
    resolver = make(filesystem.create, {"LORAMUX_LORA_RESOLVER_CACHE_DIR": str(root)})

    names = [
        "../outside",
        str(outside),
        "inside/../../outside",
        "link",
        ".",
        "",
        "inside/",
        "./inside",
        "a\\b",
    ]
    assert {name: await resolver.resolve(BASE, name) for name in names} == dict.fromkeys(names)
    assert await resolver.resolve(BASE, "a\0b") is None
    assert await resolver.resolve(BASE, "\u00e9" * 256) is None  # 512 bytes: no file can have this name
    assert await resolver.resolve(BASE, "current") == f"file://{root}/current"


@pytest.mark.parametrize(
    ("rule", "trained_on", "is_taken"),
    [
        ("exact", "org/tiny", True),
        ("exact", "tiny", False),
        ("basename", "/models/tiny/", True),
        ("basename", "org/tiny-instruct", False),
        ("off", "something/else", True),
        ("exact", None, True),
    ],
)
async def test_another_base_is_refused_and_explained(
    tmp_path: Path, make: Callable[..., Any], rule: str, trained_on: str | None, is_taken: bool
) -> None:
    write_adapter(tmp_path / "a", SITES, base_model_name_or_path=trained_on)
    environ = {"LORAMUX_LORA_RESOLVER_CACHE_DIR": str(tmp_path), "LORAMUX_LORA_RESOLVER_BASE_MATCH": rule}
    resolver = make(filesystem.create, environ)

    if is_taken:
        assert await resolver.resolve(BASE, "a") is not None
        return
    with pytest.raises(AdapterIncompatible, match=f"{trained_on}.*{BASE}.*BASE_MATCH={rule}"):
        await resolver.resolve(BASE, "a")


# Hub


def hub_environ(hub: HubServer, repos: str = "team/pirate") -> dict[str, str]:
    return {"VLLM_LORA_RESOLVER_HF_REPO_LIST": repos, "HF_ENDPOINT": hub.url}


async def test_repositories_and_their_folders_are_pinned(hub: HubServer, make: Callable[..., Any]) -> None:
    commit = hub.commit("team/pirate", adapter_files() | below("en/v1", adapter_files()))
    old = hub.commit("team/other", below("a", adapter_files()), "v1")
    hub.commit("team/other", {"README.md": b""})
    resolver = make(hf_hub.create, hub_environ(hub, "team/pirate, hf://team/other@v1"))

    assert await resolver.resolve(BASE, "team/pirate") == f"hf://team/pirate@{commit}"
    assert await resolver.resolve(BASE, "team/pirate/en/v1") == f"hf://team/pirate/en/v1@{commit}"
    assert await resolver.resolve(BASE, "team/other/a") == f"hf://team/other/a@{old}"
    for name in ("team/pirate/en", "team/pirate/", "team/pirate@main", "team/pirate-v2", "team", "x/y"):
        assert await resolver.resolve(BASE, name) is None
    assert len(hub.requests) == 2


async def test_a_flood_of_names_costs_the_hub_one_request(hub: HubServer, make: Callable[..., Any]) -> None:
    hub.commit("team/pirate", adapter_files())
    resolver = make(hf_hub.create, hub_environ(hub))
    chain = ResolverChain([resolver], base_model_name=BASE, max_remembered=100)

    for number in range(100_000):
        assert await resolver.resolve(BASE, f"team/pirate/unknown-{number}") is None
    await asyncio.gather(*(chain.resolve(f"team/pirate/unknown-{number}") for number in range(2000)))

    assert len(hub.requests) == 1


async def test_a_new_commit_is_seen_when_the_listing_is_old(hub: HubServer) -> None:
    first = hub.commit("team/pirate", adapter_files(1))
    now = [0.0]
    client = HubClient(SourceSettings(store_dir=Path("unused"), hf_endpoint=hub.url))
    resolver = hf_hub.HubResolver(
        [parse_uri("team/pirate")], client, is_stored=lambda uri: False, clock=lambda: now[0]
    )
    assert await resolver.resolve(BASE, "team/pirate") == f"hf://team/pirate@{first}"

    second = hub.commit("team/pirate", adapter_files(2))
    assert await resolver.resolve(BASE, "team/pirate") == f"hf://team/pirate@{first}"
    now[0] = 60.0
    assert await resolver.resolve(BASE, "team/pirate") == f"hf://team/pirate@{second}"
    await resolver.aclose()


@pytest.mark.parametrize(("status", "error"), [(500, AdapterUnavailable), (403, AdapterSourceAuth)])
async def test_a_hub_that_cannot_say_is_not_asked_once_a_name(
    hub: HubServer, make: Callable[..., Any], status: int, error: type[Exception]
) -> None:
    hub.commit("team/pirate", adapter_files())
    hub.faults.status, hub.faults.num_status = status, -1
    resolver = make(hf_hub.create, hub_environ(hub))

    for number in range(50):
        with pytest.raises(error):
            await resolver.resolve(BASE, f"team/pirate/{number}")

    assert len(hub.requests) == 1


# S3


def s3_environ(url: str) -> dict[str, str]:
    return {
        "LORAMUX_LORA_RESOLVER_S3_PREFIX": "s3://adapters/loras/",
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "LORAMUX_S3_ADDRESSING_STYLE": "path",
    }


async def test_names_are_prefixes_in_the_bucket(bucket: Any, s3_url: str, make: Callable[..., Any]) -> None:
    for key, data in (below("loras/a-v2", adapter_files()) | below("secret", adapter_files())).items():
        bucket.put_object(Key=key, Body=data)
    resolver = make(s3.create, s3_environ(s3_url))

    assert await resolver.resolve(BASE, "a-v2") == "s3://adapters/loras/a-v2"
    for name in ("a", "a-v2/", "../secret", "a-v2/../../secret", "a\\b", "", "a" * 2000):
        assert await resolver.resolve(BASE, name) is None


async def test_a_resolved_name_becomes_a_local_folder(
    bucket: Any, s3_url: str, make: Callable[..., Any], open_sources: OpenSources
) -> None:
    for key, data in below("loras/a", adapter_files()).items():
        bucket.put_object(Key=key, Body=data)
    chain = ResolverChain([make(s3.create, s3_environ(s3_url))], base_model_name=BASE)

    resolution = await chain.resolve("a")
    assert resolution is not None
    fetched = await open_sources(s3_endpoint=s3_url).fetch(resolution.uri)

    assert contents(fetched.folder) == adapter_files()


async def test_a_bucket_that_is_down_is_unavailable(make: Callable[..., Any]) -> None:
    resolver = make(s3.create, s3_environ("http://127.0.0.1:1"))

    with pytest.raises(AdapterUnavailable, match="s3://adapters/loras cannot be read"):
        await resolver.resolve(BASE, "a")


async def test_offline_resolvers_know_what_is_stored(
    hub: HubServer, make: Callable[..., Any], open_sources: OpenSources
) -> None:
    hub.commit("team/pirate", adapter_files())
    sources = open_sources(hf_endpoint=hub.url)
    await sources.fetch("team/pirate")
    asked = len(hub.requests)
    environ = hub_environ(hub) | s3_environ(hub.url)
    resolvers = [
        make(factory, environ, offline=True, is_stored=sources.is_stored)
        for factory in (hf_hub.create, s3.create)
    ]
    chain = ResolverChain(resolvers, base_model_name=BASE)

    assert await chain.resolve("team/pirate") == Resolution("hf://team/pirate", "lora_hf_hub_resolver")
    assert await chain.resolve("team/pirate/other") is None
    assert await chain.resolve("a") is None
    assert len(hub.requests) == asked
