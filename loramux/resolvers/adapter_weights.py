"""The safetensors file or files of an adapter: which tensors are where, and their digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import BinaryIO, Final, NamedTuple

from loramux.engine.types import AdapterFile
from loramux.resolvers.adapter_folder import INDEX_FILE, WEIGHTS_FILE, AdapterFolder
from loramux.resolvers.refusal import examples, refused, shown
from loramux.resolvers.safetensors_header import MAX_HEADER_BYTES, TensorEntry, read_header

_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_SHARD_NAME: Final = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)  # a plain name: no separator, no ".."
_MAX_SHARDS: Final = 64  # all of them are open at once
_CHUNK_BYTES: Final = 1 << 20


class WeightsFile(NamedTuple):
    """An open safetensors file; `name` is relative to the adapter's folder."""

    name: str
    handle: BinaryIO


class AdapterTensor(NamedTuple):
    """One tensor of an adapter, not read yet."""

    key: str  # as the file has it
    entry: TensorEntry
    file: WeightsFile


def open_weights(folder: AdapterFolder, stack: contextlib.ExitStack) -> list[AdapterTensor]:
    """Read the header of every weights file; the files stay open as long as `stack`.

    Raises:
        AdapterIncompatible: there is no safetensors file, or one is unsafe, truncated or corrupt,
            or the shards do not hold what their index says.
    """
    if folder.has(WEIGHTS_FILE):
        return _open_file(folder, WEIGHTS_FILE, stack)
    if folder.has(INDEX_FILE):
        return _open_shards(folder, stack)
    pickles = [name for name in _PICKLES if folder.has(name)]
    if pickles:
        raise refused(
            f"the adapter has only {pickles[0]}, a pickle, which can run code when it is read: only"
            f" safetensors is read. Convert it with PEFT: load it once with PeftModel.from_pretrained"
            f" and save it with save_pretrained, which writes {WEIGHTS_FILE}",
            param=pickles[0],
        )
    raise refused(f"the adapter's folder has no {WEIGHTS_FILE}", param=WEIGHTS_FILE)


def weights_files(files: Iterable[WeightsFile]) -> list[AdapterFile]:
    """Size and time of each file, before its tensors are read."""
    found = {}
    for file in files:
        if file.name not in found:
            status = os.fstat(file.handle.fileno())
            found[file.name] = AdapterFile(file.name, status.st_size, status.st_mtime_ns)
    return list(found.values())


def _open_file(folder: AdapterFolder, name: str, stack: contextlib.ExitStack) -> list[AdapterTensor]:
    file = WeightsFile(name, stack.enter_context(folder.open(name)))
    return [AdapterTensor(key, entry, file) for key, entry in read_header(file.handle, name).items()]


def _open_shards(folder: AdapterFolder, stack: contextlib.ExitStack) -> list[AdapterTensor]:
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values()))
    if len(names) > _MAX_SHARDS:
        raise refused(
            f"{INDEX_FILE} names {len(names)} files, more than the limit of {_MAX_SHARDS}", param=INDEX_FILE
        )
    tensors = [tensor for name in names for tensor in _open_file(folder, name, stack)]
    unlisted = [tensor.key for tensor in tensors if weight_map.get(tensor.key) != tensor.file.name]
    if unlisted:
        raise refused(
            f"{INDEX_FILE} does not list {len(unlisted)} tensors of its files, e.g. {examples(unlisted)}",
            param=INDEX_FILE,
        )
    lacking = weight_map.keys() - {tensor.key for tensor in tensors}
    if lacking:
        raise refused(
            f"{INDEX_FILE} lists {len(lacking)} tensors that its files lack, e.g. {examples(lacking)}",
            param=INDEX_FILE,
        )
    return tensors


def _weight_map(folder: AdapterFolder) -> dict[str, str]:
    weight_map = folder.read_json(INDEX_FILE, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise refused(f"{INDEX_FILE} has no weight_map", param=INDEX_FILE)
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise refused(
                f"{INDEX_FILE}: {shown(name)} is not the plain name of a safetensors file in the folder",
                param=INDEX_FILE,
            )
        if not folder.has(name):
            raise refused(f"{INDEX_FILE} names {name}, which is missing", param=INDEX_FILE)
    return weight_map


def content_digest(
    scalings: Mapping[str, tuple[int, float]],
    tensors: Mapping[str, AdapterTensor],
    rows: Mapping[str, list[int]],
) -> str:
    """The sha256 that identifies an adapter's effect, whatever its folder, key prefixes or shards.

    Covers rank and scale of every module, the token ids of replaced rows, and dtype, shape and bytes
    of every tensor. A preamble gives all lengths, so that no two adapters can hash the same stream.

    Args:
        scalings: module -> (rank, scale).
        tensors: normalised key -> tensor; every file is read once.
        rows: table -> ids of the tokens whose rows are replaced.

    Raises:
        AdapterIncompatible: a file became shorter since its header was read.
    """
    ordered = sorted(tensors.items())
    content: dict[str, object] = {
        "format": "loramux-lora-1",
        "modules": [[name, rank, scale.hex()] for name, (rank, scale) in sorted(scalings.items())],
        "tensors": [[key, tensor.entry.dtype, tensor.entry.shape] for key, tensor in ordered],
    }
    if rows:
        content["rows"] = sorted(rows.items())
    preamble = json.dumps(content, separators=(",", ":")).encode()
    digest = hashlib.sha256(len(preamble).to_bytes(8, "little") + preamble)
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    for _, tensor in ordered:
        _update(digest, tensor, chunk)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensor: AdapterTensor, chunk: memoryview) -> None:
    position = tensor.entry.offset
    end = position + tensor.entry.nbytes
    name, handle = tensor.file
    while position < end:
        try:
            count = os.preadv(handle.fileno(), [chunk[: end - position]], position)
        except OSError as error:
            raise refused(f"{name} cannot be read: {error.strerror}", param=name) from error
        if count == 0:
            raise refused(f"{name} is truncated: it became shorter while it was read", param=name)
        digest.update(chunk[:count])
        position += count
