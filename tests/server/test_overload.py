"""More clients than there is room for, for a few seconds, judged by the benchmark itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.running_server import ROOT, running_server
from tests.server.fake_serve import COMMAND


def test_overloaded_server_answers_or_refuses_everybody(text_model: Path) -> None:
    flags = ("--served-model-name=overloaded", "--max-num-queued-reqs=2")
    with running_server(str(text_model), *flags, command=COMMAND) as server:
        script = [sys.executable, str(ROOT / "benchmarks" / "overload.py"), "--url", server.url, "--name="]
        sizes = ["--clients=64", "--seconds=4", "--base-clients=2", "--base-seconds=1", "--hang-s=30"]
        run = subprocess.run([*script, *sizes], capture_output=True, text=True, timeout=120, check=True)

    result = json.loads(run.stdout)
    requests = result["requests"]
    assert set(requests["kinds"]) == {"ok", "503 overloaded"}, requests
    assert requests["kinds"]["ok"] > 64
    assert (requests["lost"], requests["hung"], requests["refused_without_retry_after"]) == (0, 0, 0)
    assert 1 <= requests["retry_after_s"]["min"] <= requests["retry_after_s"]["max"] <= 60
    assert result["health"]["count"] > 20
    assert result["health"]["not_200"] == 0
    assert result["health"]["p99_ms"] < 500  # 50 where the machine has nothing else to do
