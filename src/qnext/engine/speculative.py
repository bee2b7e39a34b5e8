"""How many tokens to draft: from measured acceptance and measured time, never slower than none.

A step that verifies k drafts per sequence costs more than one without: more rows in the forward,
one reading pass of the MTP layer, and k - 1 further draft passes. It yields
``1 + a1 + a1 a2 + ...`` tokens per sequence, where a_i is the chance that draft i is accepted given
that those before it were. Both sides are measured while serving. What is chosen here changes time
only: the tokens of a request never depend on how many were drafted.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_DRAFTS = 4
"""The head is trained for one step; beyond a few its guesses are not worth a row."""
DECAY = 0.97
"""Weight of older outcomes of a request against a new one."""
PRIOR = 8.0
"""Outcomes that the average of all requests counts for in the estimate of one."""
WINDOW = 32
"""Measured steps that count."""
HURDLE = 1.08
"""Drafting must promise so much more than none: what it costs beside the steps that are measured,
above all reading prompts, is not known, and measured times scatter."""
PROBE_STEPS = 4
"""Steps of one probe."""
FIRST_REST = 256
"""Steps without drafts before the first probe; doubled as long as probes do not pay."""
LONGEST_REST = 8192


@dataclass(slots=True)
class Acceptance:
    """Decayed counts of accepted and rejected drafts, by position."""

    tried: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFTS)
    taken: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFTS)

    def note(self, drafted: int, accepted: int) -> None:
        """The outcome of one verification: positions after the first rejection were not tried."""
        for i in range(min(drafted, accepted + 1)):
            self.tried[i] = self.tried[i] * DECAY + 1.0
            self.taken[i] = self.taken[i] * DECAY + (1.0 if i < accepted else 0.0)


class DraftPolicy:
    """Chooses the number of drafts for all decoding sequences of a step.

    ``setting`` is a fixed number or "auto". One number serves the whole batch; the requests'
    own acceptance decides through the sum of their expected tokens.
    """

    def __init__(self, setting: int | str) -> None:
        self.setting = setting
        self.everyone = Acceptance()
        self.by_request: dict[str, Acceptance] = {}
        self.tried = [0] * MAX_DRAFTS
        """Drafts verified by position, since the start."""
        self.taken = [0] * MAX_DRAFTS
        """Drafts accepted by position, since the start."""
        self.rests = False
        """Whether drafting did not pay when last asked: then prompts need not be read at once."""
        self.least_share = 0.0
        """Drafts that the head finds less likely than this are not made."""
        self._times: dict[tuple[str, int, int], deque[float]] = {}
        self._medians: dict[tuple[str, int], dict[int, float]] = {}
        self._rest: dict[int, int] = {}
        self._resting: dict[int, int] = {}
        self._probing: dict[int, int] = {}
        self._steps: dict[int, int] = {}

    @property
    def limit(self) -> int:
        """The most drafts a sequence can have."""
        return MAX_DRAFTS if isinstance(self.setting, str) else self.setting

    # -- outcomes --------------------------------------------------------------------------------

    def note(self, request_id: str, drafted: int, accepted: int) -> None:
        """Drafts of one request were verified."""
        if not drafted:
            return
        for i in range(min(drafted, accepted + 1)):
            self.tried[i] += 1
            self.taken[i] += i < accepted
        if isinstance(self.setting, str):
            self.everyone.note(drafted, accepted)
            own = self.by_request.get(request_id)
            if own is None:
                own = self.by_request[request_id] = Acceptance()
            own.note(drafted, accepted)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.by_request.pop(request_id, None)

    def verified(self, sequences: int, drafts: int, seconds: float) -> None:
        """A forward of decoding sequences alone, each with so many drafts, took so long."""
        resting = 0 if drafts else self._resting.get(_bucket(sequences), 0)
        if resting > WINDOW and resting % WINDOW:
            return  # one of many such steps
        self._note_time("verify", sequences, drafts, seconds)

    def drafted(self, sequences: int, drafts: int, seconds: float) -> None:
        """Drafting so many tokens for each sequence took so long."""
        self._note_time("draft", sequences, drafts, seconds)

    def _note_time(self, phase: str, sequences: int, drafts: int, seconds: float) -> None:
        if not isinstance(self.setting, str):
            return  # nothing is chosen by it
        key = (phase, _bucket(sequences), drafts)
        times = self._times.setdefault(key, deque(maxlen=WINDOW))
        times.append(seconds)
        self._medians.setdefault(key[:2], {})[drafts] = sorted(times)[len(times) // 2]

    # -- choice ----------------------------------------------------------------------------------

    def choose(self, request_ids: Sequence[str]) -> int:
        """Drafts per sequence for the next step of these requests."""
        if not isinstance(self.setting, str):
            return self.setting
        if not request_ids:
            return 0
        if self.rests_on(len(request_ids)):
            return 0
        bucket = _bucket(len(request_ids))
        best = max(range(MAX_DRAFTS + 1), key=lambda k: (self._rate(request_ids, bucket, k), -k))
        if self._probing.get(bucket, 0) > 0:
            self._probing[bucket] -= 1
            return max(best, 1)
        self.rests = best == 0
        if best > 0:
            self._rest[bucket] = FIRST_REST
            return self._sometimes_without(bucket, best)
        self._resting[bucket] = self._rest.setdefault(bucket, FIRST_REST)
        self._rest[bucket] = min(self._rest[bucket] * 2, LONGEST_REST)
        return 0

    def rests_on(self, sequences: int) -> bool:
        """Whether a step of so many sequences belongs to a rest, of which it is then one less.

        Nothing is weighed before a rest is over: it would cost more than a small model's step.
        """
        bucket = _bucket(sequences)
        resting = self._resting.get(bucket, 0)
        if resting == 1:
            self._probing[bucket] = PROBE_STEPS
        if resting:
            self._resting[bucket] = resting - 1
        return resting > 1

    def _sometimes_without(self, bucket: int, best: int) -> int:
        """Now and then a step without drafts, so that the price of drafting stays known."""
        count = self._steps[bucket] = self._steps.get(bucket, 0) + 1
        known = len(self._times.get(("verify", bucket, 0), ()))
        return 0 if count % 64 == 0 or (known < 4 and count % 4 == 0) else best

    def _rate(self, request_ids: Sequence[str], bucket: int, drafts: int) -> float:
        """Expected tokens per second with so many drafts each, less what they must gain."""
        tokens = sum(self._expected(request_id, drafts) for request_id in request_ids)
        # A coarse clock may not have moved.
        hurdle = HURDLE if drafts else 1.0
        return tokens / max(self._seconds(bucket, drafts) * hurdle, 1e-9)

    def _expected(self, request_id: str, drafts: int) -> float:
        own = self.by_request.get(request_id)
        expected = survival = 1.0
        for i in range(drafts):
            # Before anything is known a draft is taken to be right more often than not.
            tried, taken = self.everyone.tried[i] + 1.0, self.everyone.taken[i] + 0.7
            rate = taken / tried
            if own is not None:
                rate = (own.taken[i] + PRIOR * rate) / (own.tried[i] + PRIOR)
            survival *= rate
            expected += survival
        return expected

    def _seconds(self, bucket: int, drafts: int) -> float:
        """Time of a step: medians of what was measured, else a guess from the nearest."""
        verify = self._guess("verify", bucket, drafts, growth=0.1)
        if not drafts:
            return verify
        plain = self._guess("verify", bucket, 0, growth=0.1)
        draft = self._guess("draft", bucket, drafts, growth=1.0, otherwise=0.15 * plain * drafts)
        return verify + draft

    def _guess(
        self, phase: str, bucket: int, drafts: int, *, growth: float, otherwise: float = 1.0
    ) -> float:
        known = self._medians.get((phase, bucket), {})
        if drafts in known:
            return known[drafts]
        if not known:
            return otherwise
        nearest = min(known, key=lambda k: (abs(k - drafts), k))
        return known[nearest] * (1.0 + growth * drafts) / (1.0 + growth * nearest)


def _bucket(sequences: int) -> int:
    """Batch sizes that share their measurements: 1, 2, 3-4, 5-8, 9-16, ..."""
    return (sequences - 1).bit_length() if sequences else 0
