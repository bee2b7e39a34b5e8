"""What a snapshot is worth: the time it is expected to save, per byte that only it holds.

``worth = likely * seconds to compute it again / bytes that giving it up frees``. Computing again
starts from the nearest snapshot before it that is still there, so a snapshot right after another
one is cheap however long its prefix is. The time comes from prompts that ran: so much per token,
and so much per token and token of context, which is what makes the end of a long prompt dearer
than its beginning. No torch here.
"""

import math
from collections.abc import Sequence

PRIORS = {
    "fork": 1.5, "system": 1.0, "parked": 0.9, "stable": 0.8, "branch": 0.6, "queue": 0.6,
    "loop": 0.5, "end": 0.4, "interval": 0.2,
}  # fmt: skip
"""How likely a fresh snapshot is thought to be used, by the reason it was taken."""
HALF_LIFE_S = 1800.0
"""A use half an hour ago counts half."""
DECAY = 0.97
"""Weight of an older measured step against a new one."""
FIRST_GUESS_S = 1e-4
"""Seconds per token before any prompt has run."""


def likelihood(why: str, uses: float, age_s: float) -> float:
    """How often a snapshot is expected to be used: by its reason, and by what became of it."""
    return PRIORS.get(why, 0.2) + uses * math.exp2(-age_s / HALF_LIFE_S)


class PrefillTime:
    """Seconds that prompts take, from the steps that ran some.

    A step takes ``a * tokens + b * (tokens times the context each of them sees)``. Both are fitted
    by least squares over decayed sums. Where the steps do not tell them apart (all prompts short,
    or all alike), ``b / a`` is ``context_share``: the arithmetic of attention per token of context
    over all other arithmetic of a token.
    """

    def __init__(self, *, context_share: float = 0.0) -> None:
        self.context_share = context_share
        # Sums over steps of tokens^2, tokens * contexts, contexts^2, and of both times seconds.
        self._sums = [0.0] * 5
        self._rates = (FIRST_GUESS_S, FIRST_GUESS_S * context_share)

    def note(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step ran tokens start ... end - 1 of some sequences in so many seconds."""
        tokens = float(sum(end - start for start, end in spans))
        contexts = float(sum(_contexts(start, end) for start, end in spans))
        new = (tokens**2, tokens * contexts, contexts**2, tokens * seconds, contexts * seconds)
        self._sums = [old * DECAY + one for old, one in zip(self._sums, new, strict=True)]
        self._rates = self._fit()

    def seconds(self, start: int, end: int) -> float:
        """Time to compute tokens start ... end - 1 of a prompt; never 0 for a token or more."""
        per_token, per_context = self._rates
        return per_token * (end - start) + per_context * _contexts(start, end)

    def _fit(self) -> tuple[float, float]:
        xx, xy, yy, xs, ys = self._sums
        determinant = xx * yy - xy * xy
        if determinant > 1e-2 * xx * yy:
            per_token = (xs * yy - ys * xy) / determinant
            per_context = (ys * xx - xs * xy) / determinant
            if per_token > 0.0 and per_context >= 0.0:
                return per_token, per_context
        share = self.context_share
        squares = xx + 2.0 * share * xy + share * share * yy
        # A coarse clock may not have moved.
        per_token = max((xs + share * ys) / squares, 1e-12) if squares else FIRST_GUESS_S
        return per_token, per_token * share


def _contexts(start: int, end: int) -> float:
    """Tokens of context seen, summed over tokens start ... end - 1; each sees itself too."""
    return (end * (end + 1) - start * (start + 1)) / 2
