"""What steps with drafts cost against steps without, for one batch size and one kind of step.

A cost is a share of the plain step measured nearest to it, so that a machine which slows down, or
contexts that grow, change both sides alike. Only steps that follow one of their own sort count: the
first step behind drafts still settles what was accepted, and the first with drafts has less to do.
"""

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 33
"""Costs of each sort that count: their median does."""
PLAIN_WINDOW = 17
"""The same for plain steps; fewer, because they are what the others are measured against."""
ENOUGH = 4
"""Measured steps of a sort before its median is trusted."""
SMALLEST_S = 1e-9
"""A coarse clock may not have moved."""
LONG = 64
"""Steps with drafts after which the plain steps behind them are nearer than those before."""


class Pace:
    """Measured costs, and the number of drafts that was chosen from them.

    The policy keeps its choice here: ``drafts`` for ``left`` more steps, ``probing`` of which only
    serve to find out.
    """

    __slots__ = (
        "_draft", "_plain", "_recent", "_verify", "asked", "chosen", "drafts", "failed",
        "is_personal", "left", "plain_s", "probing", "rest", "rested", "scatter", "steps",
    )  # fmt: skip

    def __init__(self) -> None:
        self.plain_s = 0.0
        """Seconds of a plain step; 0 before any was measured."""
        self.scatter = 0.0
        """How far off ``plain_s`` may be, as a share of it."""
        self.drafts = 0
        self.left = 0
        self.chosen = 0
        """What was found to pay, also while a few steps without drafts are measured."""
        self.asked = 0
        """The last step that the policy was asked about it, counted in such steps of all sizes."""
        self.probing = 0
        self.rest = 0
        """Steps that the last rest was to last, or less."""
        self.failed = 0
        """Probes in a row after which drafting was not taken up."""
        self.rested = 0
        """Plain steps since drafts were last measured."""
        self.steps = 0
        """Steps with drafts since plain ones were last measured."""
        self.is_personal = False
        """Whether it rests because of these requests, not because of all."""
        self._plain: deque[float] = deque(maxlen=PLAIN_WINDOW)
        # By number of drafts: seconds, and those of the plain step they are held against.
        self._verify: dict[int, deque[list[float]]] = {}
        self._draft: dict[int, deque[list[float]]] = {}
        self._recent: deque[list[float]] = deque(maxlen=2 * WINDOW)

    # -- measurements ----------------------------------------------------------------------------

    def note_plain(self, seconds: float) -> None:
        """A step without drafts."""
        self._plain.append(seconds)

    def forget_plain(self) -> None:
        """Plain steps are to be measured anew: the last ones are long ago."""
        self._plain.clear()

    def settle(self) -> None:
        """Take over what plain steps cost by now."""
        if self._plain:
            ordered, count = sorted(self._plain), len(self._plain)
            self.plain_s = max(ordered[count // 2], SMALLEST_S)
            middle_half = ordered[3 * count // 4] - ordered[count // 4]
            self.scatter = middle_half / self.plain_s / math.sqrt(count)
        if self.steps >= LONG:
            for one in self._recent:
                one[1] = self.plain_s
        self._recent.clear()

    def note_verified(self, drafts: int, seconds: float) -> None:
        """The forward of a step with so many drafts, and the choice of tokens."""
        self._note(self._verify, drafts, seconds)

    def note_drafted(self, drafts: int, seconds: float) -> None:
        """Reading what such a step accepted, and making as many drafts again."""
        self._note(self._draft, drafts, seconds)

    def _note(self, kept: dict[int, deque[list[float]]], drafts: int, seconds: float) -> None:
        if self.plain_s:
            one = [seconds, self.plain_s]
            kept.setdefault(drafts, deque(maxlen=WINDOW)).append(one)
            self._recent.append(one)

    # -- costs -----------------------------------------------------------------------------------

    @property
    def knows_plain(self) -> bool:
        """Whether enough plain steps were measured."""
        return len(self._plain) >= ENOUGH

    def knows(self, drafts: int) -> bool:
        """Whether enough steps with so many drafts were measured."""
        return all(len(kept.get(drafts, ())) >= ENOUGH for kept in (self._verify, self._draft))

    def costs(self, most: int) -> list[float]:
        """Plain steps that steps with 0, 1, ... drafts take the time of, as far as is known.

        The first number that was not measured goes on in a straight line from the two below it;
        the list ends there, at ``most`` drafts, or before 1 if that was not measured.
        """
        found = [1.0]
        for drafts in range(1, most + 1):
            if not self.knows(drafts):
                if drafts > 1:
                    found.append(2.0 * found[-1] - found[-2])  # never less than found[-1]
                break
            shares = [
                _median([seconds / plain for seconds, plain in kept[drafts]])
                for kept in (self._verify, self._draft)
            ]
            # More drafts never cost less: where it looks so, times have scattered.
            found.append(max(sum(shares), found[-1]))
        return found


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
