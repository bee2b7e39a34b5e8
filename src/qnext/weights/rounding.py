"""Which integers stand for a weight best: scale search for 8-bit and 4-bit weights.

Rounding to nearest takes the scale from the largest weight of a group, which is rarely the one
with the smallest error. Here several scales are tried for every group and the squared error,
weighted by how much each column matters, decides. Layouts are the business of ``formats.py``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP, BLOCK = 16, 256
MAX_SCALE = 15
_SPREADS = (0.86, 0.93, 1.0, 1.07, 1.14)
"""Row steps that are tried, as multiples of (largest group step) / 15."""
_Q8_RANGES = (1.0, 0.99, 0.98, 0.97, 0.96)


def round_q4(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, cols] float32 -> R [rows] float32, s [rows, groups] int8, q [rows, cols] int8.

    ``R * s * q`` is the nearest that the search finds; ``importance`` [cols] weighs the errors.
    """
    rows, cols = weight.shape
    w = F.pad(weight, (0, -cols % GROUP)).view(rows, -1, GROUP)
    h = _weights_of(importance, cols, w)
    # The largest value of a group is best put on -8: the negative side reaches one step further.
    peak = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    base = peak.abs().amax(-1) / (8 * MAX_SCALE)
    base = torch.where(base > 0, base, torch.ones_like(base))
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
    q = _codes(w, best_R[:, None] * best_s)
    # With the integers fixed, the row's own factor has a closed form.
    x = best_s[..., None] * q
    over = (h * x * x).double().sum((-1, -2))
    R = (h * x * w).double().sum((-1, -2)) / torch.where(over > 0, over, torch.ones_like(over))
    R = torch.where(over > 0, R, torch.zeros_like(R)).float()
    return R, best_s.to(torch.int8), q.to(torch.int8).flatten(1)[:, :cols]


def _scales(w: Tensor, h: Tensor, peak: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """The best s of every group for given R, and its squared error: [rows, groups] each."""
    ideal = -peak / (8 * R[:, None])
    best_s = torch.zeros_like(peak)
    best_error = (h * w * w).sum(-1)
    middle = ideal.abs().round()
    for sign in (1.0, -1.0):
        for offset in (-2, -1, 0, 1, 2):
            s = (middle + offset).clamp(1, MAX_SCALE) * sign * torch.where(ideal < 0, -1.0, 1.0)
            step = R[:, None] * s
            difference = w - step[..., None] * _codes(w, step)
            error = (h * difference * difference).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_s = torch.where(better, s, best_s)
    return best_s, best_error


def _codes(w: Tensor, step: Tensor) -> Tensor:
    inverse = torch.where(step != 0, 1 / step, torch.zeros_like(step))
    return (w * inverse[..., None]).round_().clamp_(-8, 7)


def round_q8(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[rows, cols] float32 -> d [rows, blocks] float32, q [rows, cols] int8."""
    rows, cols = weight.shape
    w = F.pad(weight, (0, -cols % BLOCK)).view(rows, -1, BLOCK)
    h = _weights_of(importance, cols, w)
    peak = w.abs().amax(-1)
    best_d, best_error = torch.zeros_like(peak), (h * w * w).sum(-1)
    for share in _Q8_RANGES:
        d = peak * (share / 127)
        difference = w - d[..., None] * _codes8(w, d)
        error = (h * difference * difference).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_d = torch.where(better, d, best_d)
    q = _codes8(w, best_d)
    over = (h * q * q).sum(-1)
    d = (h * q * w).sum(-1) / torch.where(over > 0, over, torch.ones_like(over))
    return d, q.to(torch.int8).flatten(1)[:, :cols]


def _codes8(w: Tensor, step: Tensor) -> Tensor:
    inverse = torch.where(step != 0, 1 / step, torch.zeros_like(step))
    return (w * inverse[..., None]).round_().clamp_(-127, 127)


def _weights_of(importance: Tensor | None, cols: int, w: Tensor) -> Tensor:
    """Importance of the columns laid out like ``w``, on average one; padding counts nothing."""
    if importance is None:
        return torch.ones((1, 1, 1))
    h = importance.float().clamp_min(0)
    mean = h.mean()
    h = h / mean if bool(mean > 0) else torch.ones_like(h)
    # A column that was never used in calibration still keeps some of its precision.
    h = h.clamp_min(1e-3)
    return F.pad(h, (0, w.shape[1] * w.shape[2] - cols)).view(1, w.shape[1], w.shape[2])
