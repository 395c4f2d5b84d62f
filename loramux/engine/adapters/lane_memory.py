"""How the lanes of one site lie in memory, by who computes with them.

apart          A, and a B for each part: what a CPU's row kernel and plain torch read
joined         the parts' B side by side: one pointer and one stride, for the kernels of a GPU
behind weight  joined, and A behind the site's base weight, whose place is allocated here, too:
               one product with [W; lanes in use] yields the base output and every shrink
"""

from __future__ import annotations

from enum import Enum
from itertools import pairwise

import torch

from loramux.engine.kernels.cpu.lazy_zeros import lazy_zeros
from loramux.engine.kernels.lora import ROW_MULTIPLE, SiteLanes
from loramux.engine.models.families import Site


class LaneLayout(Enum):
    """See the module."""

    APART = "apart"
    JOINED = "joined"
    BEHIND_WEIGHT = "behind weight"


def site_lanes(
    site: Site,
    index: int,
    num_lanes: int,
    layout: LaneLayout,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> SiteLanes:
    """Empty lanes of one site.

    Args:
        index: of the site among all sites of the model.
    """
    widths = [part.out_features for part in site.parts]
    offsets = [sum(widths[:i]) for i in range(len(widths) + 1)]
    shape = (num_lanes, len(widths), site.in_features)
    if layout is LaneLayout.APART:
        a = lazy_zeros(shape, dtype=dtype, device=device)
        b = [lazy_zeros((num_lanes, width), dtype=dtype, device=device) for width in widths]
        return SiteLanes(a=a, b=b, offsets=offsets, index=index)
    joined = lazy_zeros((num_lanes, offsets[-1]), dtype=dtype, device=device)
    parts = [joined[:, begin:end] for begin, end in pairwise(offsets)]
    if layout is LaneLayout.JOINED:
        a = lazy_zeros(shape, dtype=dtype, device=device)
        return SiteLanes(a=a, b=parts, offsets=offsets, index=index)
    used = offsets[-1] + num_lanes * len(widths)
    rows = -(-used // ROW_MULTIPLE) * ROW_MULTIPLE
    weight = torch.empty((rows, site.in_features), dtype=dtype, device=device)
    weight[offsets[-1] :].zero_()
    return SiteLanes(
        a=weight[offsets[-1] : used].view(shape), b=parts, offsets=offsets, index=index, weight=weight
    )
