"""Choices under rules: a token is tried first, and the mask found only where that is refused.

To find the tokens that may follow takes a grammar many times as long as to say whether one of them
may. The likeliest token mostly does. If it may, it is what the masked choice would have been: a
mask takes rivals away and changes no score. That holds for greedy choices, and for choices by noise
alone, since the noise of a token does not depend on the others. It does not hold behind a filter,
whose reach depends on what it is given: ``top_k``, ``top_p`` and ``min_p`` need the mask first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from qnext import native
from qnext.engine import native_sampler
from qnext.engine.guide import Guide
from qnext.engine.request import SamplingParams
from qnext.engine.sampler import SampleRow

TRIES = 20
"""Tokens tried in the order of their scores before the mask is found after all, which takes so long
behind a forward: it walks through the whole vocabulary, and nothing of that is in a cache."""
RANKED = 32
"""Tokens that are brought into this order."""


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
    ranked: Iterable[tuple[int, float]],
    guide: Guide,
    drafts: Sequence[int],
    tie_bound: float | None,
    refused: int | None,
) -> tuple[int, tuple[int, ...]] | None:
    """The largest allowed score and a rival of it, tried in order; None if that takes too long.

    ``ranked`` are tokens and float32 scores, largest first, of equals the lower id, as everywhere.
    ``refused`` is the first of them, if that is known not to be allowed.
    """
    says, start_of = guide.tester(drafts)
    best, least = None, np.float32(0.0)
    tries, some_refused = 0, refused is not None
    fine: set[int] = set()
    barred: set[int] = set()
    for token, score in ranked:
        if best is not None and not score >= least:
            return best, ()
        if token == refused:
            continue
        # After a refusal the first byte is tried first: it mostly says enough about many others.
        start = start_of(token) if some_refused else None
        if start is not None and start != token and start not in fine:
            if start in barred:
                continue
            tries += 1
            if says(start):
                fine.add(start)
            else:
                barred.add(start)
                continue
        if tries >= TRIES:
            return None
        tries += 1
        said = says(token)
        if said is None:
            return None
        if not said:
            some_refused = True
        elif best is not None:
            return best, (token,)
        elif tie_bound is None:
            return token, ()
        else:
            best, top = token, np.float32(score)
            least = top - max(abs(top), np.float32(1.0)) * np.float32(tie_bound)
    return None


def ranked(
    logits_V: np.ndarray, *, defined_ids: int, most: int = RANKED
) -> Iterable[tuple[int, float]]:
    """The best tokens and their scores, largest first, of equals the lower id; float32 logits."""
    if native.unfit() is None:
        return native_sampler.ranked(logits_V, defined_ids=defined_ids, most=most)
    scores_V = logits_V[:defined_ids]
    least = -np.inf
    if most < len(scores_V):
        least = np.partition(scores_V, len(scores_V) - most)[len(scores_V) - most]
    ids = np.flatnonzero(scores_V >= least)
    ids = ids[np.argsort(-scores_V[ids], kind="stable")][:most]
    return zip(ids.tolist(), scores_V[ids].tolist(), strict=True)


def choose_again(
    choose: Choose,
    logits_V: Tensor | np.ndarray,
    row: SampleRow,
    rules: Ruled,
    *,
    refused: int | None,
    defined_ids: int,
    tie_bound: float | None,
) -> tuple[int, object]:
    """Token and rivals of a row whose first choice is ``refused``, or may be a near-tie (None).

    Logits as a float32 array are looked at without PyTorch, which takes long to begin.
    """
    guide, drafts, _ = rules
    is_array = isinstance(logits_V, np.ndarray)
    if _is_plain(row) and (is_array or logits_V.device.type == "cpu"):
        array_V = logits_V if is_array else logits_V.float().numpy()
        some = ranked(array_V, defined_ids=defined_ids)
        best = _best_allowed(some, guide, drafts, tie_bound, refused)
        if best is not None:
            return best
    row.mask = guide.mask(drafts)
    if isinstance(logits_V, np.ndarray):
        logits_V = torch.from_numpy(logits_V)
    [token], [others] = choose(logits_V[None], [row], defined_ids=defined_ids, tie_bound=tie_bound)
    return token, others


def choose_if_refused(
    choose: Choose,
    place: Callable[[], tuple[Tensor | np.ndarray, SampleRow]],
    rules: Ruled,
    token: int,
    *,
    is_close: bool,
    defined_ids: int,
    tie_bound: float | None,
) -> tuple[int, object] | None:
    """Token and rivals of a row whose choice without a mask, ``token``, may be refused; else None.

    ``is_close`` says that it may be a near-tie: a rival that is not allowed is none. ``place`` is
    asked for the logits and the row only if there is something to choose again.
    """
    guide, drafts, draft = rules
    if (token == draft and not is_close) or not guide.can_try(drafts):
        return None  # a draft was found allowed when it was made; elsewhere the mask was known
    if not is_close and guide.allows(token, drafts):
        return None
    logits_V, row = place()
    return choose_again(
        choose, logits_V, row, rules, refused=None if is_close else token,
        defined_ids=defined_ids, tie_bound=tie_bound,
    )  # fmt: skip


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
        if rows[r].mask is None:
            again = choose_if_refused(
                choose, lambda r=r: (logits[r], rows[r]), rules, tokens[r],
                is_close=bool(rivals[r]), defined_ids=defined_ids, tie_bound=tie_bound,
            )  # fmt: skip
            if again is not None:
                tokens[r], rivals[r] = again
        if rules.draft is not None and tokens[r] != rules.draft:
            dropped = rules.guide
    return tokens, rivals
