"""Who runs in the next step, and with which memory.

One step has a budget of rows. Every sequence that decodes gets one; prompts share the rest, oldest
first, at least ``PREFILL_ROWS`` while one waits; drafts take what remains. Requests are admitted by
priority and arrival when a slot and the pages of their prompt are there. A request that later ones
overtake rises: after ``MAX_OVERTAKINGS`` of them it comes before every class, and keeps that place
until it ends, so no stream of urgent requests holds it up for ever. One whose prompt begins like
one that is being run waits until that has saved a state where they part. When pages run out, cached
prefixes go first, then the youngest sequence of the lowest class is *parked*: its state becomes a
snapshot, and it comes back like any prompt that finds one. The oldest of the highest class is never
parked, and a request that could not run alone is refused, so everything admitted ends.

No torch here: tensors are moved by the ``slots`` object (the runner).
"""

from collections.abc import Callable
from typing import Protocol

from qnext.engine.blocks import PagePool
from qnext.engine.explain import CacheLog, CacheReport, Found, Used, explain
from qnext.engine.foresight import (
    MAX_POINTS,
    MIN_SHARED,
    Foresight,
    common,
    deepest_common,
    points,
)
from qnext.engine.prefix import CLOSE_TOKENS, Match, PrefixCache, Snapshot
from qnext.engine.request import Request
from qnext.engine.sequence import Item, Origin, Sequence
from qnext.engine.tier import Fetched
from qnext.errors import RequestError

PREFILL_ROWS = 64
"""Rows of a step that drafts leave to a waiting prompt."""
SCORED_ROWS = 256
"""Rows of a step whose logits are all wanted: a row is a whole vocabulary."""
MAX_BYPASS = 8
"""How often a request that does not fit may be overtaken."""
MAX_SNAPSHOTS = 4
"""Snapshots a single prompt may plant."""
MIN_RUN_TOKENS = 64
"""Tokens a sequence gets after coming back before it may be parked again."""


class SlotOps(Protocol):
    """What the scheduler needs done to tensors."""

    def open(self) -> int: ...
    def resume(self, snapshot_slot: int) -> int: ...
    def close(self, slot: int) -> None: ...
    def copy_slot(self, source: int, target: int) -> None: ...
    def copy_page(self, source: int, target: int) -> None: ...


class Scheduler:
    """Queues, slots and pages of all requests; it owns no tensor.

    ``max_batch_tokens`` exceeds ``num_slots``, so that a prompt always makes progress beside the
    sequences that decode.
    """

    def __init__(
        self,
        *,
        slots: SlotOps,
        num_slots: int,
        pool: PagePool,
        prefix: PrefixCache,
        page_size: int,
        max_batch_tokens: int,
        max_model_len: int,
        max_drafts: int,
        max_chunk_tokens: int | None = None,
        interval: int = 0,
    ) -> None:
        if max_batch_tokens <= num_slots:
            raise RequestError(
                f"max_batch_tokens ({max_batch_tokens}) must be larger than max_num_seqs "
                f"({num_slots}): every running sequence needs one row per step and a waiting "
                "prompt needs room beside them."
            )
        self.slots, self.pool, self.prefix = slots, pool, prefix
        self.num_slots, self.page_size = num_slots, page_size
        self.max_model_len, self.max_batch_tokens = max_model_len, max_batch_tokens
        if max_chunk_tokens is not None and max_chunk_tokens < 1:
            raise RequestError(f"max_chunk_tokens: expected at least 1, found {max_chunk_tokens}.")
        self.max_chunk_tokens = max_chunk_tokens or max_batch_tokens
        self.max_drafts, self.interval = max_drafts, interval
        self.fetch: Callable[[list[int], Snapshot | None], Fetched] | None = None
        """Brings a snapshot of these tokens into the prefix cache, if the disk has a deeper one."""
        self.log = CacheLog()
        self.waiting: list[Sequence] = []
        self.foresight = Foresight()
        """The prompts of those who wait."""
        prefix.awaiting = self.foresight.sharing
        self.running: list[Sequence] = []
        self.parkings = 0
        self._arrivals = 0

    # -- requests --------------------------------------------------------------------------------

    def add(self, request: Request, seed: int) -> Sequence:
        """Queue a request; RequestError when it could never run."""
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise RequestError(
                "the prompt is empty: it must have at least one token. Give some text."
            )
        if prompt >= self.max_model_len and not request.score_only:
            raise RequestError(
                f"the prompt has {prompt} tokens and the context holds {self.max_model_len}, of "
                "which at least one must be left to answer. Shorten the prompt or raise "
                "max_model_len."
            )
        if prompt > self.max_model_len:
            raise RequestError(
                f"the text has {prompt} tokens and the context holds {self.max_model_len}. "
                "Shorten it or raise max_model_len."
            )
        room = self.max_model_len - prompt
        wanted = request.params.max_tokens
        most = room if wanted is None else min(wanted, room)
        if request.score_only:
            most = 0
        self._arrivals += 1
        sequence = Sequence(request=request, seed=seed, max_tokens=most, arrival=self._arrivals)
        # One page more than its tokens fill: the copy of a page it shares in part.
        need = self._pages(prompt + most) + 1
        if need > self.pool.num_pages:
            held = (self.pool.num_pages - 1) * self.page_size
            raise RequestError(
                f"prompt ({prompt} tokens) plus max_tokens ({most}) need {need} pages, the memory "
                f"budget holds {self.pool.num_pages} ({held} tokens for one request). Lower "
                "max_tokens or raise the memory budget."
            )
        self._queue(sequence)
        self._ask_ahead(sequence)
        return sequence

    def _queue(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.foresight.add(sequence.request.prompt_ids)
        self.prefix.expect(sequence.request.prompt_ids, 1)

    def _unqueue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.foresight.remove(sequence.request.prompt_ids)
        self.prefix.expect(sequence.request.prompt_ids, -1)

    def release(self, sequence: Sequence) -> None:
        """Take back everything a sequence holds, wherever it is."""
        if sequence.slot is None:
            self._unqueue(sequence)
        else:
            self.running.remove(sequence)
            self._drop(sequence)

    # -- work between requests -------------------------------------------------------------------

    def fits(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens could run, if it ran alone."""
        return tokens <= self.max_model_len and self._pages(tokens) + 1 <= self.pool.num_pages

    def admit_alone(self, sequence: Sequence) -> bool:
        """Give memory to a sequence that is in no queue, while nobody else has any; or False."""
        assert not self.waiting, "requests come first"
        assert not self.running, "requests come first"
        self._queue(sequence)
        if not self._try_admit(sequence, self.pool.free + self.prefix.evictable()):
            self._unqueue(sequence)
            return False
        self.running.remove(sequence)
        return True

    def plan_alone(self, sequence: Sequence, count: int) -> Item:
        """The next ``count`` tokens, or fewer, of a sequence that was admitted alone."""
        count = min(count, self.max_batch_tokens, self.max_chunk_tokens)
        captures = self._captures(sequence, sequence.done + count)
        return Item(sequence=sequence, count=count, captures=captures)

    def leave(self, sequence: Sequence) -> None:
        """Take back what ``admit_alone`` gave."""
        self._drop(sequence)
        sequence.done = 0

    # -- the step --------------------------------------------------------------------------------

    def plan(self) -> list[Item]:
        """Choose the next step; admits, parks and evicts as needed."""
        self._admit()
        self.running.sort(key=lambda s: s.order)
        self.fit_pages()
        budget = self.max_batch_tokens
        decoding = [s for s in self.running if s.length - s.done == 1]
        prefilling = [s for s in self.running if s.length - s.done > 1]
        budget -= len(decoding)
        reserve = min(PREFILL_ROWS, budget) if prefilling else 0
        items = []
        for sequence in decoding:
            # A prompt of one token, or the last token of a prompt, may plant a snapshot too; the
            # state in the middle of drafts is not settled, so then nothing is drafted. The same
            # holds where others are to go on from the end of its prompt.
            captures = self._captures(sequence, sequence.done + 1) if sequence.plants else ()
            settled = captures or self.twins(sequence)
            drafts = 0 if settled else min(len(sequence.drafts), budget - reserve)
            del sequence.drafts[max(drafts, 0) :]
            budget -= len(sequence.drafts)
            count = 1 + len(sequence.drafts)
            items.append(Item(sequence=sequence, count=count, captures=captures))
        scored, served = SCORED_ROWS, []
        for sequence in prefilling:
            sequence.drafts.clear()
            room = min(budget, scored) if sequence.scores_prompt else budget
            count = self._chunk(sequence, room)
            if count:
                served.append(sequence)
                budget -= count
                scored -= count if sequence.scores_prompt else 0
                end = sequence.done + count
                items.append(
                    Item(sequence=sequence, count=count, captures=self._captures(sequence, end))
                )
        self._age([s for s in prefilling if s not in served], served)
        for item in items:
            item.sequence.bypassed = 0
        return items

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Rows of a prompt in this step: on the page grid unless it ends the prompt."""
        # The last token of an answer is told of, never run.
        left = sequence.length - sequence.done - (sequence.ends is not None)
        budget = min(budget, self.max_chunk_tokens)
        if left <= budget:
            return left
        end = sequence.done + budget
        on_grid = end - end % self.page_size
        return on_grid - sequence.done if on_grid > sequence.done else budget

    def _captures(self, sequence: Sequence, end: int) -> tuple[tuple[int, str, int], ...]:
        """Snapshots to take before position ``end``; each gets its slot now."""
        taken = []
        for length, why in list(sequence.plants):
            if length > end:
                continue
            sequence.plants.remove((length, why))
            if length <= sequence.done or self.prefix.holds(sequence.tokens(0, length)):
                continue
            slot = self.prefix.take_slot()
            if slot is not None:
                taken.append((length, why, slot))
        return tuple(taken)

    # -- admission -------------------------------------------------------------------------------

    def _admit(self) -> None:
        self.waiting.sort(key=lambda s: s.order)
        blocked: list[Sequence] = []
        admitted: list[Sequence] = []
        reachable: int | None = None
        in_prompt = {s.family for s in self.running} - {None}
        for sequence in list(self.waiting):
            if sequence.family in in_prompt:
                continue  # it goes on from there when that prompt has run
            if len(self.running) >= self.num_slots:
                break
            if any(one.bypassed >= MAX_BYPASS for one in blocked):
                break
            if self._awaits_state(sequence):
                blocked.append(sequence)
                continue
            if reachable is None:
                reachable = self.pool.free + self.prefix.evictable()
            is_new = sequence.report is None
            if self._try_admit(sequence, reachable):
                if is_new and sequence.report is not None:
                    self.log.add(sequence.request.id, sequence.report)
                reachable = None
                admitted.append(sequence)
                if sequence.family is not None:
                    in_prompt.add(sequence.family)
                for one in blocked:
                    one.bypassed += 1
            else:
                blocked.append(sequence)
        self._age(self.waiting, admitted)

    def _age(self, left: list[Sequence], served: list[Sequence]) -> None:
        """Note who came earlier than somebody that was served, and got nothing."""
        for sequence in left:
            sequence.overtaken += sum(one.arrival > sequence.arrival for one in served)

    def _try_admit(self, sequence: Sequence, reachable: int) -> bool:
        """Let a request in if it fits; ``reachable`` pages are free or could be made so."""
        match, snapshot = self._match(sequence), None
        if not sequence.scores_prompt:
            if self.fetch is not None and sequence.fetched is None:
                ids = sequence.tokens(0, sequence.settled)
                sequence.fetched = self.fetch(ids, match.snapshot)
                match = self._match(sequence)
            snapshot = match.snapshot
        shared = snapshot.length // self.page_size if snapshot else 0
        need = self._pages(self._reach(sequence)) - shared
        wanted = need + len(self.running)  # a page more for everybody who runs
        if reachable < wanted:
            return False
        if snapshot is not None:
            snapshot.pinned += 1
        try:
            if self.pool.free < wanted and (
                self.pool.free + self.prefix.evictable() < wanted
                or not self.prefix.make_room(wanted)
            ):
                return False
            # What was learned since the last lookup changes no snapshot, but what is known.
            match = self.prefix.match(sequence.tokens(0, sequence.settled))
            if sequence.report is None:
                sequence.report = self._explain(sequence, match, snapshot)
            self._start(sequence, snapshot, need)
        finally:
            if snapshot is not None:
                snapshot.pinned -= 1
        if snapshot is not None:
            self.prefix.use(snapshot)
        sequence.plants = self._plants(sequence, match)
        if self._leaves_states(sequence):
            # Those who come while it runs are to see that their prompts begin alike.
            self.prefix.learn(sequence.request.prompt_ids)
        return True

    def _explain(self, sequence: Sequence, match: Match, snapshot: Snapshot | None) -> CacheReport:
        """What a request is given from the cache, and why not more."""
        fetched = sequence.fetched or Fetched()
        known, expected = match.known, match.expected
        if fetched.known > known:
            known, expected = fetched.known, None
        used, disabled = None, None
        if snapshot is not None:
            used = Used(
                at=snapshot.length, why=snapshot.why, age_s=self.prefix.age(snapshot.born),
                tier="disk" if snapshot is fetched.snapshot else "memory",
            )  # fmt: skip
        if not self.prefix.num_slots:
            disabled = "prefix_cache"
        elif sequence.scores_prompt:
            disabled = "prompt_logprobs"
        lost = match.lost
        return explain(
            sequence.request.prompt_ids,
            found=Found(
                known=known, expected=expected,
                lost=(lost[0], lost[1], self.prefix.age(lost[2])) if lost else None,
            ),
            used=used, disabled=disabled, disk_reason=fetched.reason,
            places=sequence.request.places,
        )  # fmt: skip

    def _match(self, sequence: Sequence) -> Match:
        """The lookup of a request; repeated only when something has changed since the last one."""
        version, length = self.prefix.version, sequence.settled
        if sequence.found is None or sequence.found[:2] != (version, length):
            match = self.prefix.match(sequence.tokens(0, length))
            sequence.found = (version, length, match)
        return sequence.found[2]

    def _start(self, sequence: Sequence, snapshot: Snapshot | Origin | None, need: int) -> None:
        """Give a sequence its slot and pages, from some state of its prefix or from nothing."""
        fresh = self.pool.take(need)
        if snapshot is None:
            sequence.slot = self.slots.open()
            sequence.pages = fresh
            sequence.done, sequence.mtp_len, sequence.mtp_first = 0, 1, 1
        else:
            full, part = divmod(snapshot.length, self.page_size)
            shared = snapshot.pages[:full]
            self.pool.share(shared)
            if part:
                # A page that is not full gets another owner's tokens: copied, never shared.
                self.slots.copy_page(snapshot.pages[full], fresh[0])
            sequence.slot = self.slots.resume(snapshot.slot)
            sequence.pages = [*shared, *fresh]
            sequence.done = sequence.mtp_len = snapshot.length
            sequence.mtp_first = snapshot.mtp_first
        sequence.ran, sequence.found = 0, None
        self._unqueue(sequence)
        self.running.append(sequence)

    # -- several answers to one prompt -----------------------------------------------------------

    def twins(self, sequence: Sequence) -> list[Sequence]:
        """Requests that wait for a sequence to run the prompt they share with it."""
        family = sequence.family
        return [] if family is None else [s for s in self.waiting if s.family == family]

    def fork(self, source: Sequence, sequence: Sequence) -> bool:
        """Start a waiting sequence where a running one is, if it is its turn and there is room.

        Full pages are shared, a page that is not full and the state are copied.
        """
        assert source.slot is not None
        if len(self.running) >= self.num_slots:
            return False
        if any(one.order < sequence.order for one in self.waiting):
            return False
        need = self._pages(self._reach(sequence)) - source.done // self.page_size
        if not self._have(need + len(self.running)):
            return False
        origin = Origin(
            length=source.done,
            slot=source.slot,
            pages=source.pages,
            mtp_first=source.mtp_first if source.mtp_len >= source.done else source.done,
        )
        self._start(sequence, origin, need)
        self._age(self.waiting, [sequence])
        return True

    # -- where states are saved --------------------------------------------------------------------

    def _plants(self, sequence: Sequence, match: Match) -> list[tuple[int, str]]:
        """Where this prompt should leave snapshots, the most useful first, in order of length."""
        prompt = len(sequence.request.prompt_ids)
        if not self._leaves_states(sequence):
            return []
        # Every request runs its last token: whoever asks the same again starts before it.
        last = prompt - 1
        wanted = [(min(n, last), why) for n, why in sequence.request.hints if 0 < n <= prompt]
        if not sequence.request.hints:
            wanted.append((last, "stable"))
        # One that was parked is known by what it ran itself.
        is_new = not (sequence.scores_prompt or sequence.parked)
        branch = min(match.known, last) if is_new else 0
        saved = branch - sequence.done
        if saved >= min(MIN_SHARED, CLOSE_TOKENS) and saved * match.ways >= CLOSE_TOKENS:
            wanted.append((branch, "branch"))
        chosen: dict[int, str] = {}
        for length, why in wanted:
            if length > sequence.done and len(chosen) < MAX_SNAPSHOTS:
                chosen.setdefault(length, why)
        partings = self.foresight.partings(sequence.request.prompt_ids)
        twins = len(self.twins(sequence))
        if twins:  # they go on from its end without a snapshot
            partings[last] -= twins
        planned = list(chosen)
        for length in points(partings, start=sequence.done, planned=planned, least=CLOSE_TOKENS):
            chosen.setdefault(length, "queue")
        if self.interval:
            for length in range(self.interval, prompt + 1, self.interval):
                if length > sequence.done:
                    chosen.setdefault(length, "interval")
        return sorted(chosen.items())

    def _ask_ahead(self, sequence: Sequence) -> None:
        """Have a prompt that is being run leave a snapshot where a new one parts from it."""
        ids, deepest, source = sequence.request.prompt_ids, 0, None
        for one in self.running:
            theirs = one.request.prompt_ids
            if one.done < len(theirs) and self._leaves_states(one):
                shared = min(common(theirs, ids, 0, len(ids)), len(ids) - 1)
                if shared > max(deepest, one.done):
                    deepest, source = shared, one
        if source is None or not self._starts_from_states(sequence):
            return
        if source.family is not None and source.family == sequence.family:
            return
        there = [length for length, _ in source.plants if length <= deepest]
        if deepest - max([self._start_of(sequence), *there]) < CLOSE_TOKENS:
            return
        if sum(why == "queue" for _, why in source.plants) < MAX_POINTS:
            source.plants = sorted([*source.plants, (deepest, "queue")])

    def _awaits_state(self, sequence: Sequence) -> bool:
        """Whether a state is about to be saved that would spare a request much of its prompt.

        Only of prompts that come before it anyway: so it never waits for whom it has overtaken.
        """
        due = 0
        if self._starts_from_states(sequence):
            for one in self.running:
                if one.plants and one.order < sequence.order:
                    lengths = [length for length, _ in one.plants if length > one.done]
                    ids = sequence.request.prompt_ids
                    due = max(due, deepest_common(ids, one.request.prompt_ids, lengths))
        return due >= CLOSE_TOKENS and due - self._start_of(sequence) >= CLOSE_TOKENS

    def _leaves_states(self, sequence: Sequence) -> bool:
        """Whether others can start from a prompt; nothing goes on from a text to score."""
        return bool(self.prefix.num_slots) and not sequence.request.score_only

    def _starts_from_states(self, sequence: Sequence) -> bool:
        """Whether a request can start from a state that another has left."""
        return bool(self.prefix.num_slots) and not sequence.scores_prompt

    def _start_of(self, sequence: Sequence) -> int:
        """Where it would start if it started now."""
        snapshot = self._match(sequence).snapshot
        return snapshot.length if snapshot else 0

    # -- memory ----------------------------------------------------------------------------------

    def fit_pages(self) -> None:
        """Make sure that every running sequence can write its next tokens."""
        for sequence in list(self.running):
            if sequence.slot is None:
                continue  # parked meanwhile
            need = self._pages(self._reach(sequence))
            missing = need - len(sequence.pages)
            while missing > 0 and not self._have(missing):
                victim = self._victim()
                self.park(victim)
                if victim is sequence:
                    break
            if sequence.slot is not None and missing > 0:
                sequence.pages.extend(self.pool.take(missing))

    def _reach(self, sequence: Sequence) -> int:
        """Positions that a step may write to: drafts, then the drafts that follow those."""
        last = len(sequence.request.prompt_ids) + sequence.max_tokens
        return min(sequence.length + 2 * self.max_drafts, last)

    def _have(self, pages: int) -> bool:
        if self.pool.free >= pages:
            return True
        # When evicting everything would not do, a sequence has to go first.
        enough = self.pool.free + self.prefix.evictable() >= pages
        return enough and self.prefix.make_room(pages)

    def _victim(self) -> Sequence:
        """The youngest of the lowest class, preferring those that have run a while."""
        candidates = sorted(self.running, key=lambda s: s.order)[1:]
        assert candidates, "a sequence that runs alone fits: add() has checked it"
        lowest = [s for s in candidates if s.rank == candidates[-1].rank]
        rested = [s for s in lowest if s.ran >= MIN_RUN_TOKENS]
        return (rested or lowest)[-1]

    def park(self, sequence: Sequence) -> None:
        """Take a running sequence off; its state becomes a snapshot if there is room for one."""
        ids = sequence.tokens(0, sequence.done)
        if sequence.done and not self.prefix.holds(ids):
            self.plant_here(sequence, "parked")
        self.running.remove(sequence)
        self._drop(sequence)
        sequence.drafts.clear()
        sequence.done = 0
        sequence.parked += 1
        self.parkings += 1
        self._queue(sequence)

    def leaves_end(self, sequence: Sequence) -> bool:
        """Whether somebody may want to go on from where a running sequence ends."""
        if sequence.slot is None or not self.prefix.num_slots or not sequence.output_ids:
            return False
        prompt = sequence.request.prompt_ids
        if sequence.done > len(prompt):
            return True
        # An answer of one token: if a state lies before the prompt's last, that one will do.
        before = self.prefix.at(prompt[:-1])
        return before is None or before.why != "stable"

    def plant_here(self, sequence: Sequence, why: str) -> None:
        """Take a snapshot of a running sequence where it is."""
        assert sequence.slot is not None
        ids = sequence.tokens(0, sequence.done)
        if not ids or self.prefix.holds(ids):
            return
        slot = self.prefix.take_slot()
        if slot is None:
            return
        self.slots.copy_slot(sequence.slot, slot)
        self.plant(sequence, sequence.done, why, slot)

    def plant(self, sequence: Sequence, length: int, why: str, slot: int) -> None:
        """Enter a state that was saved to ``slot`` into the prefix cache."""
        ids = sequence.tokens(0, length)
        if self.prefix.holds(ids):
            self.prefix.return_slot(slot)
            return
        complete = sequence.mtp_len >= length
        self.prefix.insert(
            ids,
            slot=slot,
            pages=sequence.pages[: self._pages(length)],
            # The MTP layer may have begun anew behind what is kept here.
            mtp_first=min(sequence.mtp_first, length) if complete else length,
            why=why,
        )

    def _drop(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.slots.close(sequence.slot)
        self.pool.give_back(sequence.pages)
        sequence.slot, sequence.pages, sequence.lane = None, [], None

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
