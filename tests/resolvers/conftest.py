"""Real sources over the wire for these tests: a stand-in hub and moto's S3, each on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.sources import Sources
from tests.hub_server import HubServer, running_hub
from tests.resolvers.remote_adapters import OpenSources
from tests.s3_server import new_bucket, running_s3


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio only."""
    return "asyncio"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    with running_s3() as url:
        yield url


@pytest.fixture
def bucket(s3_url: str) -> Iterator[Any]:
    """An empty bucket, as boto3's resource; its name is `adapters`."""
    with new_bucket(s3_url) as empty:
        yield empty


@pytest.fixture
async def open_sources(tmp_path: Path) -> AsyncIterator[OpenSources]:
    """Makes `Sources` on `tmp_path/store` that never wait between tries; closes them at the end."""
    opened: list[Sources] = []

    def make(**settings: Any) -> Sources:
        defaults: dict[str, Any] = {
            "store_dir": tmp_path / "store",
            "retry_delay_s": 0.0,
            "stall_timeout_s": 5.0,
            "min_free_bytes": 0,
            "s3_access_key_id": "test",
            "s3_secret_access_key": "test",
            "s3_region": "us-east-1",
            "s3_addressing_style": "path",
        }
        sources = Sources(SourceSettings(**(defaults | settings)))
        opened.append(sources)
        return sources

    yield make
    for sources in opened:
        await sources.aclose()
