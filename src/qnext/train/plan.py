"""How long the stages of a run are: by their own lengths, or so that they fill a budget.

Under a budget, stages that are not elastic keep their length and the elastic ones share what is
left in proportion to theirs, so that a run always ends decayed and fine-tuned. If the fixed stages
alone are more than the budget, all are shortened alike, and that is said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qnext.errors import RecipeError
from qnext.train.recipe import Stage

LEAST_STEPS = 4
"""Steps of an elastic stage that nothing was left for: the next one needs a warm start."""
SLACK = 0.97
"""Share of a time budget that is planned; the rest is for checkpoints and the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much a run may take; one of the two is set."""

    seconds: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.tokens is None):
            raise RecipeError("a budget is either of time (--minutes) or of tokens (--tokens).")

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"seconds": self.seconds, "tokens": self.tokens}


def steps_of(
    stages: Sequence[Stage],
    budget: Budget | None,
    speeds: Sequence[float],
    say: Callable[[str], None],
) -> list[int]:
    """Optimiser steps of each stage; ``speeds`` are tokens per second, used for a time budget."""
    lengths = [stage.tokens / stage.batch_tokens for stage in stages]
    if budget is None:
        return [max(1, round(length)) for length in lengths]
    if budget.seconds is not None:
        costs = [s.batch_tokens / speed for s, speed in zip(stages, speeds, strict=True)]
        room = SLACK * budget.seconds
    else:
        costs = [float(stage.batch_tokens) for stage in stages]
        room = float(budget.tokens or 0)
    pairs = list(zip(stages, lengths, costs, strict=True))
    fixed = sum(n * cost for stage, n, cost in pairs if not stage.elastic)
    elastic = sum(n * cost for stage, n, cost in pairs if stage.elastic)
    least = sum(LEAST_STEPS * cost for stage, _, cost in pairs if stage.elastic)
    if not elastic:
        # Nothing is elastic: all of them are.
        return [max(1, round(n * room / fixed)) for n in lengths]
    if fixed + least > room:
        share = max(0.0, room - least) / fixed if fixed else 0.0
        say(
            f"the budget is too small for the stages of fixed length: they get {share:.0%} of it, "
            f"the elastic ones {LEAST_STEPS} steps each."
        )
        return [LEAST_STEPS if s.elastic else max(1, round(n * share)) for s, n, _ in pairs]
    share = (room - fixed) / elastic
    return [
        max(LEAST_STEPS if s.elastic else 1, round(n * share if s.elastic else n))
        for s, n, _ in pairs
    ]


def planned_again(
    stages: Sequence[Stage],
    planned: Sequence[int],
    seconds: float,
    speeds: Sequence[float],
    say: Callable[[str], None],
) -> list[int]:
    """Steps of the remaining stages when so many seconds are left.

    Elastic stages take up the difference in both directions. A stage of fixed length is never made
    longer than planned, and never shorter than half of that, even if the time is over: what was
    learnt is of no use without it.
    """
    wanted = steps_of(stages, Budget(seconds=max(1.0, seconds)), speeds, say)
    return [
        steps if stage.elastic else max(-(-before // 2), min(before, steps))
        for stage, before, steps in zip(stages, planned, wanted, strict=True)
    ]
