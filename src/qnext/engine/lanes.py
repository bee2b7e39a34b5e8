"""Steps in which every sequence decodes: one native call from newest tokens to next tokens.

The engine's general step goes through rows of logits and looks at every request for what it might
want. Most steps of most servers need none of that: nobody waits, every prompt has run, and what is
left is to run, choose, accept and draft. ``Lanes`` recognises such a step and does it in one call
(``csrc/lane.h``); the numbers, and so the tokens, are those of the general step.

A step of a large model streams its weights through every cache, so Python begins each time with
nothing in them: what counts here is how many different functions and objects a step touches. So
steps follow each other in the call for as long as nothing but running and choosing is to be done,
up to a fiftieth of a second.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np

from qnext.engine.drafting import FRESH_ROWS, LOOK_EVERY, RowOf, follow, is_far_behind
from qnext.engine.native_runner import NativeRunner
from qnext.engine.native_sampler import logprobs_of
from qnext.engine.request import FinishReason, TokenLogprobs
from qnext.engine.ruled import Choose, Ruled, choose_if_refused, mask_before, may_try
from qnext.engine.scheduler import Scheduler
from qnext.engine.sequence import Sequence as Running
from qnext.engine.speculative import DraftPolicy
from qnext.engine.telling import force, step_on

MOST_ROUNDS = 8
"""Steps between two looks of Python, if they take no longer than ``native_runner.WITHIN_S``."""
REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")

Told = Callable[[Running, FinishReason | None, list[TokenLogprobs]], FinishReason | None]
"""Takes what a sequence got in a step, beside the tokens its output ends with now; whether it has
ended, and why."""


class Lanes:
    """The decoding steps of one engine, as far as they are plain."""

    def __init__(
        self,
        runner: NativeRunner,
        scheduler: Scheduler,
        policy: DraftPolicy,
        *,
        row: RowOf,
        choose: Choose,
        defined_ids: int,
        tie_bound: float | None,
    ) -> None:
        self.runner, self.scheduler, self.policy = runner, scheduler, policy
        self._row, self._choose, self._bound = row, choose, tie_bound
        self.defined_ids = defined_ids
        self.tie_bound = -1.0 if tie_bound is None else tie_bound
        self._looked = 0

    def ready(self) -> bool:
        """Whether the next step is plain decoding; gives sequences the pages they need for it."""
        scheduler = self.scheduler
        running = scheduler.running
        if not running or (scheduler.waiting and len(running) < scheduler.num_slots):
            return False
        limit = self.policy.limit
        if len(running) * (1 + limit) > scheduler.max_batch_tokens:
            return False
        ahead, page = 2 * limit, scheduler.page_size
        fits = True
        for s in running:
            output = len(s.output_ids)
            length = len(s.request.prompt_ids) + output
            if not output or length - s.done != 1 or s.plants:
                return False
            if s.request.watch is not None or (s.guide is not None and not _is_plain(s)):
                return False
            last = len(s.request.prompt_ids) + s.max_tokens
            if len(s.pages) * page < min(length + ahead, last):
                fits = False
        if not fits:
            # May park somebody, who then waits for the general step to come back.
            scheduler.fit_pages()
        return bool(scheduler.running)

    def step(self, told: Told) -> tuple[list[Running], int | None]:
        """Run it. ``told`` takes every sequence's tokens; returns who ended, and drafts due.

        Drafts are due, so many for each or 0, when the MTP layer has to read up; None when not.
        """
        running = list(self.scheduler.running)
        runner, policy = self.runner, self.policy
        limit, wanted, native, started = policy.limit, 0, 0, 0.0
        is_quiet = False
        ruled = any(s.guide is not None for s in running)
        if policy.quiet and len(running) in policy.quiet_sizes[ruled]:
            # From here on this is a step of an engine that never drafts.
            policy.quiet -= 1
            limit, is_quiet = 0, True
        if limit:
            wanted = self._ask(running, ruled)
            follow(runner, policy, self.scheduler.running)
            # Under rules drafts are made step by step, elsewhere.
            native = wanted if wanted and not ruled and not runner.is_behind(running) else 0
            if policy.quiet and not any(s.drafts for s in running):
                # A rest begins, or goes on for another batch size; this step was taken off it.
                limit, is_quiet = 0, True
            elif policy.is_auto:
                started = perf_counter()
        lanes, want_logits, may_stop = [], False, False
        for s in running:
            lane = s.lane
            if lane is None or s.lane_pages != len(s.pages):
                lane = runner.lane_of(s)
            lanes.append(lane)
            params = s.request.params
            if params.logprobs is not None:
                want_logits = True
            if params.stop:
                may_stop = True
        masks = None
        if ruled:
            # A choice may have to be made again.
            want_logits, masks = True, [_mask_of(s) for s in running]
        rounds = 1
        # Where drafting is being weighed, every step is measured. Stop strings are looked for in
        # the text of every step, so that a snapshot of the end does not lie behind them.
        may_go_on = not limit or (native == wanted and not policy.is_auto)
        if may_go_on and not want_logits and not may_stop:
            rounds = self._rounds(running, native)
            if is_quiet:
                rounds = min(rounds, 1 + policy.quiet)
        found, logits = runner.advance(
            running, lanes, wanted=native, defined_ids=self.defined_ids, tie_bound=self.tie_bound,
            least_share=policy.least_share, want_logits=want_logits, rounds=rounds, masks=masks,
        )  # fmt: skip
        if is_quiet:
            policy.quiet -= runner.rounds - 1
        drafted: set[int] = set()
        ended, row = [], 0
        for s, (tokens, verified, close, why, drafts, *_) in zip(running, found, strict=True):
            count = len(tokens)
            s.done += count
            s.ran += count
            reason = REASONS[why]
            if s.guide is not None:
                assert runner.logits is not None
                close, reason = self._rule(s, tokens, close, runner.logits, row)
            if close:
                first = len(s.output_ids) - count
                s.near_ties += [first + place for place in close]
            logprobs = []
            top = s.request.params.logprobs
            if top is not None:
                assert logits is not None
                logprobs = logprobs_of(logits[row : row + count], tokens, [top] * count)
            if limit:
                for tested, tried, accepted in verified:
                    drafted.add(tested)
                    row += tested
                    if tested:
                        s.drafted += tested
                        s.accepted += accepted
                        policy.note(s.request.id, tried, accepted)
            row += 1
            s.drafts = drafts
            counts = s.counts
            for token in tokens:
                counts[token] = counts.get(token, 0) + 1
            if s.guide is not None and reason is None:
                force(s)
            if told(s, reason, logprobs) is not None:
                ended.append(s)
        if limit:
            drafting_s = runner.seconds[2]
            if policy.is_auto and len(drafted) == 1:
                seconds = perf_counter() - started - drafting_s
                policy.verified(len(running), drafted.pop(), seconds, ruled=ruled)
            elif policy.is_auto:
                policy.mixed()
            if native and policy.is_auto:
                policy.drafted(len(running), native, drafting_s)
            if not native and (wanted or self._somebody_is_far_behind()):
                return ended, wanted
        return ended, None

    def _rounds(self, running: list[Running], drafts: int) -> int:
        """How many steps in a row there are pages for, each with so many drafts."""
        most, page = MOST_ROUNDS, self.scheduler.page_size
        for s in running:
            room = len(s.pages) * page - len(s.request.prompt_ids) - len(s.output_ids)
            most = min(most, 1 + max(room - 2 * drafts, 0) // (1 + drafts))
        return most

    def _rule(
        self, s: Running, tokens: list[int], close: list[int], logits: np.ndarray, row: int
    ) -> tuple[list[int], FinishReason | None]:
        """Hold the token just chosen against the rules of its sequence, which go on with it.

        It was chosen from row ``row`` of logits [R, V]; it may become another one, in ``tokens``
        too. Returns near-ties, and why the answer ends.
        """
        guide, [token] = s.guide, tokens
        assert guide is not None
        s.output_ids.pop()  # a row is of the answer before its token
        again = choose_if_refused(
            self._choose, lambda: (logits[row], self._row(s, ())), Ruled(guide, (), None), token,
            is_close=bool(close), defined_ids=self.defined_ids, tie_bound=self._bound,
        )  # fmt: skip
        if again is not None:
            other, rivals = again
            close = [0] if rivals else []
            if other != token:
                s.lane.choose_instead(other)
                token = tokens[0] = other
        s.output_ids.append(token)
        if guide.has_no_choice:
            # It counts as forced, however it was found.
            s.forced.append(len(s.output_ids) - 1)
        return close, step_on(s, token, after=len(s.output_ids))

    def _ask(self, running: list[Running], ruled: bool) -> int:
        """Drafts for the next step."""
        policy = self.policy
        wanted = policy.held(len(running), ruled=ruled)
        if wanted == 0:
            policy.rest_quietly(len(running), ruled=ruled)
            return 0
        if wanted is None or (policy.is_auto and self.runner.is_behind(running)):
            # Other sequences than the ones it was chosen for, perhaps, and far behind.
            behind = sum([s.done + 1 - s.mtp_len for s in running])
            if wanted is None or behind > FRESH_ROWS * len(running):
                wanted = policy.choose([s.request.id for s in running], behind=behind, ruled=ruled)
        return wanted

    def _somebody_is_far_behind(self) -> bool:
        """Whether a backlog may be full before the next look, if it is time to look."""
        self._looked = (self._looked + 1) % LOOK_EVERY
        if self._looked or not self.runner.keeps_rows:
            return False
        return any(is_far_behind(s) for s in self.scheduler.running)


def _is_plain(s: Running) -> bool:
    """Whether a sequence with rules has no drafts, and mostly needs no mask before a choice."""
    return not s.drafts and s.ends is None and may_try(s.request.params)


def _mask_of(s: Running) -> np.ndarray | None:
    mask = mask_before(s.guide, (), s.request.params)
    return None if mask is None else mask.view(np.int32)
