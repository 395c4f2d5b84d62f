"""A model folder's safetensors files, and where in them each tensor lies."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loramux.engine.errors import UnsupportedModel

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class WeightFile:
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            UnsupportedModel: it cannot be read, or is not a safetensors file.
        """
        self.path = path
        self._begins = self._ends = 0  # addresses of what was mapped
        try:
            self._mapped: Any = safe_open(path, framework="pt")  # checks the header, too
            self.fd = os.open(path, os.O_RDONLY)
            self._header, self._begin = _header(self.fd)
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(f"{path} cannot be read: {error}", param="model") from None

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._header)

    def stored(self, name: str) -> StoredTensor:
        """How a tensor lies in the file.

        Raises:
            UnsupportedModel: its dtype is none that weights have.
        """
        own = self._header[name]
        if own["dtype"] not in _DTYPES:
            raise UnsupportedModel(f"tensor {name} has the unsupported dtype {own['dtype']}", param="model")
        return StoredTensor(_DTYPES[own["dtype"]], tuple(own["shape"]), self._begin + own["data_offsets"][0])

    def mapped(self, name: str) -> Tensor:
        """A tensor as stored, a view of the mapped file; not to be written to."""
        tensor: Tensor = self._mapped.get_tensor(name)
        if tensor.nbytes:
            begin = tensor.data_ptr()
            self._begins = min(self._begins or begin, begin)
            self._ends = max(self._ends, begin + tensor.nbytes)
        return tensor

    def read_ahead(self) -> None:
        """Ask the system to have the file in memory soon."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close it; tensors that were taken stay.

        One of them keeps all of the file mapped, most of which was only copied into another order. So its
        pages leave the process's memory; those that are read again come back from the system's cache.
        """
        _let_go(self.path, self._begins, self._ends)
        os.close(self.fd)
        self._mapped = None


def _let_go(path: Path, begin: int, end: int) -> None:
    """Give back the pages between two addresses of a mapped file, where the system can (Linux).

    Only if one mapping of this file covers them: tensors that are copies lie among other memory.
    """
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (end - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and size > 0 and _is_mapped(path, begin, begin + size):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _is_mapped(path: Path, begin: int, end: int) -> bool:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as mappings:
        for mapping in mappings:
            addresses, *_, name = mapping.rstrip("\n").split(maxsplit=5)
            low, high = (int(address, 16) for address in addresses.split("-"))
            if low <= begin and end <= high:
                return name == str(path.resolve())
    return False


def open_files(folder: Path) -> Iterator[WeightFile]:
    """Every file of a model folder.

    Raises:
        UnsupportedModel: there is none, or one cannot be read.
    """
    return map(WeightFile, weight_files(folder))


def _header(fd: int) -> tuple[dict[str, Any], int]:
    """Of a file that was checked: its tensors by name, and where their bytes begin."""
    size = int.from_bytes(os.pread(fd, 8, 0), "little")
    header: dict[str, Any] = json.loads(os.pread(fd, size, 8))
    header.pop("__metadata__", None)
    return header, 8 + size


def weight_files(folder: Path) -> Iterator[Path]:
    """The paths that a model folder's weights lie at.

    Raises:
        UnsupportedModel: there are none, or the index is malformed.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UnsupportedModel(f"{index} is malformed: {error!r}", param="model") from None
        for name in sorted(names):
            if Path(name).name != name or not (folder / name).is_file():
                raise UnsupportedModel(f"{index} names {name!r}, which is not in the folder", param="model")
            yield folder / name
    elif (folder / _SINGLE).is_file():
        yield folder / _SINGLE
    else:
        raise UnsupportedModel(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}; only safetensors weights are read", param="model"
        )
