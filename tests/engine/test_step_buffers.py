"""One buffer for all facts of a step: host fields, one copy, device tensors at fixed addresses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux.engine.step_buffers import ALIGNMENT, StepBuffers

FIELDS = {
    "block_tables": ((6, 5), np.int32),
    "token_ids": ((7,), np.int32),
    "temperature": ((3,), np.float32),
    "seed": ((3,), np.int64),
}
DEVICES = [
    torch.device("cpu"),
    pytest.param(torch.device("cuda"), marks=[pytest.mark.gpu]),
]


@pytest.fixture(params=DEVICES)
def buffers(request: pytest.FixtureRequest) -> StepBuffers:
    if request.param.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return StepBuffers(FIELDS, request.param)


def test_what_is_written_arrives_under_the_same_name_shape_and_type(buffers: StepBuffers) -> None:
    host = buffers.next_slot()
    for number, (name, (shape, _)) in enumerate(FIELDS.items()):
        host[name][...] = np.arange(np.prod(shape)).reshape(shape) * (number + 1)
    buffers.upload()

    for number, (name, (shape, dtype)) in enumerate(FIELDS.items()):
        found = buffers.device[name].cpu().numpy()
        assert found.dtype == dtype
        assert np.array_equal(found, np.arange(np.prod(shape)).reshape(shape) * (number + 1))


def test_nothing_arrives_before_the_upload(buffers: StepBuffers) -> None:
    buffers.next_slot()["token_ids"][:] = 9

    assert not buffers.device["token_ids"].any()


def test_filling_the_next_slot_leaves_the_uploaded_step_alone(buffers: StepBuffers) -> None:
    buffers.next_slot()["seed"][:] = 1
    buffers.upload()
    buffers.next_slot()["seed"][:] = 2

    assert buffers.device["seed"].tolist() == [1, 1, 1]
    buffers.upload()
    assert buffers.device["seed"].tolist() == [2, 2, 2]


@pytest.mark.gpu
def test_the_first_step_arrives_although_the_device_was_busy_when_the_buffers_were_made() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # cycles
    buffers = StepBuffers(FIELDS, torch.device("cuda"))
    buffers.next_slot()["seed"][:] = 7
    buffers.upload()

    assert buffers.device["seed"].tolist() == [7, 7, 7]


def test_device_tensors_never_move_and_are_aligned(buffers: StepBuffers) -> None:
    before = {name: tensor.data_ptr() for name, tensor in buffers.device.items()}
    for _ in range(3):
        buffers.next_slot()
        buffers.upload()

    assert {name: tensor.data_ptr() for name, tensor in buffers.device.items()} == before
    base = min(before.values())
    assert all((pointer - base) % ALIGNMENT == 0 for pointer in before.values())


def test_only_the_leading_rows_of_the_largest_field_are_copied(buffers: StepBuffers) -> None:
    host = buffers.next_slot()
    for array in host.values():
        array[...] = 3
    buffers.upload({"block_tables": 2})

    assert buffers.device["block_tables"].sum(dim=1).tolist() == [15, 15, 0, 0, 0, 0]
    assert buffers.device["token_ids"].tolist() == [3] * 7
    assert buffers.device["seed"].tolist() == [3] * 3
