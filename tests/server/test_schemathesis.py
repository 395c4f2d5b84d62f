"""The whole API against its own description: schemathesis, every check, single calls and chains of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running_server import ROOT, RunningServer, running_server
from tests.server.fake_serve import COMMAND

KEY = "sk-schemathesis"
# Cases an operation in the fuzzing phases: always the same few, or as many new ones as one wants.
EXAMPLES = os.environ.get("LORAMUX_SCHEMATHESIS_EXAMPLES")
DRAW = ["--generation-database=none"] if EXAMPLES else ["--generation-deterministic"]


@pytest.fixture(scope="module")
def open_server(text_model: Path, adapter_folder: Path) -> Iterator[RunningServer]:
    """A server that lets clients change its adapters, with a key."""
    with running_server(
        *(
            str(text_model),
            "--served-model-name=tiny",
            "--enable-lora",
            f"--api-key={KEY}",
            "--host=127.0.0.1",
        ),
        *("--lora-modules", f"shout={adapter_folder}", "--allow-runtime-lora-updating", "--offline"),
        *("--allowed-local-path", str(adapter_folder.parent), "--sse-keep-alive-interval=0.2"),
        *("--max-model-len=128", "--uvicorn-log-level=warning"),
        command=COMMAND,
    ) as server:
        yield server


def run_schemathesis(server: RunningServer, adapter: Path, folder: Path, phases: str) -> str:
    """The report, "" if there is nothing to report."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli"),
            *("run", f"{server.url}/openapi.json", f"--header=Authorization: Bearer {KEY}"),
            # Ours instead, which knows the rules that no schema can say.
            *("--checks=all", "--exclude-checks=positive_data_acceptance"),
            "--exclude-path=/v1/lora_adapters/events",  # never ends
            *(f"--phases={phases}", f"--max-examples={EXAMPLES or 6}", "--mode=all", "--continue-on-failure"),
            *("--generation-allow-x00=true", *DRAW),
            *("--no-color", "--warnings=off", "--output-truncate=false", "--request-timeout=20"),
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.server.schemathesis_hooks",
            "LORAMUX_TEST_ADAPTER": str(adapter),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    print(done.stdout[-1500:])  # how much was tried
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("phases", ["coverage,fuzzing", "stateful"])
def test_every_operation_does_what_its_description_says(
    open_server: RunningServer, adapter_folder: Path, tmp_path: Path, phases: str
) -> None:
    report = run_schemathesis(open_server, adapter_folder, tmp_path, phases)

    if report:
        pytest.fail(report, pytrace=False)
    with open_server.client() as http:
        assert http.get("/health").status_code == 200
        metrics = http.get("/metrics").text
    assert "Traceback" not in open_server.stderr
    if phases == "stateful":
        (added,) = re.findall(r'adapter_loads_total\{source="file",result="added"\} ([0-9.]+)', metrics)
        assert float(added) > 3, "hardly anything was loaded"
