"""Rotary position embedding: a table of angles by position, and its five ways to stretch it.

Source: RoPE, Su et al. 2021; NTK-aware scaling (dynamic); YaRN, Peng et al. 2023; Llama 3.1's
frequency bands. Formulas and defaults agree with transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loramux.engine.models.families import RopeConfig


class Rotary:
    """cos and sin for a batch of tokens."""

    def __init__(
        self, config: RopeConfig, head_dim: int, max_len: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._head_dim = head_dim
        self._dtype = dtype
        self._device = device
        inv_freq, scale = inverse_frequencies(config, head_dim)
        positions = torch.arange(max_len, dtype=torch.float32)
        self._cos, self._sin = self._tables(positions, inv_freq.expand(max_len, -1), scale)

    @property
    def is_dynamic(self) -> bool:
        """True if angles depend on the length of the sequence, not only on the position."""
        return self._config.kind == "dynamic"

    def angles(self, positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin, each [num_tokens, 1, head_dim].

        Args:
            positions: [num_tokens] int64
            lengths: [num_tokens] int64, only with dynamic scaling: the length whose frequencies a
                token uses, which is the prompt's for a prompt token and its own end for an output
                token. That is what a cached decode in transformers computes, and it does not
                depend on how the prompt was chunked.
        """
        if lengths is None:
            return self._cos[positions][:, None], self._sin[positions][:, None]
        base = dynamic_base(self._config, self._head_dim, lengths.double())
        exponents = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device=base.device)
        inv_freq = 1.0 / (base.float()[:, None] ** (exponents / self._head_dim))
        cos, sin = self._tables(positions.float(), inv_freq, 1.0)
        return cos[:, None], sin[:, None]

    def _tables(self, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos = (angles.cos() * scale).to(self._device, self._dtype)
        return cos, (angles.sin() * scale).to(self._device, self._dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of every head by the token's angles.

    Args:
        x: [num_tokens, num_heads, head_dim]
        cos, sin: [num_tokens, 1, head_dim]
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair, [head_dim / 2] float32, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    match config.kind:
        case "linear":
            return plain / config.factor, 1.0
        case "llama3":
            return _llama3(config, plain), 1.0
        case "yarn":
            return _yarn(config, head_dim), _yarn_scale(config)
        case _:
            return plain, 1.0  # dynamic equals plain up to the original length


def dynamic_base(config: RopeConfig, head_dim: int, lengths: Tensor) -> Tensor:
    """NTK-aware base frequency for sequences of `lengths` tokens (any shape, float64)."""
    longest = lengths.clamp(min=config.original_max_position)
    stretch = config.factor * longest / config.original_max_position - (config.factor - 1)
    return config.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    low_wavelength = config.original_max_position / config.low_freq_factor
    high_wavelength = config.original_max_position / config.high_freq_factor
    wavelength = 2 * math.pi / plain
    smooth = (config.original_max_position / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    between = (1 - smooth) * plain / config.factor + smooth * plain
    stretched = torch.where(wavelength > low_wavelength, plain / config.factor, plain)
    is_between = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    return torch.where(is_between, between, stretched)


def _yarn(config: RopeConfig, head_dim: int) -> Tensor:
    def dimension(rotations: float) -> float:
        turns = config.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    interpolated, extrapolated = 1.0 / (config.factor * frequencies), 1.0 / frequencies
    return interpolated * ramp + extrapolated * (1 - ramp)


def _yarn_scale(config: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)
