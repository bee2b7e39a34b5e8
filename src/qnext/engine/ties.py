"""Which choices hang by rounding: the tie rule of the ordinary mode on PyTorch.

Two ways to compute the same logits (another batch, another split of the prompt, with drafts or
without) differ there in their last bits, and a choice between two almost equal candidates may fall
the other way. What counts as almost equal is stated here and nowhere else: a position is a
*near-tie* when moving every logit by at most half of ``tie_bound`` could change the chosen token.
Two runs of a request may part at a near-tie only; the engine counts those it meets
(``Usage.near_ties``).
A router may choose other experts where its own logits are as close; that is not counted.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ULPS_PER_ROOT_LAYER = {
    torch.float64: 8.0,
    torch.float32: 8.0,
    torch.bfloat16: 2.0,
    torch.float16: 2.0,
}
"""The bound on a margin, in units of the dtype's epsilon times the size of the largest logit, for
one layer. In the wide dtypes the sums themselves are rounded and may be taken in another order; in
the narrow ones sums are held in float32 and only their results are rounded. Roundings of different
layers are independent, so the bound grows like the square root of their number."""


def tie_bound(dtype: torch.dtype, num_layers: int) -> float:
    """Margins below this, times the largest logit (at least 1), are ties; no unit."""
    return ULPS_PER_ROOT_LAYER[dtype] * torch.finfo(dtype).eps * math.sqrt(max(num_layers, 1))


def tolerance(top: Tensor, bound: float) -> Tensor:
    """The largest margin between two logits that is a tie, where the largest logit is ``top``."""
    return top.abs().clamp(min=1.0) * bound


def tolerance_of(top: float, bound: float) -> float:
    """``tolerance`` of one number."""
    return max(abs(top), 1.0) * bound


def passing(
    values: Tensor, *, slack_R1: Tensor, top_k_R1: Tensor, top_p_R1: Tensor, min_p_R1: Tensor
) -> tuple[Tensor, Tensor]:
    """What the filters might let pass, and what they let pass for certain; bool [R, n] each.

    ``values`` [R, n] are scores after temperature, largest first; each may move by half of
    ``slack_R1``. ``top_k`` 0 keeps all.
    """
    falling = -values
    # Place and mass before a token, when everything within the slack counts for it, or against.
    # A score that is no number (forbidden, at a temperature near 0) has no place; it never passes.
    early = torch.searchsorted(falling, falling - slack_R1).clamp(max=values.shape[1] - 1)
    late = torch.searchsorted(falling, falling + slack_R1, right=True) - 1
    limit = torch.where(top_k_R1 > 0, top_k_R1, values.shape[1])
    floor = values[:, :1] + min_p_R1.log()
    may = (early < limit) & (values >= floor - slack_R1) & values.isfinite()
    must = (late < limit) & (values >= floor + slack_R1) & values.isfinite()
    weights = (values - values[:, :1]).exp()
    before = weights.cumsum(-1) - weights
    least, most = before.gather(1, early), before.gather(1, late)
    largest_R1 = (weights * may).sum(-1, keepdim=True)
    smallest_R1 = (weights * must).sum(-1, keepdim=True)
    all_p = top_p_R1 >= 1.0
    # The share of the mass before, with that mass scaled against the rest by the slack.
    lowest = least / (least + (largest_R1 - least).clamp(min=0.0) * slack_R1.exp())
    highest = most / (most + (smallest_R1 - most).clamp(min=0.0) * (-slack_R1).exp())
    may &= all_p | (lowest < top_p_R1) | (early == 0)
    must &= all_p | (highest < top_p_R1)
    return may, must | (late == 0)


def contenders(scores: Tensor, *, may: Tensor, must: Tensor, slack_R1: Tensor) -> Tensor:
    """Which tokens could have the largest score [R, n] of those that pass; bool [R, n]."""
    best_R1 = scores.masked_fill(~must, float("-inf")).amax(-1, keepdim=True)
    return may & (scores >= best_R1 - slack_R1)


def rivals(could: Tensor, ids: Tensor, chosen: Sequence[int]) -> list[tuple[int, ...]]:
    """The ids [R, n] that could have been chosen instead of ``chosen``; mostly none."""
    others = could & (ids != torch.tensor(chosen, device=ids.device)[:, None])
    return [
        tuple(ids[r][others[r]].tolist()) if several else ()
        for r, several in enumerate(others.any(-1).tolist())
    ]
