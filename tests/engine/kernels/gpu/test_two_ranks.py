"""Two ranks on the GPU's path: the same graphs, the same steps ahead, one rank that draws.

On a machine without a GPU both run the kernels under Triton's interpreter, which the second process inherits.
"""

from __future__ import annotations

import pytest

from tests.parity.driving import Answer, Served
from tests.parity.zoo import Checkpoint, make_checkpoint

LIMITS = {
    "num_kv_blocks": 16,
    "max_model_len": 32,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "num_lanes": 8,
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint("llama", tmp_path_factory.mktemp("two-ranks"))


def answers(served: Served) -> list[Answer]:
    """A base row and an adapter's; each step reads the tokens of the one before it."""
    requests = [
        served.request([5, 7, 9, 11, 13], None, max_tokens=3),
        served.request([6, 7, 9, 11, 13], "r8", max_tokens=4),
    ]
    try:
        return served.run(requests)
    finally:
        served.engine.close()


def test_recorded_steps_that_run_ahead_say_what_one_rank_says(checkpoint: Checkpoint) -> None:
    expected = answers(Served(checkpoint, ["r8"], kernels="torch", **LIMITS))
    steps = {"kernels": "triton", "cudagraph_capture_sizes": [2], "async_scheduling": True}
    served = Served(checkpoint, ["r8"], tensor_parallel_size=2, **LIMITS, **steps)
    runs_ahead = served.engine.runner.runs_ahead
    said = answers(served)

    assert runs_ahead
    assert [answer.tokens for answer in said] == [answer.tokens for answer in expected]
