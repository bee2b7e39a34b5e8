"""Choices under rules: a token is tried first, and the mask found only where that is refused.

To find the tokens that may follow takes a grammar many times as long as to say whether one of them
may. The likeliest token mostly does. If it may, it is what the masked choice would have been: a
mask takes rivals away and changes no score. That holds for greedy choices, and for choices by noise
alone, since the noise of a token does not depend on the others. It does not hold behind a filter,
whose reach depends on what it is given: ``top_k``, ``top_p`` and ``min_p`` need the mask first.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from qnext.engine.guide import Guide
from qnext.engine.request import SamplingParams
from qnext.engine.sampler import SampleRow

TRIES = 20
"""Tokens tried in the order of their scores before the mask is found after all, which takes so long
behind a forward: it walks through the whole vocabulary, and nothing of that is in a cache."""
FEW_TRIES = 2
"""After so many refusals whatever begins like a refused token is left out with it."""


class Choose(Protocol):
    """``sampler.choose``, or the same in native code."""

    def __call__(
        self,
        logits: Tensor,
        rows: Sequence[SampleRow],
        *,
        defined_ids: int,
        tie_bound: float | None,
    ) -> tuple[list[int], Sequence[object]]: ...


class Ruled(NamedTuple):
    """The rules of one row."""

    guide: Guide
    drafts: Sequence[int]
    """Those before the row."""
    draft: int | None
    """The draft that the row verifies: it was found allowed when it was made."""


def ruled_by(guide: Guide | None, drafts: Sequence[int], count: int) -> Ruled | None:
    """The rules of the row behind ``count`` of the drafts."""
    if guide is None:
        return None
    return Ruled(guide, drafts[:count], drafts[count] if count < len(drafts) else None)


def may_try(params: SamplingParams) -> bool:
    """Whether a choice without a mask, if the mask allows it, is the choice with it."""
    filters = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return params.temperature == 0.0 or not filters


def mask_before(
    guide: Guide | None, drafts: Sequence[int], params: SamplingParams
) -> np.ndarray | None:
    """The mask that a row needs before anything is chosen."""
    if guide is None or (may_try(params) and guide.can_try(drafts)):
        return None
    return guide.mask(drafts)


def _is_plain(row: SampleRow) -> bool:
    """Whether the largest logit is what is chosen."""
    return row.params.temperature == 0.0 and not row.is_adjusted


def _best_allowed(
    scores_V: np.ndarray,
    guide: Guide,
    drafts: Sequence[int],
    tie_bound: float | None,
    refused: int | None,
) -> tuple[int, tuple[int, ...]] | None:
    """The largest allowed score and a rival of it, tried in order; None if that takes too long.

    Of equal scores the lower id comes first, as everywhere. ``refused`` is the first of them, if
    that is known not to be allowed.
    """
    left_V, best, least = scores_V.copy(), None, np.float32(0.0)
    refusals = 0
    if refused is not None:
        left_V[refused], refusals = -np.inf, 1
    for _ in range(TRIES):
        token = int(left_V.argmax())
        score = left_V[token]
        if best is not None and not score >= least:
            return best, ()
        said = guide.says(token, drafts)
        if said is None:
            return None
        if said and best is not None:
            return best, (token,)
        if said:
            best = token
            if tie_bound is None:
                return best, ()
            least = score - max(abs(score), np.float32(1.0)) * np.float32(tie_bound)
        left_V[token] = -np.inf
        if not said:
            refusals += 1
            alike = guide.refused_with(token, drafts) if refusals >= FEW_TRIES else None
            if alike is not None:
                if alike[-1] >= len(left_V):
                    alike = alike[alike < len(left_V)]
                left_V[alike] = -np.inf
    return None


def choose_again(
    choose: Choose,
    logits_V: Tensor,
    row: SampleRow,
    rules: Ruled,
    *,
    refused: int | None,
    defined_ids: int,
    tie_bound: float | None,
) -> tuple[int, object]:
    """Token and rivals of a row whose first choice is ``refused``, or may be a near-tie (None)."""
    guide, drafts, _ = rules
    if logits_V.device.type == "cpu" and _is_plain(row):
        scores_V = logits_V.float().numpy()[:defined_ids]
        best = _best_allowed(scores_V, guide, drafts, tie_bound, refused)
        if best is not None:
            return best
    row.mask = guide.mask(drafts)
    [token], [others] = choose(logits_V[None], [row], defined_ids=defined_ids, tie_bound=tie_bound)
    return token, others


def choose_ruled(
    choose: Choose,
    logits: Tensor,
    rows: Sequence[SampleRow],
    ruled: Sequence[Ruled | None],
    *,
    defined_ids: int,
    tie_bound: float | None,
) -> tuple[list[int], list[object]]:
    """Tokens and rivals of ``choose`` for logits [R, V], under the rules of every row.

    Rows of one answer stand in the order of its drafts. Those behind a draft that was not chosen
    are chosen without rules: nobody will look at them. Masks that turn out to be needed are
    entered into ``rows``.
    """
    tokens, found = choose(logits, rows, defined_ids=defined_ids, tie_bound=tie_bound)
    rivals = list(found)
    dropped: Guide | None = None
    for r, rules in enumerate(ruled):
        if rules is None or rules.guide is dropped:
            continue
        guide, drafts, draft = rules
        if rows[r].mask is None:
            refused, again = None, bool(rivals[r])  # a rival that is not allowed is none
            if not again and tokens[r] != draft and not guide.allows(tokens[r], drafts):
                refused, again = tokens[r], True
            if again:
                tokens[r], rivals[r] = choose_again(
                    choose, logits[r], rows[r], rules,
                    refused=refused, defined_ids=defined_ids, tie_bound=tie_bound,
                )  # fmt: skip
        if draft is not None and tokens[r] != draft:
            dropped = guide
    return tokens, rivals
