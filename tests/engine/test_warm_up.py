"""No request waits for a kernel to be compiled: the engine compiles all of them before it is ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.engine.test_adapter_residency import start
from tests.tiny_models import make_tiny

SERVE = """
import json, sys
from pathlib import Path

from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import write_adapter
from tests.engine.test_adapter_residency import alone, finish, request, start

model, folder, cache = (Path(argument) for argument in sys.argv[1:])
files = lambda: sorted(path.name for path in cache.rglob("*.nb?"))
engine = start(model, num_threads=2, dtype="bfloat16")
found = [files()]
sites = engine.info.lora_sites
spec = inspect_adapter(write_adapter(folder, sites, rank=8, seed=1), sites, max_lora_rank=64)
engine.load_adapter(spec)
for digest in (None, spec.digest):
    alone(engine, [1, 2, 3], digest)
    alone(engine, [1, 2, 3] * 66, digest)
    for i in range(20):
        engine.add_request(request(f"r{i}", [i, 2, 3], digest))
    engine.step()
    for count in (1, 66):  # prompts beside sequences that decode
        engine.add_request(request(f"p{count}", [1, 2, 3] * count, digest))
        engine.step()
    finish(engine, {})
    engine.add_request(request("one", [1, 2, 3], digest))
    engine.step()
    engine.add_request(request("another", [1, 2, 3], digest))
    finish(engine, {})
found.append(files())
engine.close()
print(json.dumps(found))
"""


def test_no_kernel_is_compiled_for_a_request(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", head_dim=32)
    cache = tmp_path / "cache"
    arguments = [str(model), str(tmp_path / "adapter"), str(cache)]

    process = subprocess.run(
        [sys.executable, "-c", SERVE, *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 0, process.stderr
    ready, served = json.loads(process.stdout.splitlines()[-1])
    assert any("attend" in name for name in ready)
    assert served == ready


def test_an_engine_for_single_tokens_starts(tmp_path: Path) -> None:
    start(make_tiny("llama", tmp_path / "model"), max_model_len=1).close()
