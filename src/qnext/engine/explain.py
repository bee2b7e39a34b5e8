"""Why a prompt was reused as far as it was and no further: one record per request.

``prompt_tokens = cached + matched_not_reused + unmatched``. *Cached* tokens were not computed.
*Matched* ones had been seen before, but nothing to start from lay behind them, for a reason that is
named. The rest is new; where it begins, the record says what was expected instead. The usage of a
request, the counters of the engine and every explanation are read from the same record. No torch.
"""

import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

MAX_KEPT = 256
"""Requests that can be asked about."""

Reason = Literal[
    "no_snapshot", "evicted", "disk_slower", "disk_corrupt", "budget", "last_token", "disabled"
]
"""Why tokens that were seen before had to be computed:

no state was saved there; one was, and had to go; reading it from disk would have taken longer than
computing, failed, or found no room; the last token of a prompt must run to say what follows; the
prefix cache is off, or log-probabilities of the prompt are wanted.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the prefix cache knows of a prompt."""

    known: int
    """Tokens of it that were seen before."""
    expected: int | None = None
    """What an earlier prompt had where they end."""
    lost: tuple[int, str, float] | None = None
    """(length, why, age in seconds) of the deepest state on the way that was evicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """The snapshot a request started from."""

    at: int
    """Tokens before it."""
    why: str
    age_s: float
    tier: Literal["memory", "disk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstUnmatched:
    """The first token that no earlier prompt had at this place."""

    index: int
    expected: int | None
    """None where earlier prompts ended."""
    got: int
    where: str | None = None
    """Part of the conversation: "system", "user 1", "assistant 2"; None for plain text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReport:
    """What of a prompt was reused."""

    prompt_tokens: int
    cached: int
    matched_not_reused: int
    unmatched: int
    reason: Reason | None
    """Why matched tokens were not reused; None if all were."""
    detail: str | None
    """More about the reason."""
    snapshot: Used | None
    first_unmatched: FirstUnmatched | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def explain(
    prompt_ids: Sequence[int],
    *,
    found: Found,
    used: Used | None,
    disabled: str | None = None,
    disk_reason: Reason | None = None,
    places: Sequence[tuple[int, str]] = (),
) -> CacheReport:
    """The record of one request.

    ``disabled`` says what forbids reuse, ``disk_reason`` why a snapshot on disk was not used;
    ``places`` are (first token, name) of the parts of a conversation, in order.
    """
    length = len(prompt_ids)
    cached = used.at if used else 0
    known = max(min(found.known, length), cached)
    reason: Reason | None = None
    detail = None
    if disabled is not None:
        reason, detail = "disabled", disabled
    elif known > cached:
        lost = found.lost
        if disk_reason is not None:
            reason = disk_reason
        elif cached == length - 1:
            reason = "last_token"
        elif lost is not None and lost[0] > cached:
            reason = "evicted"
            detail = f"the {lost[1]} snapshot at {lost[0]}, {lost[2]:.0f} s before"
        else:
            reason = "no_snapshot"
    first = None
    if known < length:
        at = bisect_right([start for start, _ in places], known) - 1
        first = FirstUnmatched(
            index=known, expected=found.expected, got=prompt_ids[known],
            where=places[at][1] if at >= 0 else None,
        )  # fmt: skip
    return CacheReport(
        prompt_tokens=length, cached=cached, matched_not_reused=known - cached,
        unmatched=length - known, reason=reason, detail=detail, snapshot=used,
        first_unmatched=first,
    )  # fmt: skip


class CacheLog:
    """The records of the last requests, and sums over all. May be read from other threads."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._kept: deque[tuple[str, CacheReport]] = deque(maxlen=MAX_KEPT)
        self._sums: Counter[str] = Counter()

    def add(self, request_id: str, report: CacheReport, *, counted: bool = True) -> None:
        """Note what was reused for a request; of several answers to a prompt one is counted."""
        with self._mutex:
            self._kept.append((request_id, report))
            if not counted:
                return
            self._sums["requests"] += 1
            self._sums["prompt_tokens"] += report.prompt_tokens
            self._sums["cached_tokens"] += report.cached
            self._sums["unmatched_tokens"] += report.unmatched
            if report.matched_not_reused:
                self._sums[f"lost_tokens:{report.reason}"] += report.matched_not_reused

    def last(self, count: int = MAX_KEPT) -> list[tuple[str, CacheReport]]:
        """(request id, record) of the last requests, newest first."""
        with self._mutex:
            return list(self._kept)[::-1][:count]

    def find(self, request_id: str) -> CacheReport | None:
        """The record of a request, unless it is too long ago."""
        return next((one for name, one in self.last() if name == request_id), None)

    def counts(self) -> dict[str, int]:
        """Sums since the start; ``lost_tokens:REASON`` were seen before and computed again."""
        with self._mutex:
            return dict(self._sums)
