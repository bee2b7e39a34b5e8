"""Random traffic for an engine, and what must hold after every step whatever the traffic was.

``Traffic`` makes up requests. ``Session`` passes them to an engine and checks it; the checks are
numbered S1 ... S13 in their messages:

S1 every accepted request ends once, with one reason. S2 the count of holders of every page and
slot equals a recount. S3 nothing is held twice by the same owner, nothing beyond what there is.
S4 what a sequence writes next nobody else can see. S5 rows of a step stay in the budget (checked
by the runner). S6 nobody is overtaken more than eight times. S7 everybody gets their own answer.
S8 after the last request and ``clear`` everything is free. S9 the same traffic gives the same
plans (checked by running it twice). S10 what was cancelled is gone after one step. S11 lengths of
a sequence agree with each other. S12 what counts as cached was computed before. S13 nobody waits
while more than a stated number of later requests start.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hash_chain import Chain, HashRunner

from qnext.engine.engine import Engine
from qnext.engine.request import Event, Request, SamplingParams
from qnext.engine.scheduler import MAX_BYPASS
from qnext.engine.sequence import MAX_OVERTAKINGS
from qnext.engine.sequence import Sequence as Running
from qnext.errors import RequestError

Dice = Callable[[int, int], int]
"""A number from low to high, both included; small numbers give simple traffic."""


class Clock:
    """Seconds that pass a little with every look, the same in every run."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 1000.0
        self._generator = random.Random(seed)

    def __call__(self) -> float:
        self.now += self._generator.random() * 0.01
        return self.now


class Traffic:
    """Requests whose prompts begin alike: documents, earlier prompts, conversations going on.

    ``plain`` ones are greedy and have no other wishes than two log-probabilities per token.
    """

    def __init__(self, dice: Dice, *, vocab_size: int, longest: int, plain: bool = False) -> None:
        self.dice, self.vocab_size, self.longest, self.plain = dice, vocab_size, longest, plain
        self.documents = [self._tokens(dice(1, longest - 8)) for _ in range(3)]
        self.past: list[tuple[int, ...]] = []
        """What was said, prompt and answer, of requests that ended."""
        self._made = 0

    def requests(self) -> list[Request]:
        """One request, or several answers to one prompt."""
        dice = self.dice
        start = self._start()
        prompt = (*start, *self._tokens(dice(0, 8)))[: self.longest] or (self._token(),)
        score_only = not self.plain and dice(0, 19) == 19
        params = self._params(len(prompt), score_only=score_only)
        where = [dice(0, len(prompt) + 1) for _ in range(max(dice(-4, 2), 0))]
        where += [len(start)] if dice(0, 2) == 2 else []
        hints = tuple((length, ("system", "stable")[dice(0, 1)]) for length in where)
        choices = max(dice(-9, 3), 1)
        priority = (0, 0, 0, 1, -1)[dice(0, 4)]
        bad = ((self._token(),), (self._token(), self._token()))[: max(dice(-12, 2), 0)]
        made, group = [], f"g{self._made}" if dice(0, 3) else ""
        for choice in range(1 if score_only else choices):
            self._made += 1
            request = Request(
                id=f"r{self._made}", prompt_ids=prompt, params=params, priority=priority,
                eos_ids=() if self.plain else (self.vocab_size - 1,), choice=choice, hints=hints,
                group=group, score_only=score_only, bad_ids=() if self.plain else bad,
            )  # fmt: skip
            made.append(request)
        return made

    def _start(self) -> tuple[int, ...]:
        dice = self.dice
        kind = dice(0, 9)
        if kind == 0:
            return ()
        if kind >= 5 and self.past:
            start = self.past[-1 - dice(0, min(len(self.past) - 1, 4))]
            return start[: len(start) - max(dice(-6, 3), 0)]
        document = self.documents[dice(0, len(self.documents) - 1)]
        return document[: len(document) - max(dice(-8, len(document) // 2), 0)]

    def _params(self, prompt: int, *, score_only: bool) -> SamplingParams:
        dice = self.dice
        most = dice(1, 24)
        settings: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": most,
            "seed": dice(0, 1 << 40),
        }
        if self.plain:
            return SamplingParams(**settings, logprobs=2)
        kind = dice(0, 19)
        if kind >= 16:
            settings |= {"temperature": 0.9, "top_k": (4, 8)[dice(0, 1)]}
        if kind >= 18:
            settings |= {"top_p": 0.9, "min_p": 0.02}
        if kind == 19:
            settings |= {"top_k": 0}
        if dice(0, 9) == 9:
            settings |= {
                "presence_penalty": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.2,
            }  # fmt: skip
        if dice(0, 4) == 4:
            settings["stop_token_ids"] = (self._token(),)
        if dice(0, 4) == 4:
            settings["ignore_eos"] = True
        if dice(0, 6) == 6:
            settings["min_tokens"] = dice(0, most)
        if dice(0, 9) == 9:
            settings["logit_bias"] = {self._token(): 2.0, self._token(): -3.0}
        if dice(0, 19) == 19:
            settings |= {"max_tokens": None, "min_tokens": 0}
        if dice(0, 4) == 4:
            settings["logprobs"] = dice(0, 3)
        if dice(0, 11) == 11 and not score_only:
            settings["prompt_logprobs"] = dice(0, 2)
        return SamplingParams(**settings)

    def _token(self) -> int:
        return self.dice(0, self.vocab_size - 1)

    def _tokens(self, count: int) -> tuple[int, ...]:
        generator = random.Random(self.dice(0, 1 << 20))
        return tuple(generator.randrange(self.vocab_size) for _ in range(count))


class Session:
    """An engine under traffic, checked after every step.

    ``judge(request, tokens, events)`` is called with all that a request was given, when it ended.
    Without ``looks`` that is the only check.
    """

    def __init__(
        self,
        engine: Engine,
        judge: Callable[[Request, list[int], list[Event]], None],
        *,
        looks: bool = True,
    ) -> None:
        self.engine, self.judge, self.looks = engine, judge, looks
        self.live: dict[str, Request] = {}
        self.events: dict[str, list[Event]] = {}
        self.log: list[Event] = []
        self.finished = self.refused = self.reused = 0
        self._overtaken: Counter[str] = Counter()
        self._later: Counter[str] = Counter()
        self._cancelled: list[str] = []

    # -- what a user does ------------------------------------------------------------------------

    def add(self, request: Request) -> bool:
        """Pass on a request; whether it was accepted."""
        try:
            self.engine.add(request)
        except RequestError:
            assert not self._could_run(request), f"{request} was refused and would have fitted"
            self.refused += 1
            return False
        self.live[request.id] = request
        self.events[request.id] = []
        return True

    def _could_run(self, request: Request) -> bool:
        engine, prompt = self.engine, len(request.prompt_ids)
        room = engine.max_model_len - prompt
        if room < (0 if request.score_only else 1):
            return False
        wanted = request.params.max_tokens
        answer = 0 if request.score_only else room if wanted is None else min(wanted, room)
        # A page to copy a partly shared one from.
        pages = -(-(prompt + answer) // engine.scheduler.page_size) + 1
        return pages <= engine.pool.num_pages

    def cancel(self, request_id: str) -> None:
        """Cancel a request of any state, or of none."""
        self.engine.cancel(request_id)
        self._cancelled.append(request_id)

    def step(self) -> None:
        """One step of the engine, and every check."""
        scheduler = self.engine.scheduler
        cancelled, self._cancelled = self._cancelled, []
        waited = {s.request.id: (s.order, s.family) for s in scheduler.waiting}
        families = {s.family for s in scheduler.running} - {None}
        for event in self.engine.step():
            self._take(event)
        for name in cancelled:
            assert name not in self.live, f"S10: {name} was cancelled and did not end"
        self._check_order(waited, families)
        self.check()
        if self.looks and self.engine.steps % 10 == 0:
            self.check_snapshots()

    def drain(self, limit: int = 20_000) -> None:
        """Step until every request has ended."""
        for _ in range(limit):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.live, f"S1: {sorted(self.live)} never end"

    def idle(self) -> None:
        """A step of whatever is done between requests, and every check."""
        self.engine.idle_step()
        self.check()
        if self.looks:
            self.check_snapshots()

    def clear(self) -> None:
        """Empty the prefix cache."""
        self.engine.background.clear()
        self.engine.prefix.clear()
        self.check()

    def end(self) -> None:
        """Drain, clear, and see whether everything was given back."""
        self.drain()
        self.engine.background.clear()
        self.engine.prefix.clear()
        assert self.engine.pool.free == self.engine.pool.num_pages, "S8: pages are lost"
        runner: Any = self.engine.runner
        free = runner.slots_free if isinstance(runner, HashRunner) else runner.cache.slots_free
        assert free >= self.engine.scheduler.num_slots, "S8: slots are lost"
        assert len(self.engine.prefix._slots) == self.engine.prefix.num_slots, "S8: slots are lost"
        assert not self.engine.policy.by_request, "S8: the policy remembers requests that ended"

    # -- what must hold --------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        request = self.live.get(event.request_id)
        assert request is not None, f"S1: event of {event.request_id}, which has ended"
        events = self.events[request.id]
        events.append(event)
        self.log.append(event)
        usage = event.usage
        tokens = [token for one in events for token in one.token_ids]
        assert usage.prompt_tokens == len(request.prompt_ids)
        assert usage.completion_tokens == len(tokens), (usage, tokens)
        assert 0 <= usage.accepted_tokens <= usage.drafted_tokens
        assert usage.cached_tokens <= max(usage.prompt_tokens - 1, 0), f"S12: {usage}"
        runner = self.engine.runner
        if usage.cached_tokens and isinstance(runner, HashRunner):
            state = Chain(request.prompt_ids[: usage.cached_tokens]).states[-1]
            assert state in runner.computed, f"S12: {usage} of {request}, which nobody computed"
        if event.finish_reason is not None:
            self.judge(request, tokens, events)
            self.reused += usage.cached_tokens > 0
            self.finished += 1
            self._overtaken.pop(request.id, None)
            self._later.pop(request.id, None)
            del self.live[request.id], self.events[request.id]

    def _check_order(self, waited: dict[str, Any], families: set[Any]) -> None:
        """S6 and S13, counted from outside: who runs now, and after whom was it his turn.

        ``waited`` says who waited before the step, in which order, and with whom they share their
        prompt; ``families`` are those of which somebody ran. Who waits for them is not overtaken.
        """
        scheduler = self.engine.scheduler
        started = [s for s in scheduler.running if s.request.id in waited]
        families |= {waited[s.request.id][1] for s in started} - {None}
        for sequence in scheduler.waiting:
            name = sequence.request.id
            if name in waited and waited[name][1] in families:
                continue
            if name not in waited or sequence.slot is not None:
                self._overtaken[sequence.request.id] = self._later[sequence.request.id] = 0
                continue
            self._later[sequence.request.id] += sum(s.arrival > sequence.arrival for s in started)
            # Those admitted together are counted together, so the bound may be passed by a step's.
            most = MAX_OVERTAKINGS + MAX_BYPASS + scheduler.num_slots
            assert self._later[sequence.request.id] <= most, f"S13: {sequence.request.id} starves"
            own, _ = waited[sequence.request.id]
            later = sum(waited[s.request.id][0] > own for s in started)
            self._overtaken[sequence.request.id] += later
            times = self._overtaken[sequence.request.id]
            assert times <= MAX_BYPASS, f"S6: {sequence.request.id} was overtaken {times} times"
        for sequence in scheduler.running:
            self._overtaken[sequence.request.id] = self._later[sequence.request.id] = 0

    def check(self) -> None:
        """Everything that can be seen from the engine's books."""
        if not self.looks:
            return
        engine, scheduler = self.engine, self.engine.scheduler
        names = {s.request.id for s in (*scheduler.waiting, *scheduler.running)}
        assert names == set(self.live) == set(engine._sequences), "S1: requests are lost or kept"
        waiting = len(scheduler.waiting)
        told = scheduler.foresight.partings(()).get(0, 0)
        assert told == waiting, f"S1: {waiting} wait, the tree of the queue has {told}"
        self._check_memory()
        self._check_writes()
        for sequence in scheduler.waiting:
            assert sequence.slot is None, "S11"
            assert not sequence.pages, "S11"
            assert not sequence.drafts, "S11"
            assert sequence.done == 0, "S11"
        for sequence in holding(engine):
            self._check_lengths(sequence)

    def _check_memory(self) -> None:
        engine, pool = self.engine, self.engine.pool
        held: Counter[int] = Counter()
        for owner in (*holding(engine), *engine.prefix):
            assert len(set(owner.pages)) == len(owner.pages), f"S3: {owner} holds a page twice"
            held.update(owner.pages)
        counts = [pool.holders(page) for page in range(pool.num_pages)]
        assert counts == [held[page] for page in range(pool.num_pages)], "S2: holders of pages"
        assert pool.free + len(held) == pool.num_pages, "S2: free pages"
        slots = [s.slot for s in holding(engine)] + [s.slot for s in engine.prefix]
        slots += engine.prefix._slots
        assert len(set(slots)) == len(slots), "S2: a slot has two owners"
        assert len(holding(engine)) <= engine.scheduler.num_slots, "S3: slots"
        prefix = engine.prefix
        assert len(prefix) + len(prefix._slots) == prefix.num_slots, "S2: slots of snapshots"
        runner: Any = engine.runner
        free = runner.slots_free if isinstance(runner, HashRunner) else runner.cache.slots_free
        total = runner.num_slots if isinstance(runner, HashRunner) else runner.cache.num_slots
        assert free + len(slots) == total, "S2: free slots"
        assert all(not snapshot.pinned for snapshot in prefix), "S2: a pin was left"

    def check_snapshots(self) -> None:
        """The tree of prefixes, and every snapshot in it: what it holds is what its tokens give."""
        prefix, known = self.engine.prefix, 0
        starts: Counter[Any] = Counter()
        for sequence in self.engine.scheduler.waiting:
            starts[prefix.match(sequence.request.prompt_ids).snapshot] += 1
        found, stack = 0, [(prefix.root, ())]
        while stack:
            node, before = stack.pop()
            assert len(before) == node.start, node
            tokens = (*before, *node.tokens)
            known += len(node.tokens)
            for length, snapshot in node.snapshots.items():
                assert snapshot.node is node, snapshot
                assert snapshot.length == length, snapshot
                assert node.start < length <= node.end, snapshot
                waits = starts[snapshot]
                assert snapshot.awaited == waits, f"S12: {snapshot.awaited} awaited, {waits} wait"
                if isinstance(self.engine.runner, HashRunner):
                    self.engine.runner.check_snapshot(snapshot, tokens[:length])
                found += 1
            for first, child in node.children.items():
                assert child.parent is node, child
                assert child.tokens[0] == first, child
                stack.append((child, tokens))
        assert found == len(prefix), "a snapshot cannot be found"
        assert known == prefix._tree_tokens, (known, prefix._tree_tokens)

    def _check_writes(self) -> None:
        """S4: positions a sequence writes next lie in pages where nobody else sees them."""
        engine, size = self.engine, self.engine.scheduler.page_size
        seen: dict[int, list[tuple[Any, int]]] = {}
        for owner, length in (
            *((s, s.done) for s in holding(engine)),
            *((s, s.length) for s in engine.prefix),
        ):
            for number, page in enumerate(owner.pages):
                seen.setdefault(page, []).append((owner, length - number * size))
        for sequence in holding(engine):
            for number in range(sequence.done // size, len(sequence.pages)):
                first = max(sequence.done - number * size, 0)
                for owner, visible in seen[sequence.pages[number]]:
                    assert owner is sequence or visible <= first, f"S4: {sequence} writes {owner}"

    def _check_lengths(self, sequence: Running) -> None:
        engine, runner = self.engine, self.engine.runner
        assert sequence.slot is not None, "S11"
        known = len(sequence.request.prompt_ids) + len(sequence.output_ids)
        assert 0 <= sequence.done <= known - 1, f"S11: {sequence}"
        assert sequence.length == known, f"S11: {sequence}"
        assert len(sequence.output_ids) < max(sequence.max_tokens, 1), f"S11: {sequence}"
        length = (runner if isinstance(runner, HashRunner) else runner.cache).length
        at = length[sequence.slot] if isinstance(length, list) else length(sequence.slot)
        assert at == sequence.done, f"S11: {sequence}, {at} in the cache"
        limit = engine.policy.limit
        assert len(sequence.drafts) <= limit, f"S11: {sequence}"
        if limit and runner.keeps_rows:
            behind = sequence.done + 1 - sequence.mtp_len
            assert runner.backlog(sequence.slot) == behind, f"S11: {sequence}"
            assert 1 <= sequence.mtp_first <= sequence.mtp_len, f"S11: {sequence}"
        if sequence.drafts:
            assert known - sequence.done == 1, f"S11: drafts in the middle of a prompt, {sequence}"
            assert not sequence.request.score_only, f"S11: drafts for a text to score, {sequence}"
        assert sequence.counts == Counter(sequence.output_ids), f"S11: {sequence}"


def holding(engine: Engine) -> list[Running]:
    """Sequences that have a slot and pages."""
    prepared = engine.background.running
    assert prepared is None or not engine.has_work, "preparations must make way for requests"
    return [*engine.scheduler.running, *([prepared] if prepared else [])]


def drive(session: Session, traffic: Traffic, dice: Dice, *, steps: int) -> None:
    """Random arrivals, steps, cancellations, parking, clearing until so many steps were run."""
    engine, tried = session.engine, 0
    while engine.steps < steps:
        tried += 1
        assert tried < 20 * steps + 1000, "S1: the engine does not get on"
        if len(session.live) < 12:
            for _ in range(max(dice(-2, 2), 0)):
                act_add(session, traffic)
        if dice(0, 11) == 0:
            act_cancel(session, dice)
        if dice(0, 14) == 0:
            act_park(session, dice)
        if dice(0, 149) == 0:
            session.clear()
        if dice(0, 5) == 0:
            act_prepare(session, traffic)
        for _ in range(dice(1, 3)):
            session.step()
            session.idle()
    session.end()


def act_add(session: Session, traffic: Traffic) -> None:
    """New requests arrive."""
    for request in traffic.requests():
        session.add(request)


def act_cancel(session: Session, dice: Dice) -> None:
    """Somebody gives up: a request of any state, or one that is not there."""
    names: Sequence[str] = [*session.live, "nobody"]
    session.cancel(names[dice(0, len(names) - 1)])


def act_prepare(session: Session, traffic: Traffic) -> None:
    """Somebody says how a later prompt is likely to begin."""
    for request in traffic.requests()[:1]:
        traffic.past.append(request.prompt_ids)
        session.engine.background.add(request.prompt_ids)
        session.check()


def act_park(session: Session, dice: Dice) -> None:
    """Take a running sequence off, as if memory had run out."""
    running = session.engine.scheduler.running
    if running:
        session.engine.scheduler.park(running[dice(0, len(running) - 1)])
        session.check()
