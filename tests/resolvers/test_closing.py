"""A server that stops does not wait for a source that is silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from loramux.engine.errors import AdapterUnavailable
from tests.broken_relay import running_relay
from tests.hub_server import HubServer
from tests.resolvers.remote_adapters import OpenSources, adapter_files, below

pytestmark = pytest.mark.anyio


async def stop_while(is_stalled: Callable[[], object], sources: Any, uri: str) -> None:
    waiting = asyncio.create_task(sources.fetch(uri))
    await asyncio.to_thread(is_stalled)

    async with asyncio.timeout(5):  # far less than the sources' own patience
        await sources.aclose()
        with pytest.raises(AdapterUnavailable):
            await waiting


async def test_closing_does_not_wait_for_a_silent_hub(hub: HubServer, open_sources: OpenSources) -> None:
    hub.commit("team/a", adapter_files())
    hub.faults.stall_after_bytes, hub.faults.num_stalls = 1000, -1
    sources = open_sources(hf_endpoint=hub.url, stall_timeout_s=60.0)

    await stop_while(hub.stalled.wait, sources, "team/a")


async def test_closing_does_not_wait_for_a_silent_bucket(
    bucket: Any, s3_url: str, open_sources: OpenSources
) -> None:
    for key, data in below("a", adapter_files()).items():
        bucket.put_object(Key=key, Body=data)
    with running_relay(s3_url) as relay:
        relay.cut_bodies_of, relay.cut_after_bytes, relay.num_cuts = (
            b"GET /adapters/a/adapter_model",
            1000,
            99,
        )
        relay.stalls = True
        sources = open_sources(s3_endpoint=relay.url, stall_timeout_s=60.0)

        await stop_while(relay.stalled.wait, sources, "s3://adapters/a")
