"""The tensors of an inspected adapter, read from its files.

The inspection has parsed and checked the safetensors header already and says where every tensor lies, so
a file is read here in one piece, outside the interpreter's lock, and cut up without a copy.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.engine.types import AdapterSpec, TensorRef

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class AdapterFiles:
    """The weights files of one adapter, each read whole when its first tensor is asked for.

    Tensors are views of the bytes of the whole file: whoever keeps one makes a copy.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        self._spec = spec
        self._folder = Path(spec.path)
        self._contents: dict[str, memoryview] = {}

    def __enter__(self) -> AdapterFiles:
        self._check_unchanged()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contents.clear()
        if error is None:
            self._check_unchanged()  # again: it may have been rewritten while it was read

    def get(self, ref: TensorRef, shape: tuple[int, ...]) -> Tensor:
        """One tensor as stored.

        Raises:
            AdapterNotFound: the file is gone since the inspection.
            AdapterIncompatible: it cannot be read, or is not what the inspection saw.
        """
        if ref.file not in self._contents:
            self._contents[ref.file] = self._read(ref.file)
        content = self._contents[ref.file]
        dtype, count, offset = _DTYPES[ref.dtype], math.prod(shape), ref.offset
        if offset + count * dtype.itemsize > len(content):
            raise AdapterIncompatible(f"{ref.file} of the adapter is shorter than its inspection saw")
        if offset % dtype.itemsize:  # float32 behind an odd number of halves
            content, offset = memoryview(bytearray(content[offset : offset + count * dtype.itemsize])), 0
        return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).view(shape)

    def read_into(self, name: str, offset: int, out: Tensor) -> None:
        """Fill a tensor of bytes with those of a file from `offset` on. Safe in several threads.

        Raises:
            AdapterNotFound, AdapterIncompatible: as for `get`.
        """
        self._fill(name, offset, memoryview(out.numpy().data))

    def _read(self, name: str) -> memoryview:
        size = next(own.size for own in self._spec.files if own.name == name)
        content = memoryview(torch.empty(size, dtype=torch.uint8).numpy().data)  # no time spent on zeros
        self._fill(name, 0, content)
        return content

    def _fill(self, name: str, offset: int, out: memoryview) -> None:
        done = 0
        try:
            with (self._folder / name).open("rb", buffering=0) as file:
                file.seek(offset)
                while done < len(out) and (step := file.readinto(out[done:])):
                    done += step
        except FileNotFoundError:
            raise self._gone() from None
        except OSError as error:
            raise AdapterIncompatible(f"the adapter's weights cannot be read: {error}") from None
        if done < len(out):
            raise AdapterIncompatible(f"{name} of the adapter is shorter than its inspection saw")

    def _gone(self) -> AdapterNotFound:
        return AdapterNotFound(f"No adapter found for {self._spec.path}: its files are gone")

    def _check_unchanged(self) -> None:
        """The digest was computed over these files; other bytes under it would be the wrong weights."""
        for file in self._spec.files:
            try:
                status = (self._folder / file.name).stat()
            except OSError:
                raise self._gone() from None
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise AdapterIncompatible(
                    f"{file.name} of the adapter changed while it was being loaded; load it again"
                )


def check_finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself.

    Raises:
        AdapterIncompatible: it holds a number that is not finite, which would reach other adapters'
            rows through a masked product.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterIncompatible(
            f"{what} of the adapter holds numbers that are not finite in {tensor.dtype}"
        )
    return tensor
