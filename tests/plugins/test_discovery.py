"""Which resolvers a server gets: what is installed, what is chosen, and what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from loramux import Resolver, ResolverContext
from loramux.engine.errors import InvalidConfig
from loramux.plugins.discovery import load_resolvers
from loramux.resolvers.base import ENTRY_POINT_GROUP

EXAMPLE = Path(__file__).parents[2] / "examples" / "resolver-plugin"

BUILT_IN = {"lora_filesystem_resolver", "lora_hf_hub_resolver", "lora_s3_resolver"}


class Named:
    """A resolver named by whoever made it."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def resolve(self, base_model_name: str, adapter_name: str) -> str | None:
        return None


def create_one(context: ResolverContext) -> Resolver:
    return Named("one")


def create_two(context: ResolverContext) -> Resolver:
    return Named(context.environ.get("TWO", "two"))


def create_none(context: ResolverContext) -> None:
    return None


def create_broken(context: ResolverContext) -> Resolver:
    raise RuntimeError("out of order")


def create_misconfigured(context: ResolverContext) -> Resolver:
    raise InvalidConfig("ONE must be a file", param="ONE")


def create_something_else(context: ResolverContext) -> object:
    return "a string has no resolve"


def entry(name: str, function: str) -> EntryPoint:
    return EntryPoint(name, f"tests.plugins.test_discovery:{function}", ENTRY_POINT_GROUP)


ONE, TWO = entry("one", "create_one"), entry("two", "create_two")


def names(environ: dict[str, str], *installed: EntryPoint) -> list[str]:
    return [resolver.name for resolver in load_resolvers(ResolverContext(environ), installed=installed)]


def test_unset_means_all_and_empty_means_none() -> None:
    assert names({}, ONE, TWO) == ["one", "two"]
    assert names({"LORAMUX_PLUGINS": ""}, ONE, TWO) == []
    assert names({"VLLM_PLUGINS": ""}, ONE, TWO) == []


def test_a_list_chooses_and_orders(caplog: pytest.LogCaptureFixture) -> None:
    assert names({"VLLM_PLUGINS": " two , one,two"}, ONE, TWO) == ["two", "one"]
    assert names({"LORAMUX_PLUGINS": "two,vllm_thing", "VLLM_PLUGINS": "two,vllm_thing"}, ONE, TWO) == ["two"]
    assert "vllm_thing" in {vars(record)["plugin"] for record in caplog.records}


def test_contradicting_variables_stop_the_start() -> None:
    with pytest.raises(InvalidConfig, match="LORAMUX_PLUGINS and VLLM_PLUGINS"):
        names({"LORAMUX_PLUGINS": "one", "VLLM_PLUGINS": ""}, ONE)


def test_plugins_read_the_environment_that_they_are_given() -> None:
    assert names({"TWO": "from the context"}, TWO) == ["from the context"]


@pytest.mark.parametrize("function", ["create_broken", "create_something_else", "no_such_function"])
def test_a_broken_plugin_is_named_and_left_out(function: str, caplog: pytest.LogCaptureFixture) -> None:
    assert names({}, entry("broken", function), ONE) == ["one"]

    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert vars(record)["plugin"] == "broken"
    assert function in vars(record)["value"]


def test_a_plugin_that_is_not_configured_is_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert names({}, entry("none", "create_none"), ONE) == ["one"]
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_a_plugin_may_stop_the_start_with_its_own_words() -> None:
    with pytest.raises(InvalidConfig, match="ONE must be a file"):
        names({}, entry("one", "create_misconfigured"))


def test_the_second_of_two_with_one_name_is_left_out_and_explained(caplog: pytest.LogCaptureFixture) -> None:
    assert names({}, ONE, entry("one", "create_two"), ONE) == ["one"]

    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "create_one" in vars(record)["used"]
    assert "create_two" in vars(record)["left_out"]


def test_the_built_in_resolvers_are_entry_points_under_vllms_names(tmp_path: Path) -> None:
    environ = {
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(tmp_path),
        "VLLM_LORA_RESOLVER_HF_REPO_LIST": "org/repo",
        "LORAMUX_LORA_RESOLVER_S3_PREFIX": "s3://bucket/loras/",
        "VLLM_PLUGINS": "lora_hf_hub_resolver,lora_filesystem_resolver,lora_s3_resolver",
    }

    resolvers = load_resolvers(ResolverContext(environ, offline=True))

    assert [resolver.name for resolver in resolvers] == environ["VLLM_PLUGINS"].split(",")
    assert {resolver.name for resolver in resolvers} == BUILT_IN


def test_the_example_package_is_installed_found_and_used(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *(
                "--no-deps",
                "--no-build-isolation",
                "--no-index",
                "--target",
                str(tmp_path / "site"),
                str(EXAMPLE),
            ),
        ],
        check=True,
        capture_output=True,
    )
    catalog = tmp_path / "catalog.json"
    catalog.write_text(json.dumps({"pirate": "hf://acme/pirate-lora@v3"}))
    program = """
import asyncio, os
from loramux import ResolverContext
from loramux.plugins.discovery import load_resolvers
from loramux.resolvers.chain import ResolverChain

async def main():
    chain = ResolverChain(load_resolvers(ResolverContext(dict(os.environ))), base_model_name="org/base")
    print([resolver.name for resolver in chain.resolvers])
    print(await chain.resolve("pirate"), await chain.resolve("unknown"))

asyncio.run(main())
"""
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "TEAM_CATALOG": str(catalog)}

    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True, cwd=tmp_path
    )

    assert done.stdout.splitlines() == [
        "['team_catalog']",
        "Resolution(uri='hf://acme/pirate-lora@v3', resolver='team_catalog') None",
    ]
