"""More clients than there is room for, for a few seconds, judged by the benchmark itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.running_server import ROOT, running_server
from tests.server.fake_serve import COMMAND

_NGINX: Final = os.environ.get("LORAMUX_TEST_NGINX") or shutil.which("nginx", path="/usr/sbin:/usr/bin")


def measure(url: str, *arguments: str) -> dict[str, Any]:
    """What the benchmark says about a running server."""
    script = [sys.executable, str(ROOT / "benchmarks" / "overload.py"), "--url", url, "--name="]
    run = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=120, check=True)
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_overloaded_server_answers_or_refuses_everybody(text_model: Path) -> None:
    flags = ("--served-model-name=overloaded", "--max-num-queued-reqs=2")
    with running_server(str(text_model), *flags, command=COMMAND) as server:
        sizes = ("--clients=64", "--seconds=4", "--base-clients=2", "--base-seconds=1", "--hang-s=30")
        result = measure(server.url, *sizes)

    requests = result["requests"]
    assert set(requests["kinds"]) == {"ok", "503 overloaded"}, requests
    assert requests["kinds"]["ok"] > 64
    assert (requests["lost"], requests["hung"], requests["refused_without_retry_after"]) == (0, 0, 0)
    assert 1 <= requests["retry_after_s"]["min"] <= requests["retry_after_s"]["max"] <= 60
    assert result["health"]["count"] > 20
    assert result["health"]["not_200"] == 0
    assert result["health"]["p99_ms"] < 500  # 50 where the machine has nothing else to do


@pytest.mark.skipif(_NGINX is None, reason="needs nginx, or LORAMUX_TEST_NGINX with its path")
def test_stream_flows_through_nginx_and_so_does_its_end(text_model: Path) -> None:
    with running_server(str(text_model), "--served-model-name=overloaded", command=COMMAND) as server:
        sizes = ("--clients=4", "--seconds=1", "--base-clients=2", "--base-seconds=1")
        result = measure(server.url, "--front=nginx", f"--nginx={_NGINX}", *sizes)

    assert result["nginx"]["flows"], result["nginx"]
    assert result["nginx"]["cancel_reaches_engine_s"] < 2
    assert set(result["requests"]["kinds"]) == {"ok"}
