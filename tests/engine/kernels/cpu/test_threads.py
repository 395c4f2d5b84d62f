"""Each compute thread has a core of its own; threads beside them run anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loramux.engine.kernels.cpu.product import is_available

ROOT = Path(__file__).parents[4]
PROGRAM = """
import json, os, sys, threading

os.sched_setaffinity(0, json.loads(sys.argv[1]))

import torch

from loramux.engine.background import roam
from loramux.engine.kernels.cpu.threads import bind

def masks():
    return sorted(sorted(os.sched_getaffinity(int(task))) for task in tasks)

torch.set_num_threads(int(sys.argv[2]))
torch.ones(1 << 20).exp()
is_bound = bind()
tasks = os.listdir("/proc/self/task")
bound = masks()
beside = []

def run():
    beside.append(sorted(os.sched_getaffinity(0)))
    roam()
    beside.append(sorted(os.sched_getaffinity(0)))

thread = threading.Thread(target=run)
thread.start()
thread.join()
torch.ones(1 << 20).exp()
print(json.dumps([is_bound, sorted(os.sched_getaffinity(0)), bound, beside, masks()]))
"""


def run(num_threads: int, **environment: str) -> list[object]:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cores), str(num_threads)],
        env={**inherited, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    answer: list[object] = json.loads(done.stdout)
    return answer


def test_a_team_of_two_has_a_core_each() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]

    is_bound, own, bound, beside, later = run(2)

    assert is_bound
    assert own == [first]
    assert isinstance(bound, list)
    assert [first] in bound
    assert [second] in bound
    assert beside == [[first], [first, second]]
    assert later == bound  # the same threads still


@pytest.mark.skipif(not is_available(), reason="needs AVX512-BF16 without AMX")
def test_one_thread_is_enough_where_no_more_is_wanted() -> None:
    program = """
import os
import torch
from loramux.engine.kernels.cpu.product import PackedLinear
from loramux.engine.kernels.cpu.threads import use_threads

use_threads(1)
before = len(os.listdir("/proc/self/task"))
PackedLinear(torch.ones(512, 512, dtype=torch.bfloat16), None)(torch.ones(4, 512, dtype=torch.bfloat16))
torch.ones(1 << 20).exp()
print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "0"


@pytest.mark.parametrize(("num_threads", "environment"), [(1, {}), (2, {"OMP_PROC_BIND": "false"}), (3, {})])
def test_other_teams_and_the_operators_choice_are_left_alone(
    num_threads: int, environment: dict[str, str]
) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]

    is_bound, own, bound, _, _ = run(num_threads, **environment)

    assert not is_bound
    assert own == cores
    assert isinstance(bound, list)
    assert all(mask == cores for mask in bound)
