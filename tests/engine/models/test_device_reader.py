"""Weights that come to the device in chunks are the weights of the files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from loramux.engine.errors import UnsupportedModel
from loramux.engine.models.device_reader import DeviceReader
from loramux.engine.models.weights import Checkpoint
from loramux.engine.parallel.shard import Piece
from tests.tiny_models import make_tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def reader() -> DeviceReader:
    return DeviceReader(DEVICE, chunk_bytes=1000, num_chunks=3)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_tensors_are_those_of_the_mapped_file(tmp_path: Path, reader: DeviceReader, stored: str) -> None:
    folder = make_tiny("llama", tmp_path, dtype=stored, shard_size="20KB")
    shapes = {Q: (48, 48), K: (24, 48), NORM: (48,)}
    with Checkpoint(folder, dtype=torch.bfloat16, device=torch.device("cpu")) as mapped:
        expected = {name: mapped.take(name, shape).clone() for name, shape in shapes.items()}

    chunked = Checkpoint(folder, dtype=torch.bfloat16, device=DEVICE, reader=reader)
    with torch.inference_mode(), chunked:
        taken = {name: chunked.take(name, shape) for name, shape in shapes.items()}
        below = chunked.empty((100, 48))
        below.zero_()
        chunked.fill(below[10:34], K)
        beside = chunked.empty((48, 100))
        chunked.fill(beside[:, 30:78], Q)

    for name in shapes:
        assert torch.equal(taken[name].cpu(), expected[name])
    assert torch.equal(below[10:34].cpu(), expected[K])
    assert not below[34:].any()
    assert torch.equal(beside[:, 30:78].cpu(), expected[Q])


def test_a_part_of_a_tensor_is_read(tmp_path: Path, reader: DeviceReader) -> None:
    folder = make_tiny("llama", tmp_path)
    pieces = {Q: Piece((48, 48), rows=slice(24, 48)), K: Piece((24, 48), columns=slice(12, 24))}
    with Checkpoint(folder, dtype=torch.float32, device=torch.device("cpu")) as mapped:
        rows, columns = mapped.take(Q, (48, 48))[24:].clone(), mapped.take(K, (24, 48))[:, 12:24].clone()

    with Checkpoint(folder, dtype=torch.float32, device=DEVICE, pieces=pieces, reader=reader) as chunked:
        assert torch.equal(chunked.take(Q, (24, 48)).cpu(), rows)
        assert torch.equal(chunked.take(K, (24, 12)).cpu(), columns)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, reader: DeviceReader) -> None:
    folder = make_tiny("llama", tmp_path)
    path = folder / "model.safetensors"
    checkpoint = Checkpoint(folder, dtype=torch.float32, device=DEVICE, reader=reader)
    os.truncate(path, path.stat().st_size // 10)

    with checkpoint, pytest.raises(UnsupportedModel, match=r"the file ends [0-9]+ bytes early"):
        checkpoint.take(NORM, (48,))
