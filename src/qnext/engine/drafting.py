"""Drafts for the next step: the MTP layer reads what is new, and guesses on from there."""

from collections.abc import Callable, Sequence

from qnext.engine.native_runner import NativeRunner
from qnext.engine.ruled import Choose, choose_ruled, ruled_by
from qnext.engine.runner import MtpWork, Runner
from qnext.engine.sampler import SampleRow
from qnext.engine.sequence import Sequence as Running
from qnext.engine.sizes import MAX_BACKLOG
from qnext.engine.speculative import DraftPolicy

FRESH_ROWS = 16
"""A sequence that the MTP layer is further behind than this makes the policy weigh anew."""
LOOK_EVERY = 32
"""Steps between looks at whether somebody's backlog is full, while nothing is drafted."""
FULL_BACKLOG = MAX_BACKLOG - 2 * LOOK_EVERY
"""Rows of a backlog that might exceed ``MAX_BACKLOG`` before the next look."""

RowOf = Callable[[Running, Sequence[int]], SampleRow]
"""What the sampler has to know about a sequence after so many drafts."""


class Drafter:
    """Lets the MTP layer read and draft when the policy says so, and says what that took.

    ``running`` is the list of sequences that have a slot, as it is at any time; ``row`` is what the
    sampler has to know, ``choose`` the sampler; ``clock`` gives seconds.
    """

    def __init__(
        self,
        runner: Runner,
        policy: DraftPolicy,
        running: Sequence[Running],
        *,
        row: RowOf,
        choose: Choose,
        defined_ids: int,
        clock: Callable[[], float],
    ) -> None:
        self.runner, self.policy, self._running = runner, policy, running
        self._row, self._choose = row, choose
        self._defined_ids, self._clock = defined_ids, clock

    def draft(self, sequences: Sequence[Running], k: int | None = None) -> None:
        """Let the MTP layer catch up, and propose tokens for those that decode.

        ``k`` for each, 0 to let it rest; None asks the policy.
        """
        policy = self.policy
        if not policy.limit:
            return
        if k is None and policy.quiet and self._are_quiet(sequences):
            policy.quiet -= 1
            return
        decoding = [s for s in sequences if s.length - s.done == 1 and not s.request.score_only]
        ruled = _is_ruled(decoding)
        if k is None:
            k = self._ask(decoding, ruled)
            follow(self.runner, policy, self._running)
        if not k and policy.rests:
            self._leave_behind(sequences)
            return
        started = self._clock()
        counts = {s: _room_for(s, k) for s in decoding}
        reading = [
            s for s in sequences
            if counts.get(s, 0) or _behind(s) >= MAX_BACKLOG
            or (s not in counts and not policy.rests)
        ]  # fmt: skip
        if not reading:
            return
        rows = sum(map(_behind, reading))
        proposals = draft_ahead(
            self.runner, reading, [counts.get(s, 0) for s in reading], row=self._row,
            choose=self._choose, defined_ids=self._defined_ids, least_share=policy.least_share,
        )  # fmt: skip
        for sequence, tokens in zip(reading, proposals, strict=True):
            guide = sequence.guide
            sequence.drafts.extend(tokens if guide is None else tokens[: guide.valid(tokens)])
        seconds = self._clock() - started
        if rows > (k + 1) * len(reading):
            policy.caught_up(max(len(decoding), 1), rows, seconds, ruled=ruled)
        elif len(decoding) == len(reading) and set(counts.values()) == {k}:
            policy.drafted(len(decoding), k, seconds, ruled=ruled)

    def _are_quiet(self, sequences: Sequence[Running]) -> bool:
        return len(sequences) in self.policy.quiet_sizes[_is_ruled(sequences)]

    def _ask(self, decoding: Sequence[Running], ruled: bool) -> int:
        if not decoding:
            return 0
        policy = self.policy
        k = policy.held(len(decoding), ruled=ruled)
        if k == 0:
            policy.rest_quietly(len(decoding), ruled=ruled)
            return 0
        behind = sum(map(_behind, decoding))
        if k is None or behind > FRESH_ROWS * len(decoding):
            k = policy.choose([s.request.id for s in decoding], behind=behind, ruled=ruled)
        return k

    def catch_up(self, sequences: Sequence[Running]) -> None:
        """Before snapshots: their pages should hold the MTP layer's rows too, read in one go.

        Not while drafting does not pay: then it begins anew behind the snapshot.
        """
        if not self.runner.keeps_rows:
            return
        if self.policy.rests:
            self._leave_behind(sequences)
            return
        behind = [s for s in sequences if s.slot is not None and self.runner.backlog(s.slot)]
        if behind:
            self.runner.fill([read_up(s) for s in behind])

    def _leave_behind(self, sequences: Sequence[Running]) -> None:
        """Forget the older rows of full backlogs: reading them would slow plain steps down."""
        if not self.runner.keeps_rows:
            return
        for sequence in sequences:
            if is_far_behind(sequence) and sequence.slot is not None:
                rows = FULL_BACKLOG // 2
                self.runner.shorten_backlog(sequence.slot, rows)
                sequence.mtp_len = sequence.mtp_first = sequence.done + 1 - rows
                sequence.lane = None  # it knows the first row


def follow(runner: Runner, policy: DraftPolicy, running: Sequence[Running]) -> None:
    """Have hidden rows kept or not: nothing will read those of the quiet part of a rest.

    Behind it the MTP layer goes on from the last row of each sequence, as behind a snapshot.
    """
    if runner.keeps_rows != (policy.quiet > 0):
        return
    if runner.keeps_rows:
        runner.doze()
        return
    late = [s for s in running if s.slot is not None and s.mtp_len <= s.done]
    runner.wake([s.slot for s in late if s.slot is not None])
    for sequence in late:
        if sequence.mtp_len < sequence.done:
            sequence.mtp_len = sequence.mtp_first = sequence.done
            sequence.lane = None  # it knows the first row


def is_far_behind(sequence: Running) -> bool:
    """Whether a backlog may be full before it is looked at again."""
    return _behind(sequence) >= FULL_BACKLOG


def _is_ruled(sequences: Sequence[Running]) -> bool:
    """Whether drafts are made step by step: some sequence has rules."""
    return any(s.guide is not None for s in sequences)


def _behind(sequence: Running) -> int:
    """Rows that the MTP layer has to read before it can draft."""
    return sequence.done + 1 - sequence.mtp_len


def _room_for(sequence: Running, k: int) -> int:
    """Never more than can still be emitted after the next token."""
    return min(k, sequence.max_tokens - len(sequence.output_ids) - 1)


def draft_ahead(
    runner: Runner,
    reading: Sequence[Running],
    counts: Sequence[int],
    *,
    row: RowOf,
    choose: Choose,
    defined_ids: int,
    least_share: float = 0.0,
) -> list[list[int]]:
    """``counts[b]`` drafts for each sequence, 0 to let the MTP layer read only.

    A draft is chosen as its token will be: the most likely one, or sampled with the noise of its
    position. A native runner does it in one call where no grammar rules, and stops at what the
    head finds less likely than ``least_share``.
    """
    works = [read_up(sequence) for sequence in reading]
    drafting = [b for b, count in enumerate(counts) if count]
    if isinstance(runner, NativeRunner) and all(s.guide is None for s in reading):
        return runner.propose(
            works, counts, reading, defined_ids=defined_ids, least_share=least_share
        )
    logits = runner.fill(works)[drafting]
    drafts: list[list[int]] = [[] for _ in reading]
    while drafting:
        rows = [row(reading[b], drafts[b]) for b in drafting]
        ruled = [ruled_by(reading[b].guide, drafts[b], len(drafts[b])) for b in drafting]
        tokens, _ = choose_ruled(
            choose, logits, rows, ruled, defined_ids=defined_ids, tie_bound=None
        )
        for b, token in zip(drafting, tokens, strict=True):
            drafts[b].append(token)
        drafting = [b for b in drafting if counts[b] > len(drafts[b])]
        if drafting:
            logits = runner.draft([_read_on(reading[b], drafts[b]) for b in drafting])
    return drafts


def read_up(sequence: Running) -> MtpWork:
    """MTP rows for everything up to the newest known token; they count as read from here on."""
    assert sequence.slot is not None
    start, end = sequence.mtp_len, sequence.done + 1
    work = MtpWork(
        slot=sequence.slot,
        pages=sequence.pages,
        start=start,
        ids=sequence.tokens(start, end),
        first=sequence.mtp_first,
    )
    sequence.mtp_len = end
    return work


def _read_on(sequence: Running, drafts: Sequence[int]) -> MtpWork:
    """One provisional MTP row for the last draft; the next reading writes over it."""
    assert sequence.slot is not None
    return MtpWork(
        slot=sequence.slot,
        pages=sequence.pages,
        start=sequence.length - 1 + len(drafts),
        ids=drafts[-1:],
        first=sequence.mtp_first,
    )
