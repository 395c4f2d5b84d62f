"""An adapter's tensors on the host, and the pool of lanes that they are copied into.

Host form: A as stored, [rank, in_features]; B transposed, [rank, out_features], already multiplied
by the module's scale, so that a lane is one row of each and kernels never see a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.models.families import ModelConfig
from loramux.engine.types import AdapterSpec, LoraModule


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """One wrapped linear layer of an adapter."""

    a: Tensor  # [rank, in_features]
    b: Tensor  # [rank, out_features], scale folded in


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """All of an adapter's weights in host memory, by module path."""

    digest: str
    rank: int
    modules: dict[str, ModuleWeights]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules.values())


class LanePool:
    """The device tensors of all lanes: one `SiteLanes` a layer and site, allocated once."""

    def __init__(
        self, config: ModelConfig, num_lanes: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self.num_lanes = num_lanes
        self._sites: dict[tuple[int, str], SiteLanes] = {}
        if num_lanes == 0:
            return
        for layer in range(config.num_layers):
            for site in config.sites:
                widths = [part.out_features for part in site.parts]
                self._sites[layer, site.name] = SiteLanes(
                    a=torch.zeros((num_lanes, len(widths), site.in_features), dtype=dtype, device=device),
                    b=[torch.zeros((num_lanes, width), dtype=dtype, device=device) for width in widths],
                    offsets=[sum(widths[:i]) for i in range(len(widths) + 1)],
                )

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(s.a.nbytes + sum(b.nbytes for b in s.b) for s in self._sites.values())

    def site(self, layer: int, name: str) -> SiteLanes | None:
        """The lanes of one site; None on a server without LoRA."""
        return self._sites.get((layer, name))

    def write(self, adapter: HostAdapter, span: LaneSpan) -> None:
        """Put an adapter into its lanes; rows and sites that it does not use become zero."""
        for layer in range(self._config.num_layers):
            prefix = self._config.layer_prefix(layer)
            for site in self._config.sites:
                lanes = self._sites[layer, site.name]
                for index, part in enumerate(site.parts):
                    a = lanes.a[span.first : span.end, index]
                    b = lanes.b[index][span.first : span.end]
                    module = adapter.modules.get(prefix + part.module)
                    rank = 0
                    if module is not None:
                        rank = module.a.shape[0]
                        a[:rank].copy_(module.a, non_blocking=True)
                        b[:rank].copy_(module.b, non_blocking=True)
                    a[rank:].zero_()
                    b[rank:].zero_()


def read_adapter(spec: AdapterSpec, config: ModelConfig, dtype: torch.dtype) -> HostAdapter:
    """Read an inspected adapter into host memory, in the dtype of the lanes.

    Raises:
        AdapterNotFound: a file is gone since the inspection.
        AdapterIncompatible: a file changed since the inspection, or holds a number that is not
            finite (which would reach other adapters' rows through a masked product).
    """
    _check_unchanged(spec)
    sites = config.lora_sites()
    modules: dict[str, ModuleWeights] = {}
    for module, a, b in _tensors(spec):
        site = sites.get(module.module)
        expected = site and ((module.rank, site.in_features), (site.out_features, module.rank))
        if expected != (tuple(a.shape), tuple(b.shape)):
            raise AdapterIncompatible(
                f"tensors of {module.module} in {Path(spec.path).name} have shapes {list(a.shape)} and "
                f"{list(b.shape)}, which is not what its inspection saw"
            )
        weights = ModuleWeights(
            a.to(dtype).contiguous(), (b.float() * module.scale).t().contiguous().to(dtype)
        )
        for key, tensor in ((module.key_a, weights.a), (module.key_b, weights.b)):
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterIncompatible(
                    f"tensor {key} of the adapter holds numbers that are not finite in {dtype}"
                )
        modules[module.module] = weights
    _check_unchanged(spec)  # again: it may have been rewritten while it was read
    return HostAdapter(spec.digest, spec.rank, modules)


def _check_unchanged(spec: AdapterSpec) -> None:
    """The digest was computed over these files; other bytes under it would be the wrong weights."""
    for file in spec.files:
        try:
            status = (Path(spec.path) / file.name).stat()
        except OSError:
            raise AdapterNotFound(f"No adapter found for {spec.path}: its files are gone") from None
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise AdapterIncompatible(
                f"{file.name} of the adapter changed while it was being loaded; load it again"
            )


def _tensors(spec: AdapterSpec) -> Iterator[tuple[LoraModule, Tensor, Tensor]]:
    folder = Path(spec.path)
    handles: dict[str, Any] = {}
    try:
        for module in spec.modules:
            if module.file not in handles:
                handles[module.file] = safe_open(folder / module.file, framework="pt")
            handle = handles[module.file]
            yield module, handle.get_tensor(module.key_a), handle.get_tensor(module.key_b)
    except FileNotFoundError:
        raise AdapterNotFound(f"No adapter found for {spec.path}: its files are gone") from None
    except (SafetensorError, OSError) as error:
        raise AdapterIncompatible(f"the adapter's weights cannot be read: {error}") from None
