"""An adapter's tensors on the host, and the pool of lanes that they are copied into.

Host form: A as stored, [rank, in_features]; B transposed, [rank, out_features], already multiplied
by the module's scale (with DoRA, also by its gain), so that a lane is one row of each and kernels never
see a scale. What an adapter changes beyond linear layers is in its `AdapterTables`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loramux.engine.adapters.files import AdapterFiles, check_finite
from loramux.engine.adapters.lane_memory import LaneLayout, site_lanes
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.tables import (
    check_copies,
    column_norms,
    gains_by_site,
    row_norms,
    table_changes,
    table_weight,
)
from loramux.engine.kernels.cpu.dtypes import takes
from loramux.engine.kernels.cpu.lora import LoraKernel
from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.kernels.tables import AdapterTables, TableChange
from loramux.engine.models.families import HEAD_MODULE, ModelConfig
from loramux.engine.models.weights import BaseWeights, Checkpoint
from loramux.engine.parallel.shard import Shard
from loramux.engine.types import AdapterSpec, LoraModule, LoraSite


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
    modules: dict[str, ModuleWeights]  # of the layers
    tables: AdapterTables = field(default_factory=AdapterTables)
    other_ranks_bytes: int = 0  # of the parts that the other ranks of a tensor-parallel engine hold

    @property
    def nbytes(self) -> int:
        """Bytes held, on all ranks."""
        own = self.tables.nbytes + sum(m.a.nbytes + m.b.nbytes for m in self.modules.values())
        return own + self.other_ranks_bytes


class LanePool:
    """The device tensors of all lanes: one `SiteLanes` a layer and site, allocated once."""

    def __init__(
        self,
        config: ModelConfig,
        num_lanes: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layout: LaneLayout = LaneLayout.APART,
    ) -> None:
        self._config = config
        self.num_lanes = num_lanes
        self.dtype = dtype
        widths = [part.out_features for site in config.sites for part in site.parts]
        is_compiled = takes(
            torch.empty(0, dtype=dtype, device=device), *widths, *(site.in_features for site in config.sites)
        )
        most_parts = max(len(site.parts) for site in config.sites)
        self.kernel = (
            LoraKernel(dtype, most_parts, max(widths)) if is_compiled and num_lanes else None
        )  # of the rows, if it serves
        self._sites: dict[tuple[int, str], SiteLanes] = {}
        if num_lanes == 0:
            return
        for layer in range(config.num_layers):
            for index, site in enumerate(config.sites):
                self._sites[layer, site.name] = site_lanes(
                    site,
                    layer * len(config.sites) + index,
                    num_lanes,
                    layout,
                    dtype=dtype,
                    device=device,
                )

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(s.a.nbytes + sum(b.nbytes for b in s.b) for s in self._sites.values())

    @property
    def any_lanes(self) -> Tensor:
        """Some lanes; of the same dtype as all of them."""
        return next(iter(self._sites.values())).a

    @property
    def sites(self) -> Iterable[SiteLanes]:
        """The lanes of every site."""
        return self._sites.values()

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
                    lanes.ranks[index, span.first] = rank
                    a[rank:].zero_()
                    b[rank:].zero_()


def read_adapter(spec: AdapterSpec, shard: Shard, dtype: torch.dtype, base: BaseWeights) -> HostAdapter:
    """Read this rank's part of an inspected adapter into host memory, in the dtype of the lanes.

    Raises:
        AdapterNotFound: a file is gone since the inspection.
        AdapterIncompatible: a file changed since the inspection, holds a number that is not finite, or
            the base model's files, which DoRA needs, are not those it was read from.
    """
    needs_base = any(module.magnitude for module in spec.modules) or any(
        table.kind == "copy" for table in spec.tables
    )
    with AdapterFiles(spec) as files, base.open() if needs_base else nullcontext() as checkpoint:
        return _Reader(spec, shard, dtype, files, checkpoint).read()


class _Reader:
    """Reads one adapter; `checkpoint` is there if anything of the adapter needs the base weights."""

    def __init__(
        self,
        spec: AdapterSpec,
        shard: Shard,
        dtype: torch.dtype,
        files: AdapterFiles,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._spec = spec
        self._shard = shard
        self._config = shard.whole
        self._dtype = dtype
        self._files = files
        self._checkpoint = checkpoint
        self._sites = shard.whole.lora_sites()

    def read(self) -> HostAdapter:
        spec, config, shard = self._spec, self._config, self._shard
        modules: dict[str, ModuleWeights] = {}
        tables: dict[str, TableChange] = {}
        gains: dict[str, Tensor] = {}
        for module in spec.modules:
            weights, gain = self._module(module)
            if self._sites[module.module].is_table:
                tables[module.module] = self._as_table(module.module, weights, gain)
            else:
                modules[module.module] = weights
                if gain is not None:
                    gains[module.module] = gain
        site_gains = {}
        if self._checkpoint is not None:
            check_copies(spec.tables, self._files, self._sites, config, self._checkpoint)
            site_gains = gains_by_site(gains, shard, self._checkpoint, self._dtype)
        changes = table_changes(spec.tables, self._files, self._sites, tables, self._dtype)
        head = changes.get(HEAD_MODULE)
        if head is not None and shard.rank > 0:  # the first rank has the logits; all plan steps alike
            head = TableChange()
        own = AdapterTables(site_gains, changes.get(config.embedding_module), head)
        return HostAdapter(spec.digest, spec.rank, modules, own)

    def _module(self, module: LoraModule) -> tuple[ModuleWeights, Tensor | None]:
        """A and B in host form, this rank's features; and DoRA's gain of all features, in float32."""
        site = self._sites[module.module]
        stored_a = self._files.get(module.a, (module.rank, site.in_features))
        b = self._files.get(module.b, (site.out_features, module.rank)).float() * module.scale
        gain = None
        if module.magnitude is not None:
            gain = self._gain(module, site, stored_a.float(), b)
            b *= gain[:, None]
        if not site.is_table:
            stored_a = stored_a[:, self._shard.columns(module.module)]
            b = b[self._shard.rows(module.module)]
        a = check_finite(stored_a.to(self._dtype, copy=True), f"tensor {module.a.key}")
        b = check_finite(b.t().contiguous().to(self._dtype), f"tensor {module.b.key}")
        return ModuleWeights(a, b), gain

    def _gain(self, module: LoraModule, site: LoraSite, a: Tensor, b: Tensor) -> Tensor:
        assert self._checkpoint is not None
        assert module.magnitude is not None
        magnitude = self._files.get(module.magnitude, (site.out_features,)).float()
        if site.is_table:
            name = table_weight(module.module, self._config, self._checkpoint)
            weight = self._checkpoint.take(name, site.table_shape)
        else:
            shape = (site.out_features, site.in_features)
            weight = self._checkpoint.take(f"{module.module}.weight", shape)
        norms = column_norms(weight, a, b) if site.kind == "embedding" else row_norms(weight, a, b)
        return check_finite(magnitude / norms, f"DoRA's gain of {module.module}")

    def _as_table(self, module: str, weights: ModuleWeights, gain: Tensor | None) -> TableChange:
        is_embedding = self._sites[module].kind == "embedding"
        a = weights.a.t().contiguous() if is_embedding else weights.a  # an embedding is looked up by row
        return TableChange(gain=None if gain is None else gain.to(self._dtype), a=a, b=weights.b)
