"""Read a checkpoint's safetensors files by name, and account for every tensor in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loramux.engine.config import EngineConfig
from loramux.engine.errors import AdapterIncompatible, UnsupportedModel
from loramux.engine.models.dummy_weights import DummyWeights
from loramux.engine.models.families import HEAD_MODULE, ModelConfig
from loramux.engine.parallel.shard import Piece, Shard

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
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
    """The tensors of a model folder; memory-mapped, read one by one, each once.

    Args:
        pieces: of some tensors, by name, the part to read; `shape` is the part's everywhere.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        pieces: Mapping[str, Piece] = MappingProxyType({}),
    ) -> None:
        self._pieces = pieces
        self._dtype = dtype
        self._device = device
        self._files = {}
        self._where: dict[str, Path] = {}
        self._used: set[str] = set()  # tensors that have a place, here or on another rank
        for path in _weight_files(folder):
            try:
                handle: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UnsupportedModel(f"{path} cannot be read: {error}", param="model") from None
            self._files[path] = handle
            self._where.update(dict.fromkeys(handle.keys(), path))
        self._used.update(stored for name in pieces if (stored := self._resolve(name)) is not None)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return self._resolve(name) is not None

    def __len__(self) -> int:
        return len(self._where)

    def take(self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
        """See `WeightSource`."""
        return self._stored(name, shape).to(self._device, dtype or self._dtype)

    def fill(self, out: Tensor, name: str) -> None:
        """See `WeightSource`."""
        out.copy_(self._stored(name, tuple(out.shape)))

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

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._resolve(name)
        if stored is None:
            raise UnsupportedModel(f"the checkpoint lacks the tensor {name}", param="model")
        lazy = self._files[self._where[stored]].get_slice(stored)
        found, piece = tuple(lazy.get_shape()), self._pieces.get(name)
        if found != (piece.shape if piece else shape):
            raise UnsupportedModel(
                f"tensor {stored} has shape {list(found)}, config.json implies"
                f" {list(piece.shape if piece else shape)}",
                param="model",
            )
        self._used.add(stored)
        tensor: Tensor = lazy[piece.index] if piece else self._files[self._where[stored]].get_tensor(stored)
        assert tuple(tensor.shape) == shape
        return tensor

    def _resolve(self, name: str) -> str | None:
        """The stored name: as given, or without the leading `model.` that some exports leave out."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self._where:
                return candidate
        return None


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
    with Checkpoint(Path(config.model), dtype=dtype, device=device, pieces=shard.pieces) as checkpoint:
        yield checkpoint


def head_weight(config: ModelConfig, checkpoint: WeightSource) -> str:
    """Name of the tensor that the output head uses: its own, or the embedding's where they are tied.

    A checkpoint that says "tied" but brings a head of its own with other numbers is not tied, as in
    transformers 5.
    """
    own, shared = f"{HEAD_MODULE}.weight", f"{config.embedding_module}.weight"
    if own not in checkpoint:
        return shared
    if not config.tie_embeddings:
        return own
    shape = (config.vocab_size, config.embed_dim)
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
            files = [(path, path.stat()) for path in _weight_files(self._folder)]
        except (OSError, UnsupportedModel):
            return None
        return [(path, status.st_size, status.st_mtime_ns) for path, status in files]


def _weight_files(folder: Path) -> Iterator[Path]:
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
