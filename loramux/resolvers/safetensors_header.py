"""The header of a safetensors file, parsed from bytes that nobody has checked yet.

Layout: an unsigned 64-bit little-endian length N, N bytes of JSON, then the tensors' bytes. The JSON
maps a name to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the first
byte after the header; `__metadata__` maps strings to strings.

A file is accepted only if the tensors fill the rest of the file exactly: no gap, no overlap, every
range as long as dtype and shape say.

Source: the safetensors format description (README of the safetensors project).
"""

from __future__ import annotations

import math
import os
from typing import BinaryIO, Final, NamedTuple

from loramux.resolvers.adapter_folder import parse_json_object
from loramux.resolvers.refusal import refused, shown

# The format allows 100 MB. The largest adapters (two tensors for every expert of every layer) need
# 6 MB, and parsed JSON takes ten times its size in memory.
MAX_HEADER_BYTES: Final = 16 << 20
DTYPE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_DIMS: Final = 8
_MAX_DIM: Final = 1 << 40
_LENGTH_BYTES: Final = 8
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})


class TensorEntry(NamedTuple):
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # first byte, counted from the start of the file
    nbytes: int


def read_header(file: BinaryIO, name: str) -> dict[str, TensorEntry]:
    """Read and check the header of an open file; `name` is for messages.

    Raises:
        AdapterIncompatible: the file is truncated, corrupt or holds another dtype than
            F32, F16 and BF16.
    """
    size = os.fstat(file.fileno()).st_size
    start = _LENGTH_BYTES + _header_length(file, name, size)
    header = parse_json_object(_read(file, name, _LENGTH_BYTES, start), f"the header of {name}")
    _check_metadata(header.pop("__metadata__", None), name)
    entries = {key: _entry(key, value, name, start) for key, value in header.items()}
    _check_layout(entries, name, start, size)
    return entries


def _header_length(file: BinaryIO, name: str, size: int) -> int:
    if size < _LENGTH_BYTES:
        raise refused(f"{name} is truncated: it has only {size} bytes", param=name)
    length = int.from_bytes(_read(file, name, 0, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise refused(
            f"{name} is corrupt: its header claims {length} bytes, more than the limit of"
            f" {MAX_HEADER_BYTES} bytes",
            param=name,
        )
    if length > size - _LENGTH_BYTES:
        raise refused(
            f"{name} is truncated: its header claims {length} bytes, but the file has {size}",
            param=name,
        )
    return length


def _read(file: BinaryIO, name: str, begin: int, end: int) -> bytes:
    chunks = []
    try:
        while begin < end:
            chunk = os.pread(file.fileno(), end - begin, begin)
            if not chunk:
                raise refused(f"{name} is truncated: it became shorter while it was read", param=name)
            chunks.append(chunk)
            begin += len(chunk)
    except OSError as error:
        raise refused(f"{name} cannot be read: {error.strerror}", param=name) from error
    return b"".join(chunks)


def _check_metadata(metadata: object, name: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refused(f"{name} is corrupt: __metadata__ must map strings to strings", param=name)


def _entry(key: str, value: object, name: str, start: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        raise refused(
            f"{name} is corrupt: tensor {shown(key)} needs dtype, shape and data_offsets", param=name
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise refused(
            f"{name}: tensor {shown(key)} has dtype {shown(dtype)}; only F32, F16 and BF16 are"
            " supported in an adapter",
            param=name,
        )
    if not _is_sizes(shape) or len(shape) > _MAX_DIMS or max(shape, default=0) > _MAX_DIM:
        raise refused(f"{name} is corrupt: tensor {shown(key)} has shape {shown(shape)}", param=name)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refused(f"{name} is corrupt: tensor {shown(key)} has data_offsets {shown(offsets)}", param=name)
    nbytes = offsets[1] - offsets[0]
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != needed:
        raise refused(
            f"{name} is corrupt: tensor {shown(key)} ({dtype}, shape {shape}) needs {needed} bytes,"
            f" its data_offsets span {shown(nbytes)}",
            param=name,
        )
    return TensorEntry(dtype, tuple(shape), start + offsets[0], nbytes)


def _is_sizes(value: object) -> bool:
    """True for a list of ints that are not negative; JSON's true and false are no sizes."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(entries: dict[str, TensorEntry], name: str, start: int, size: int) -> None:
    position = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            what = "overlaps another one" if entry.offset < position else "leaves a gap before it"
            raise refused(f"{name} is corrupt: tensor {shown(key)} {what}", param=name)
        position += entry.nbytes
    if position > size:
        raise refused(
            f"{name} is truncated: its tensors need {shown(position)} bytes, the file has {size}", param=name
        )
    if position < size:
        raise refused(f"{name} is corrupt: {size - position} bytes follow the last tensor", param=name)
