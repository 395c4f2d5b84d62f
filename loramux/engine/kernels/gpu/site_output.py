"""What a linear site hands to the kernel that reads it: the base output, and what LoRA still has to add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.lora import SiteLanes


@dataclass(frozen=True, slots=True)
class Pending:
    """An expand that is still to be done."""

    shrunk: Tensor  # [planes, num_tokens, ≥ num_lanes * parts]; lane l of a part: column l * parts + part
    site: SiteLanes
    lora: GpuLoraInput
    by_tile: bool  # one program a tile of one adapter's tokens; else one a token


@dataclass(frozen=True, slots=True)
class SiteOutput:
    """A site's base output in the leading columns; the sum is complete if nothing is pending."""

    out: Tensor  # [num_tokens, ≥ width]
    width: int  # features of the site
    pending: Pending | None = None

    @property
    def base(self) -> Tensor:
        """[num_tokens, width], without what is pending."""
        return self.out[:, : self.width]

    def launch(self, rows: int, lanes_at_once: int) -> Launch:
        """How a kernel over this output is launched.

        Args:
            rows: of a program where there is no LoRA.
            lanes_at_once: that a program takes from B.
        """
        num_tokens, p = self.out.shape[0], self.pending
        if p is None:
            nothing = (self.out, 0, 0, self.out, 0, self.out, self.out, self.out, num_tokens)
            constants = {"M": rows, "LORA": False, "R": lanes_at_once, "PARTS": 1, "PLANES": 1}
            return Launch(-(-num_tokens // rows), nothing, constants)
        b, lora = p.site.b[0], p.lora
        arguments = (
            *(p.shrunk, p.shrunk.stride(1), p.shrunk.stride(0), b, b.stride(0)),
            *(lora.token_lane, lora.token_rank, lora.tiles, num_tokens),
        )
        constants = {
            "M": lora.tile_rows if p.by_tile else 1,
            "LORA": True,
            "R": lanes_at_once,
            "PARTS": len(p.site.b),
            "PLANES": p.shrunk.shape[0],
        }
        return Launch(lora.tiles.shape[0] if p.by_tile else num_tokens, arguments, constants)


class Launch(NamedTuple):
    """The part of a launch that all kernels of the sites share."""

    programs: int  # over the rows
    arguments: tuple[Any, ...]  # h, its strides, b, its stride, token_lane, token_rank, tiles, num_tokens
    constants: dict[str, int]

    def stages(self, wanted: int) -> int:
        """Of the kernel's pipeline.

        Planes are summed in float32 and rounded in registers on their way to a tensor core. Pipelined,
        ptxas before 13.3 miscompiles that on sm_90 (triton#9433).
        """
        return 1 if self.constants["PLANES"] > 1 else wanted
