"""Rotary position embedding: frequencies (default, linear, YaRN), tables, and the rotation.

References: Su et al. 2021 (arXiv 2104.09864), Peng et al. 2023 (YaRN, arXiv 2309.00071). Only the
first Y dimensions of a head are rotated; dimension i is paired with i + Y/2.
"""

import math

import torch
from torch import Tensor

from qnext.ops.contracts import Elementwise, Impl
from qnext.ops.elementwise import elementwise_torch


def rope_frequencies(*, rotary_dim: int, theta: float) -> Tensor:
    """Inverse wavelengths theta^(-2i/Y), float32 [Y/2]."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return 1.0 / theta**exponent


def yarn_frequencies(
    *,
    rotary_dim: int,
    theta: float,
    factor: float,
    trained_length: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    """Frequencies under YaRN, float32 [Y/2].

    Dimensions that turn more than ``beta_fast`` times within the trained length are kept, those
    that turn less than ``beta_slow`` times are divided by ``factor``, a ramp lies between.
    """

    def dimension(turns: float) -> float:
        wavelengths = trained_length / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(rotary_dim // 2, dtype=torch.float32)
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    base = rope_frequencies(rotary_dim=rotary_dim, theta=theta)
    return base / factor * ramp + base * (1 - ramp)


def yarn_attention_factor(
    *, factor: float, mscale: float | None, mscale_all_dim: float | None
) -> float:
    """Multiplier of cos and sin under YaRN: 0.1 ln(factor) + 1 unless both mscales are given."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def rope_table(
    *,
    positions: Tensor,
    frequencies: Tensor,
    multiplier: float,
    dtype: torch.dtype,
    elementwise: Elementwise = elementwise_torch,
) -> tuple[Tensor, Tensor]:
    """cos and sin [P, Y] of integer positions [P]; angles in float32, then cast to ``dtype``."""
    angles = positions.float()[:, None] * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = (elementwise(function=f, x=angles) for f in (torch.cos, torch.sin))
    return (cos * multiplier).to(dtype), (sin * multiplier).to(dtype)


def apply_rope_reference(*, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x_i cos - x_{i+Y/2} sin and x_{i+Y/2} cos + x_i sin; dimensions beyond Y pass through."""
    rotary_dim = cos.shape[-1]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = rotated * cos[:, None] + turned * sin[:, None]
    return torch.cat((rotated, passed), dim=-1)


IMPLS = {"apply_rope": (Impl(backend="reference", load=lambda: apply_rope_reference),)}
