"""The tensors of an inspected adapter, read from its files."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.engine.types import AdapterSpec, TensorRef


class AdapterFiles:
    """Open weights files of one adapter.

    Tensors are views of the mapped file: whoever keeps one makes a copy, or a later writer of the file
    would change it.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        self._spec = spec
        self._folder = Path(spec.path)
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> AdapterFiles:
        self._check_unchanged()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()
        if error is None:
            self._check_unchanged()  # again: it may have been rewritten while it was read

    def get(self, ref: TensorRef, shape: tuple[int, ...]) -> Tensor:
        """One tensor as stored.

        Raises:
            AdapterNotFound: the file is gone since the inspection.
            AdapterIncompatible: it cannot be read, or is not what the inspection saw.
        """
        try:
            if ref.file not in self._handles:
                self._handles[ref.file] = safe_open(self._folder / ref.file, framework="pt")
            tensor: Tensor = self._handles[ref.file].get_tensor(ref.key)
        except FileNotFoundError:
            raise self._gone() from None
        except (SafetensorError, OSError) as error:
            raise AdapterIncompatible(f"the adapter's weights cannot be read: {error}") from None
        if tuple(tensor.shape) != shape:
            raise AdapterIncompatible(
                f"tensor {ref.key} of {self._folder.name} has shape {list(tensor.shape)}, which is not "
                f"the {list(shape)} that its inspection saw"
            )
        return tensor

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
