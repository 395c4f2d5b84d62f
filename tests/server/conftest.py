"""One server with the stand-in engine for all tests of the HTTP face."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.adapter_files import llama_sites, write_adapter
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND
from tests.server.tiny_text import write_text_model


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for the stand-in engine."""
    return write_text_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that fits it."""
    return write_adapter(tmp_path_factory.mktemp("adapters") / "shout-lora", llama_sites())


@pytest.fixture(scope="session")
def fake_server(text_model: Path, adapter_folder: Path) -> Iterator[RunningServer]:
    """Base names `tiny` and `alias`, adapters `shout` and `org/loud one:v1`."""
    with running_server(
        *(str(text_model), "--served-model-name", "tiny", "alias", "--enable-lora"),
        *("--lora-modules", f"shout={adapter_folder}", f"org/loud one:v1={adapter_folder}"),
        *("--sse-keep-alive-interval=0.2", "--max-request-bytes=100K"),
        command=COMMAND,
    ) as server:
        yield server


@pytest.fixture
def http(fake_server: RunningServer) -> Iterator[httpx.Client]:
    """A plain client for it."""
    with fake_server.client() as client:
        yield client
