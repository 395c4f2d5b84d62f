"""The same with the clients of Node; skipped where it is missing, unless LORAMUX_NODE_CLIENTS=1 insists."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from functools import cache

import pytest

from tests.clients.conftest import Problems
from tests.clients.features import World
from tests.clients.node_modules import NodeUnavailable, node_folder

pytestmark = pytest.mark.demo

_EVERY = (
    *("model_list", "plain", "streaming", "adapter_by_name", "structured_output"),
    *("tool_call", "streamed_tool_call", "required_tool", "named_tool"),
    *("bad_key", "unknown_model", "context_overflow"),
)
CLIENTS = {"openai": (*_EVERY, "stream_helper"), "ai_sdk": _EVERY}


@pytest.fixture(scope="module")
def node_problems_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Problems]:
    """What went wrong with each feature of a Node client; its script runs once."""
    try:
        folder = node_folder()
    except NodeUnavailable as error:
        if os.environ.get("LORAMUX_NODE_CLIENTS") == "1":
            raise
        pytest.skip(f"no Node clients: {error}")
    world: World = request.getfixturevalue("world")

    @cache
    def run(client: str) -> Problems:
        report = tmp_path_factory.mktemp("node") / f"{client}.json"
        done = subprocess.run(
            ["node", f"{client}.mjs", json.dumps(dataclasses.asdict(world)), str(report)],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(report.parent)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        problems: Problems = json.loads(report.read_text())
        return problems

    return run


@pytest.mark.parametrize(
    ("client", "feature"),
    [
        pytest.param(client, feature, id=f"{client}-{feature}")
        for client, features in CLIENTS.items()
        for feature in features
    ],
)
def test_node_client_can_do(client: str, feature: str, node_problems_of: Callable[[str], Problems]) -> None:
    problem = node_problems_of(client)[feature]

    if problem is not None:
        pytest.fail(problem, pytrace=False)


@pytest.mark.parametrize("client", CLIENTS)
def test_nothing_that_a_node_client_tried_is_left_out(
    client: str, node_problems_of: Callable[[str], Problems]
) -> None:
    assert node_problems_of(client).keys() == set(CLIENTS[client])
