"""How many tokens to draft: from measured acceptance and measured time, never slower than none.

A step that verifies k drafts per sequence costs more than one without: more rows in the forward,
one reading pass of the MTP layer, and k - 1 further draft passes. It yields
``1 + a1 + a1 a2 + ...`` tokens per sequence, where a_i is the chance that draft i is accepted given
that those before it were. Both sides are measured while serving, and outlive the requests they were
measured on: costs by batch size and kind of step (``pace.py``), acceptance for everybody, from
which each request's own departs as it goes on. What is chosen here changes time only: the tokens of
a request never depend on how many were drafted.

Finding out costs time. The first batch size is tried a few steps; another one is taken to cost what
its neighbour does. After that, probes are paid from a credit that grows with the time steps take,
become rarer while they find nothing, and where even full acceptance would not pay there are none.
A choice holds for many steps: weighing takes as long as a tenth of a small model's step. A rest
lasts until the next probe, and most of it is *quiet*: such steps are not asked about, not measured,
and nothing is kept for the MTP layer. They are the steps of an engine that never drafts.
"""

from collections.abc import Sequence

from qnext.engine.pace import LONG, Pace

MAX_DRAFTS = 4
"""The head is trained for one step; beyond a few its guesses are not worth a row."""
DECAY = 0.994
"""Weight of older outcomes against a new one."""
FADE = 0.999
"""The same for positions that were not tried: what is known of them is forgotten slowly."""
PRIOR = 8.0
"""Outcomes that the average of all requests counts for in the estimate of one."""
FIRST_RATE = 0.7
"""Acceptance at the first position before anything is known."""
NEXT_RATE = 0.85
"""Acceptance at a position, against the one before it, before anything is known."""
DOUBT = 4.0
"""Outcomes that these two count for."""
START, STAY, CLIMB = 1.12, 1.04, 1.03
"""Drafting must promise so much more than none to be taken up, and to be gone on with; and another
number of drafts so much more than the present one. Going back and forth costs time that no step
shows, and times scatter: where plain steps do, it is more."""
HOLD = 32
"""Steps that a number of drafts is kept."""
FIRST_REST, LONGEST_REST = 32, 256
"""Steps before a rest is weighed again, doubled each time, if more is not needed to pay a probe."""
RARELY_S = 5.0
"""Probes that find nothing are put off twice as long each time, but no longer than this."""
PROBE_STEPS = 8
"""Steps of one probe."""
ATTEMPTS = 2
"""Probes of a kind of step that need no credit, until its costs are known at some batch size."""
SHARE = 0.005
"""Of the time of all steps, what probes may cost."""
MEASURED = 24
"""Steps at the end of a rest that are measured."""
UNKNOWN = 1.5
"""What a step with a draft is thought to cost where that was never measured."""
RULED_S = 2e-4
"""Seconds that a step with a draft takes longer at least for each sequence, where a grammar rules
some: Python makes such drafts, and tries them. Many a small model's step is shorter than that."""
STALE = 16384
"""Plain steps after which a cost that cannot pay may be measured again."""
PLAIN_EVERY, PLAIN_STEPS = 512, 9
"""While drafting, so many steps without drafts now and then: the price of drafting stays known."""
FIRST_ANSWER = 64.0
"""Tokens of an answer before any has ended."""
FIRST_ROW = 0.02
"""Plain steps that the MTP layer takes to read a row, before any was read."""
NOBODY = range(0)


class Acceptance:
    """Decayed counts of drafts that were tried and taken, by position."""

    __slots__ = ("taken", "tried")

    def __init__(self) -> None:
        self.tried = [0.0] * MAX_DRAFTS
        self.taken = [0.0] * MAX_DRAFTS

    def note(self, drafted: int, accepted: int, times: int = 1) -> None:
        """The outcome of some verifications: positions behind a rejection were not tried."""
        old, faded = DECAY**times, FADE**times
        # What the new outcomes weigh together, each a little more than the one before it.
        new = (1.0 - old) / (1.0 - DECAY)
        last = min(drafted, accepted + 1)
        for i in range(MAX_DRAFTS):
            weight = old if i < last else faded
            self.tried[i] *= weight
            self.taken[i] *= weight
            if i < last:
                self.tried[i] += new
                self.taken[i] += new if i < accepted else 0.0

    def rates(self) -> list[float]:
        """Chance of a draft at each position, once those before it were accepted."""
        found, guess = [], FIRST_RATE
        for tried, taken in zip(self.tried, self.taken, strict=True):
            guess = (taken + DOUBT * guess) / (tried + DOUBT)
            found.append(guess)
            guess *= NEXT_RATE
        return found


class DraftPolicy:
    """Chooses the number of drafts for all decoding sequences of a step.

    ``setting`` is a fixed number or "auto". One number serves the whole batch; the requests'
    own acceptance decides through the sum of their expected tokens. Steps in which a grammar rules
    some sequence (``ruled``) are a kind of their own: drafts are made step by step there.
    """

    def __init__(self, setting: int | str) -> None:
        self.setting = setting
        self.is_auto = isinstance(setting, str)
        self.everyone = Acceptance()
        self.by_request: dict[str, Acceptance] = {}
        self.rests = self.is_auto
        """Whether drafting did not pay when last asked: then nothing is read by the MTP layer."""
        self.least_share = 0.0
        """Drafts that the head finds less likely than this are not made."""
        self.probe_s = 0.0
        """Seconds that probes have cost, since the start."""
        self.credit_s = 0.0
        """Seconds that probes may cost now."""
        self.quiet = 0
        """Steps that rest and need not be asked about or measured, where ``quiet_sizes`` agree."""
        self.quiet_sizes: dict[bool, range] = {False: NOBODY, True: NOBODY}
        """Numbers of sequences in such steps, by whether a grammar rules some."""
        self._quiet_pace = Pace()
        self._outcomes: dict[tuple[int, int], int] = {}
        self._fresh: dict[tuple[str, int, int], int] = {}
        self._paces: dict[tuple[int, bool], Pace] = {}
        self._asked = 0
        self._attempts = {False: 0, True: 0}
        self._last: tuple[Pace, int] | None = None
        self._taken_now = 0
        self._answer = FIRST_ANSWER
        self._row_s: float | None = None

    @property
    def limit(self) -> int:
        """The most drafts a sequence can have."""
        return MAX_DRAFTS if isinstance(self.setting, str) else self.setting

    @property
    def tried(self) -> list[int]:
        """Drafts verified by position, since the start."""
        found = [0] * MAX_DRAFTS
        for (drafted, accepted), times in self._outcomes.items():
            for i in range(min(drafted, accepted + 1)):
                found[i] += times
        return found

    @property
    def taken(self) -> list[int]:
        """Drafts accepted by position, since the start."""
        found = [0] * MAX_DRAFTS
        for (_, accepted), times in self._outcomes.items():
            for i in range(accepted):
                found[i] += times
        return found

    # -- outcomes --------------------------------------------------------------------------------

    def note(self, request_id: str, drafted: int, accepted: int) -> None:
        """Drafts of one request were verified."""
        if not drafted:
            return
        outcome = (drafted, accepted)
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        if self.is_auto:
            # Weighed when the next choice is: adding it up would cost too much in every step.
            key = (request_id, drafted, accepted)
            self._fresh[key] = self._fresh.get(key, 0) + 1
            self._taken_now += accepted

    def forget(self, request_id: str, tokens: int) -> None:
        """A request has ended, with an answer of so many tokens."""
        if not self.is_auto:
            return
        self._weigh_outcomes()
        self.by_request.pop(request_id, None)
        self._answer += 0.1 * (max(tokens, 1) - self._answer)
        for pace in self._paces.values():
            if pace.is_personal:
                self._end_quiet()
                pace.left = 0

    def verified(self, sequences: int, drafts: int, seconds: float, *, ruled: bool = False) -> None:
        """A step of decoding sequences alone, each with so many drafts, took so long."""
        if not self.is_auto:
            return
        pace = self._pace(sequences, ruled)
        follows = self._last == (pace, drafts)
        self._last = (pace, drafts)
        self.credit_s += SHARE * seconds
        if not drafts:
            pace.rested += 1
            if follows:
                pace.note_plain(seconds)
            return
        pace.steps += 1
        if pace.probing:
            gained = 1.0 + self._taken_now / sequences
            self._spend(seconds - pace.plain_s * gained)
        self._taken_now = 0
        if follows:
            pace.note_verified(drafts, seconds)

    def drafted(self, sequences: int, drafts: int, seconds: float, *, ruled: bool = False) -> None:
        """Drafting so many tokens for each sequence, behind a step with as many, took so long."""
        if not self.is_auto:
            return
        pace = self._pace(sequences, ruled)
        if pace.probing:
            self._spend(seconds)
        if self._last == (pace, drafts):
            pace.note_drafted(drafts, seconds)
            pace.rested = 0

    def caught_up(self, sequences: int, rows: int, seconds: float, *, ruled: bool = False) -> None:
        """The MTP layer read rows that had been left, and may have drafted behind them."""
        if not self.is_auto:
            return
        if self._pace(sequences, ruled).probing:
            self._spend(seconds)
        each = seconds / rows
        self._row_s = each if self._row_s is None else self._row_s + 0.2 * (each - self._row_s)

    def mixed(self) -> None:
        """A step was not of sequences that all decode alike: the next one is not measured."""
        self._last = None
        self._taken_now = 0

    def _spend(self, seconds: float) -> None:
        self.probe_s += seconds
        self.credit_s -= seconds

    def _weigh_outcomes(self) -> None:
        for (request_id, drafted, accepted), times in self._fresh.items():
            self.everyone.note(drafted, accepted, times)
            own = self.by_request.get(request_id)
            if own is None:
                own = self.by_request[request_id] = Acceptance()
            own.note(drafted, accepted, times)
        self._fresh.clear()

    def _first_drafts(self) -> float:
        """The share of first drafts that were accepted, of those not weighed yet."""
        counts = [(min(key[2], 1), times) for key, times in self._fresh.items()]
        return sum(taken * times for taken, times in counts) / max(sum(t for _, t in counts), 1)

    # -- choice ----------------------------------------------------------------------------------

    def held(self, sequences: int, *, ruled: bool = False) -> int | None:
        """Drafts per sequence for the next step if that was chosen before; None to ``choose``."""
        if not isinstance(self.setting, str):
            return self.setting
        self._end_quiet()
        pace = self._pace(sequences, ruled)
        self._asked += 1
        pace.asked = self._asked
        if not pace.left:
            return None
        pace.left -= 1
        if pace.probing:
            pace.probing -= 1
        return pace.drafts

    def rest_quietly(self, sequences: int, *, ruled: bool = False) -> None:
        """Take the steps of a rest that need not be measured off it, all at once.

        None where drafting paid at another batch size not long ago: then rows are kept for it.
        """
        pace = self._pace(sequences, ruled)
        if (
            self.rests
            and pace.left > MEASURED
            and not pace.drafts
            and not any(
                one.chosen and self._asked - one.asked < LONGEST_REST
                for one in self._paces.values()
            )
        ):
            most = 1 << _bucket(sequences)
            self.quiet_sizes = {ruled: range(most // 2 + 1, most + 1), not ruled: NOBODY}
            self._quiet_pace = pace
            self._move_quiet(pace.left - MEASURED)

    def _end_quiet(self) -> None:
        """Give the rest back the quiet steps that were not made: another batch size has come."""
        if self.quiet:
            self._move_quiet(-self.quiet)

    def _move_quiet(self, steps: int) -> None:
        pace = self._quiet_pace
        self.quiet += steps
        pace.left -= steps
        pace.rested += steps
        self.credit_s += SHARE * steps * pace.plain_s

    def choose(self, request_ids: Sequence[str], *, behind: int = 0, ruled: bool = False) -> int:
        """Drafts per sequence for the next step of these requests.

        ``behind`` is the number of rows that the MTP layer has to read before it can draft.
        """
        if not isinstance(self.setting, str):
            return self.setting
        if not request_ids:
            return 0
        self._end_quiet()
        pace = self._pace(len(request_ids), ruled)
        was_probe, seen = bool(pace.drafts) and not pace.chosen, self._first_drafts()
        self._weigh_outcomes()
        pace.probing, pace.is_personal = 0, False
        if not pace.drafts:
            pace.settle()
        if not pace.knows_plain:
            return self._hold(pace, 0, PROBE_STEPS, rests=not pace.chosen)
        costs = self._costs(pace, len(request_ids), ruled)
        if len(costs) == 1 and self._attempts[ruled] < ATTEMPTS:
            self._attempts[ruled] += 1
            return self._probe(pace)
        best = self._best(request_ids, pace, costs, behind)
        # Before it is given up, too: perhaps plain steps have become slower as well.
        checks_after = PLAIN_EVERY if best else LONG
        if pace.chosen and pace.drafts and pace.steps >= checks_after:
            pace.forget_plain()
            return self._hold(pace, 0, PLAIN_STEPS, rests=False)
        pace.steps = 0 if not pace.drafts else pace.steps
        pace.chosen = best
        if best:
            pace.rest = pace.failed = 0
            return self._hold(pace, best, HOLD)
        if was_probe:
            # One that alone would have shown drafting to pay is a sign that texts have changed.
            pace.failed = (
                0 if len(costs) > 1 and seen >= costs[1] * START - 1.0 else pace.failed + 1
            )
        pace.rest = min(2 * pace.rest, LONGEST_REST) if pace.rest else FIRST_REST
        pace.is_personal = self._best((), pace, costs, behind) > 0
        if pace.is_personal:
            return self._hold(pace, 0, pace.rest)
        if not was_probe and self._may_probe(pace, costs, behind):
            return self._probe(pace)
        return self._hold(pace, 0, max(pace.rest, self._before_probe(pace, costs, behind)))

    def _hold(self, pace: Pace, drafts: int, steps: int, *, rests: bool = True) -> int:
        pace.drafts, pace.left = drafts, steps - 1
        self.rests = not drafts and rests
        return drafts

    def _probe(self, pace: Pace) -> int:
        pace.probing = PROBE_STEPS
        return self._hold(pace, 1, PROBE_STEPS)

    def _costs(self, pace: Pace, sequences: int, ruled: bool) -> list[float]:
        """What steps with 0, 1, ... drafts cost, if need be at the nearest batch size."""
        if not pace.knows(1):
            mine = _bucket(sequences)
            known = [
                (abs(bucket - mine), bucket, other)
                for (bucket, kind), other in self._paces.items()
                if kind == ruled and other.knows(1)
            ]
            if not known and ruled and pace.knows_plain:
                guess = [1.0, UNKNOWN + RULED_S * sequences / pace.plain_s]
                if _is_hopeless(guess):
                    return guess
            pace = min(known)[2] if known else pace
        return pace.costs(MAX_DRAFTS)

    def _may_probe(self, pace: Pace, costs: Sequence[float], behind: int) -> bool:
        """Whether acceptance could have changed enough to matter, and there is credit to look."""
        if _is_hopeless(costs) and pace.rested < STALE:
            return False
        price = self._price(pace, costs, behind)
        # What was not spent does not pile up to a burst of probes.
        self.credit_s = min(self.credit_s, 2.0 * price)
        return self.credit_s >= price

    def _before_probe(self, pace: Pace, costs: Sequence[float], behind: int) -> int:
        """Plain steps before the next probe, if one was not allowed now."""
        if _is_hopeless(costs):
            return STALE - pace.rested
        price = self._price(pace, costs, behind)
        # A little more, for what is behind then costs time to read too.
        per_second = 1.2 / (SHARE * pace.plain_s)
        steps = max(price - self.credit_s, 0.0) * per_second
        if pace.failed:
            rarer = price * per_second * 2.0 ** min(pace.failed - 1, 16)
            steps = max(steps, min(rarer, RARELY_S / pace.plain_s))
        return int(steps)

    def _price(self, pace: Pace, costs: Sequence[float], behind: int) -> float:
        """Seconds that a probe is expected to cost."""
        cost = costs[1] if len(costs) > 1 else UNKNOWN
        lost_s = pace.plain_s * PROBE_STEPS * max(cost - 1.0, 0.1)
        return lost_s + self._reading_s(pace, behind)

    def _best(
        self, request_ids: Sequence[str], pace: Pace, costs: Sequence[float], behind: int
    ) -> int:
        """The number of drafts with the most expected tokens per second; 0 if none pays."""
        tokens = self._expected(request_ids)
        reading = self._reading_s(pace, behind) / pace.plain_s / self._answer
        scores = [
            tokens[drafts] / max(cost + reading * tokens[drafts], 1e-3) if drafts else 1.0
            for drafts, cost in enumerate(costs)
        ]
        if len(scores) == 1:
            return 0
        now = min(pace.chosen, len(scores) - 1)
        bar = (STAY if now else START) + pace.scatter
        best = max(range(1, len(scores)), key=lambda k: scores[k] * (CLIMB if k == now else 1.0))
        return best if scores[best] >= bar else 0

    def _reading_s(self, pace: Pace, rows: int) -> float:
        return rows * (FIRST_ROW * pace.plain_s if self._row_s is None else self._row_s)

    def _expected(self, request_ids: Sequence[str]) -> list[float]:
        """Tokens of a step per sequence, for 0 ... ``MAX_DRAFTS`` drafts."""
        rates = self.everyone.rates()
        total = [0.0] * (MAX_DRAFTS + 1)
        strangers = 0 if request_ids else 1
        for request_id in request_ids:
            own = self.by_request.get(request_id)
            if own is None:
                strangers += 1
            else:
                pairs = zip(rates, own.tried, own.taken, strict=True)
                shares = [(taken + PRIOR * rate) / (tried + PRIOR) for rate, tried, taken in pairs]
                _add_up(shares, 1.0, total)
        if strangers:
            _add_up(rates, float(strangers), total)
        count = max(len(request_ids), 1)
        return [one / count for one in total]

    def _pace(self, sequences: int, ruled: bool) -> Pace:
        key = (_bucket(sequences), ruled)
        pace = self._paces.get(key)
        if pace is None:
            pace = self._paces[key] = Pace()
        return pace


def _is_hopeless(costs: Sequence[float]) -> bool:
    """Whether a step with a draft would not pay if every one were accepted."""
    return len(costs) > 1 and costs[1] * START >= 2.0


def _bucket(sequences: int) -> int:
    """Batch sizes that share their measurements: 1, 2, 3-4, 5-8, 9-16, ..."""
    return (sequences - 1).bit_length()


def _add_up(rates: Sequence[float], weight: float, total: list[float]) -> None:
    """Add the expected tokens with 0, 1, ... drafts of ``weight`` sequences to ``total``."""
    survival = expected = weight
    total[0] += expected
    for i, rate in enumerate(rates):
        survival *= rate
        expected += survival
        total[i + 1] += expected
