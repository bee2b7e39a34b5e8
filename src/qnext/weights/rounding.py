"""Which integers stand for a weight best: scale search for 8-bit and 4-bit weights.

Rounding to nearest takes the scale from the largest weight of a group, which is rarely the one
with the smallest error. Here several scales are tried for every group and the squared error,
weighted by how much each column matters, decides. Layouts are the business of ``formats.py``.

``csrc/kernels/round.cpp`` is the same search, two orders of magnitude faster; it runs where the
native kernels are installed. Sums run in one order in both, so both choose the same integers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext import native
from qnext.quantization import BLOCK, GROUP

MAX_SCALE = 15
_SPREADS = (0.93, 1.0, 1.07)
"""Row factors that are tried, as multiples of (largest weight / 8) / 15."""
_OFFSETS = (-2, -1, 0, 1, 2)
"""Scales of a group that are tried, from the one that puts its largest weight on 8."""
_SHARES = (1.0, 0.99, 0.98, 0.97, 0.96)
"""Scales of q8 that are tried, as multiples of (largest weight / 127)."""
_LANES = 16


def round_q4(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, cols] float32 -> R [rows] float32, s [rows, groups] int8, q [rows, cols] int8.

    ``R * s * q`` is the nearest that the search finds; ``importance`` [cols] weighs the errors.
    """
    if native.unfit() is not None:
        return round_q4_torch(weight, importance)
    rows, cols = weight.shape
    R = torch.empty(rows)
    s = torch.empty((rows, -(-cols // GROUP)), dtype=torch.int8)
    q = torch.empty((rows, cols), dtype=torch.int8)
    native.load().round_q4(weight.contiguous(), _normed(importance), R, s, q)
    return R, s, q


def round_q8(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[rows, cols] float32 -> d [rows, blocks] float32, q [rows, cols] int8."""
    if native.unfit() is not None:
        return round_q8_torch(weight, importance)
    rows, cols = weight.shape
    d = torch.empty((rows, -(-cols // BLOCK)))
    q = torch.empty((rows, cols), dtype=torch.int8)
    native.load().round_q8(weight.contiguous(), _normed(importance), d, q)
    return d, q


def round_q4_torch(
    weight: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``round_q4`` without the native kernels."""
    rows, cols = weight.shape
    w, h = _grouped(weight, importance, GROUP)
    peak = w.abs().amax(-1)
    base = peak.amax(-1) / (8 * MAX_SCALE)
    best_R, best_s = base, torch.zeros_like(peak)
    best_error = torch.full((rows,), float("inf"), dtype=torch.float64)
    for spread in _SPREADS:
        R = base * spread
        s, error = _scales(w, h, peak, R)
        total = error.double().sum(-1)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best_R = torch.where(better, R, best_R)
        best_s = torch.where(better[:, None], s, best_s)
    q = _codes(w, best_R[:, None] * best_s, -8, 7)
    # With the integers fixed, the row's own factor has a closed form.
    x = (best_s[..., None] * q).double()
    over, under = (h * x * x).sum((-1, -2)), (h * x * w).sum((-1, -2))
    R = torch.where(over > 0, under / over, torch.zeros_like(over)).float()
    return R, best_s.to(torch.int8), q.to(torch.int8).flatten(1)[:, :cols]


def _scales(w: Tensor, h: Tensor, peak: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """The best s of every group for given R, and its squared error: [rows, groups] each."""
    best_s = torch.zeros_like(peak)
    best_error = _in_order((h * w) * w)
    middle = (peak * _inverse(8 * R)[:, None]).clamp(0, 100).round()
    for sign in (1.0, -1.0):
        for offset in _OFFSETS:
            s = (middle + offset).clamp(1, MAX_SCALE) * sign
            step = R[:, None] * s
            difference = w - step[..., None] * _codes(w, step, -8, 7)
            error = _in_order((h * difference) * difference)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_s = torch.where(better, s, best_s)
    return best_s, best_error


def round_q8_torch(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``round_q8`` without the native kernels."""
    cols = weight.shape[1]
    w, h = _grouped(weight, importance, BLOCK)
    peak = w.abs().amax(-1)
    best_d, best_error = torch.zeros_like(peak), torch.full_like(peak, float("inf"))
    for share in _SHARES:
        d = peak * (torch.tensor(share) / 127)
        difference = w - d[..., None] * _codes(w, d, -127, 127)
        error = _in_order(_in_order(((h * difference) * difference).unflatten(-1, (-1, _LANES)).mT))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_d = torch.where(better, d, best_d)
    q = _codes(w, best_d, -127, 127)
    x = q.double()
    over, under = (h * x * x).sum(-1), (h * x * w).sum(-1)
    d = torch.where(over > 0, under / over, torch.zeros_like(over)).float()
    return d, q.to(torch.int8).flatten(1)[:, :cols]


def _codes(w: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return (w * _inverse(step)[..., None]).clamp_(low, high).round_()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x != 0, 1 / x, torch.zeros_like(x))


def _in_order(x: Tensor) -> Tensor:
    """Sum of the last axis, one element after another."""
    total = x[..., 0].clone()
    for i in range(1, x.shape[-1]):
        total += x[..., i]
    return total


def _grouped(weight: Tensor, importance: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Weight and importance [rows, groups, size]; padding is zero and counts nothing."""
    rows, cols = weight.shape
    h = _normed(importance)
    h = torch.ones(cols) if h is None else h
    missing = (0, -cols % size)
    return F.pad(weight, missing).view(rows, -1, size), F.pad(h, missing).view(1, -1, size)


def _normed(importance: Tensor | None) -> Tensor | None:
    """Importance of the columns, one on average."""
    if importance is None:
        return None
    h = importance.float().clamp_min(0)
    mean = h.mean()
    h = h / mean if bool(mean > 0) else torch.ones_like(h)
    # A column that was never used in calibration still keeps some of its precision.
    return h.clamp_min(1e-3).contiguous()
