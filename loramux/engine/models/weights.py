"""Read a checkpoint's safetensors files by name, and account for every tensor in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Protocol

import torch
from torch import Tensor

from loramux.engine.config import EngineConfig
from loramux.engine.errors import AdapterIncompatible, UnsupportedModel
from loramux.engine.models.device_reader import DeviceReader
from loramux.engine.models.dummy_weights import DummyWeights
from loramux.engine.models.families import HEAD_MODULE, ModelConfig
from loramux.engine.models.weight_files import StoredTensor, WeightFile, open_files, weight_files
from loramux.engine.parallel.shard import Piece, Shard

# Tensors that carry nothing: old checkpoints stored RoPE's frequencies.
_IGNORED: Final = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|attn\.bias$")


class WeightSource(Protocol):
    """Where a model's tensors come from, in the model's dtype and on its device."""

    def __contains__(self, name: str) -> bool: ...

    def take(self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in the model's dtype unless another one is wanted.

        Raises:
            UnsupportedModel: it is missing, or its shape is not what config.json implies.
        """
        ...

    def fill(self, out: Tensor, name: str) -> None:
        """Write one tensor into `out`, which has its shape and may be a slice of a larger one.

        Raises:
            UnsupportedModel: as for `take`.
        """
        ...

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor to fill."""
        ...

    def check_all_used(self, *, may_remain: tuple[str, ...]) -> None:
        """Refuse tensors that the model has no place for."""
        ...


class Checkpoint:
    """The tensors of a model folder, read one by one: memory-mapped for a CPU, in chunks for a GPU."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        pieces: Mapping[str, Piece] = MappingProxyType({}),
        reader: DeviceReader | None = None,
    ) -> None:
        """Args:
        pieces: of some tensors, by name, the part to read; `shape` is the part's everywhere.
        reader: how tensors come to the device; None = copied from the mapped file.
        """
        self._pieces = pieces
        self._dtype = dtype
        self._device = device
        self._reader = reader
        self._files: list[WeightFile] = []
        self._where: dict[str, WeightFile] = {}
        self._used: set[str] = set()  # tensors that have a place, here or on another rank
        for file in open_files(folder):
            self._files.append(file)
            self._where.update(dict.fromkeys(file.names, file))
            if reader is not None:
                file.read_ahead()
        self._used.update(stored for name in pieces if (stored := self._resolve(name)) is not None)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.close()
        for file in self._files:
            file.close()

    def __contains__(self, name: str) -> bool:
        return self._resolve(name) is not None

    def __len__(self) -> int:
        return len(self._where)

    def take(self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
        """See `WeightSource`."""
        if self._reader is None:
            return self._find(name, shape).mapped().to(self._device, dtype or self._dtype)
        out = torch.empty(shape, dtype=dtype or self._dtype, device=self._device)
        self.fill(out, name)
        return out

    def fill(self, out: Tensor, name: str) -> None:
        """See `WeightSource`."""
        found = self._find(name, tuple(out.shape))
        if self._reader is None:
            out.copy_(found.mapped())
            return
        own = found.rows()
        is_direct = own.dtype == out.dtype and own.shape == out.shape and out.is_contiguous()
        target = out if is_direct else torch.empty(own.shape, dtype=own.dtype, device=self._device)
        try:
            self._reader.read(found.file.fd, own.offset, target)
        except OSError as error:
            raise UnsupportedModel(f"{found.file.path} cannot be read: {error}", param="model") from None
        if not is_direct:
            out.copy_(target[:, found.piece.columns] if target.dim() > 1 else target)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def check_all_used(self, *, may_remain: tuple[str, ...]) -> None:
        """See `WeightSource`."""
        rest = [n for n in self._where if n not in self._used and not _IGNORED.search(n)]
        unknown = sorted(name for name in rest if name not in may_remain)
        if unknown:
            raise UnsupportedModel(
                f"{len(unknown)} tensors of the checkpoint have no place in this architecture, "
                f"e.g. {', '.join(unknown[:3])}",
                param="model",
            )

    def _find(self, name: str, shape: tuple[int, ...]) -> _Found:
        stored = self._resolve(name)
        if stored is None:
            raise UnsupportedModel(f"the checkpoint lacks the tensor {name}", param="model")
        file, piece = self._where[stored], self._pieces.get(name)
        own, expected = file.stored(stored).shape, piece.shape if piece else shape
        if own != expected:
            raise UnsupportedModel(
                f"tensor {stored} has shape {list(own)}, config.json implies {list(expected)}", param="model"
            )
        self._used.add(stored)
        return _Found(file, stored, piece or Piece(shape))

    def _resolve(self, name: str) -> str | None:
        """The stored name: as given, or without the leading `model.` that some exports leave out."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self._where:
                return candidate
        return None


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a tensor lies, and which part of it is wanted."""

    file: WeightFile
    name: str  # in the file
    piece: Piece

    def mapped(self) -> Tensor:
        """The part, contiguous; of the mapped file where it lies there like that."""
        return self.file.mapped(self.name)[self.piece.index].contiguous()

    def rows(self) -> StoredTensor:
        """The rows of the part, with all their columns, which lie behind each other in the file."""
        whole = self.file.stored(self.name)
        rows = range(*self.piece.rows.indices(whole.shape[0]))
        row_bytes = math.prod(whole.shape[1:]) * whole.dtype.itemsize
        return StoredTensor(whole.dtype, (len(rows), *whole.shape[1:]), whole.offset + rows.start * row_bytes)


@contextmanager
def open_weights(
    config: EngineConfig, shard: Shard, *, dtype: torch.dtype, device: torch.device
) -> Iterator[WeightSource]:
    """The tensors of this rank's part of the model, as `--load-format` says.

    Raises:
        UnsupportedModel: the folder's weights cannot be read.
    """
    if config.load_format == "dummy":
        yield DummyWeights(shard.own, dtype=dtype, device=device, seed=config.seed)
        return
    reader = DeviceReader(device) if device.type == "cuda" else None
    with Checkpoint(
        Path(config.model), dtype=dtype, device=device, pieces=shard.pieces, reader=reader
    ) as checkpoint:
        yield checkpoint


def head_weight(config: ModelConfig, checkpoint: WeightSource, num_rows: int) -> str:
    """Name of the tensor that the output head uses: its own, or the embedding's where they are tied.

    A checkpoint that says "tied" but brings a head of its own with other numbers is not tied, as in
    transformers 5.

    Args:
        num_rows: of each table that `checkpoint` reads.
    """
    own, shared = f"{HEAD_MODULE}.weight", f"{config.embedding_module}.weight"
    if own not in checkpoint:
        return shared
    if not config.tie_embeddings:
        return own
    shape = (num_rows, config.embed_dim)
    return shared if torch.equal(checkpoint.take(own, shape), checkpoint.take(shared, shape)) else own


class BaseWeights:
    """The base model's tensors as they lie on disk, for adapters whose arithmetic needs them.

    The device may hold them in an order that cannot be read back, and a second copy in memory would
    cost as much as the model; so they are read again, through the page cache, when such an adapter is
    loaded.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        """Remember what the files look like now, when the model is read from them.

        Args:
            folder: None if the model was not read from files.
        """
        self._folder = folder
        self._dtype = dtype
        self._seen = self._look()

    @contextmanager
    def open(self) -> Iterator[Checkpoint]:
        """The checkpoint on the CPU, in the model's dtype.

        Raises:
            AdapterIncompatible: the files are not those that the model was read from.
        """
        if self._folder is None:
            raise AdapterIncompatible(
                "this adapter's arithmetic needs the base model's files, and --load-format dummy reads none"
            )
        if self._look() != self._seen:
            raise AdapterIncompatible(
                "the base model's files changed since the engine was started, and this adapter cannot be"
                " loaded without them; restart the engine"
            )
        with Checkpoint(self._folder, dtype=self._dtype, device=torch.device("cpu")) as checkpoint:
            yield checkpoint

    def _look(self) -> list[tuple[Path, int, int]] | None:
        if self._folder is None:
            return None
        try:
            files = [(path, path.stat()) for path in weight_files(self._folder)]
        except (OSError, UnsupportedModel):
            return None
        return [(path, status.st_size, status.st_mtime_ns) for path, status in files]
