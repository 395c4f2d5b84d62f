"""Adapters in a bucket through the whole server: named on first use, loaded by address, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.resolvers.remote_adapters import adapter_files, below
from tests.running_server import running_server
from tests.s3_server import CREDENTIALS, new_bucket, running_s3
from tests.server.fake_serve import COMMAND


@pytest.fixture(scope="module")
def http(text_model: Path) -> Iterator[httpx.Client]:
    """A client of a server that resolves names under s3://adapters/loras/."""
    with running_s3() as url, new_bucket(url) as bucket:
        for name, seed in (("a", 1), ("a-v2", 2), ("team/b", 3)):
            for key, data in below(f"loras/{name}", adapter_files(seed)).items():
                bucket.put_object(Key=key, Body=data)
        environ = {
            **CREDENTIALS,
            "AWS_ENDPOINT_URL": url,
            "LORAMUX_S3_ADDRESSING_STYLE": "path",
            "LORAMUX_LORA_RESOLVER_S3_PREFIX": "s3://adapters/loras/",
        }
        flags = [str(text_model), "--enable-lora", "--allow-runtime-lora-updating"]
        with (
            running_server(*flags, command=COMMAND, environ=environ) as server,
            server.client() as client,
        ):
            yield client


def digest(http: httpx.Client, name: str) -> str:
    return str(http.get(f"/v1/lora_adapters/{name}").json()["digest"])


def test_a_name_is_found_under_the_prefix_on_its_first_use(http: httpx.Client) -> None:
    def ask(_: int) -> Any:
        return http.post("/v1/completions", json={"model": "team/b", "prompt": "abc"}).json()

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, range(6)))

    assert {answer["choices"][0]["text"] for answer in answers} == {"ABC"}
    assert http.get("/v1/lora_adapters/team%2Fb").json()["source"].startswith("s3://adapters/loras/team/b")


def test_a_name_never_gets_its_longer_sibling(http: httpx.Client) -> None:
    for name in ("a", "a-v2"):
        assert http.post("/v1/completions", json={"model": name, "prompt": "x"}).status_code == 200

    assert digest(http, "a") != digest(http, "a-v2")


@pytest.mark.parametrize(
    ("address", "status", "code"),
    [
        ("s3://adapters/loras/nothing", 404, "adapter_not_found"),
        ("s3://adapters/loras/../secret", 400, "invalid_value"),
        ("s3://no-such-bucket/x", 404, "adapter_not_found"),
    ],
)
def test_an_address_that_gives_nothing_has_one_status(
    http: httpx.Client, address: str, status: int, code: str
) -> None:
    response = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": address})

    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text


def test_an_unknown_name_is_not_found(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "nobody", "prompt": "x"})

    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
