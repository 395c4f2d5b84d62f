"""One real server for the session: the demo model in fp32 with the example adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.demo import demo_model_folder
from tests.running_server import ROOT, RunningServer, running_server

ADAPTERS = ("json", "pirate", "sql")


def demo_arguments() -> list[str]:
    """Flags of a small demo server; fp32, so that a batch's neighbours cannot tip a greedy choice."""
    modules = [f"{name}={ROOT / 'examples' / 'adapters' / name}" for name in ADAPTERS]
    return [
        *(str(demo_model_folder()), "--served-model-name", "smollm2", "--dtype=float32"),
        *("--max-model-len=1024", "--kv-cache-bytes=200M", "--enable-lora", "--lora-modules", *modules),
    ]


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server that tests leave as they found it."""
    with running_server(*demo_arguments()) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    """The official client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A plain client for the session's server."""
    with server.client() as client:
        yield client


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio only."""
    return "asyncio"


@pytest.fixture
async def async_client(server: RunningServer) -> AsyncIterator[AsyncOpenAI]:
    """The official client, asynchronous."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
