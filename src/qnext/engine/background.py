"""Prompts that are likely to come, run before they do, while there is nothing else to do.

A chat template may show an answer differently in the next turn than it was written: without its
reasoning, its tool calls laid out anew. The state at the end of the answer is then of no use, and
that turn would have to run the answer again. Here it is run beforehand: a *preparation* is the
beginning of a prompt, and it ends in a snapshot.

It runs alone, a small chunk at a time. When a request comes it makes way at once: what it has got
to becomes a snapshot, which helps the request if it belongs to the same conversation, and its slot
and pages are free. No torch here.
"""

from collections.abc import Sequence as Ids
from dataclasses import asdict, dataclass

from qnext.engine.prefix import PrefixCache, Snapshot
from qnext.engine.request import Request, SamplingParams
from qnext.engine.scheduler import Scheduler
from qnext.engine.sequence import Item, Sequence

CHUNK_TOKENS = 64
"""Tokens run at a time: what a request may have to wait for."""
MAX_PENDING = 4
"""Preparations kept; the oldest is dropped for a new one."""
MIN_GAIN = 16
"""Fewer tokens than this are quicker run than kept."""


@dataclass(kw_only=True, slots=True)
class BackgroundCounts:
    """What became of preparations so far."""

    queued: int = 0
    finished: int = 0
    dropped: int = 0
    """Overtaken by a request, too many, or too long for the memory."""
    interrupted: int = 0
    """How often one made way for a request."""
    tokens: int = 0
    """Tokens run."""

    def as_dict(self) -> dict[str, int]:
        """Plain numbers for JSON."""
        return asdict(self)


@dataclass(eq=False, kw_only=True, slots=True)
class _Preparation:
    sequence: Sequence
    length: int
    """Tokens to run; the sequence knows one more, which is never run."""
    kept: Snapshot | None = None
    """Where it was interrupted last."""

    @property
    def ids(self) -> tuple[int, ...]:
        return self.sequence.request.prompt_ids[: self.length]


class Background:
    """The preparations of one engine. At most one of them holds memory, and only between requests.

    Its user runs the items of ``plan`` while no request is unfinished, and calls ``pause`` before
    it plans anything else.
    """

    def __init__(self, scheduler: Scheduler, prefix: PrefixCache) -> None:
        self._scheduler, self._prefix = scheduler, prefix
        self._pending: list[_Preparation] = []
        self.counts = BackgroundCounts()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def running(self) -> Sequence | None:
        """The sequence that holds a slot and pages, if any."""
        started = [one.sequence for one in self._pending if one.sequence.slot is not None]
        return started[0] if started else None

    def add(self, ids: Ids[int]) -> bool:
        """Queue the beginning ``ids[:-1]`` of a prompt; False if it is not worth running.

        The last id is whatever may follow: it is needed to know where the beginning ends, and is
        not part of what will be found.
        """
        length = len(ids) - 1
        if not self._prefix.num_slots or length < MIN_GAIN:
            return False
        best = self._prefix.match(ids).snapshot
        if best is not None and length - best.length < MIN_GAIN:
            return False
        self.counts.queued += 1
        if self._prefix.continues(ids[:length]) or not self._scheduler.fits(len(ids)):
            self.counts.dropped += 1
            return False
        self._drop_covered(ids)
        while len(self._pending) >= MAX_PENDING:
            self._drop(self._pending[0])
        request = Request(
            id="background",
            prompt_ids=tuple(ids),
            params=SamplingParams(temperature=0.0, seed=0),
            hints=((length, "stable"),),
        )
        sequence = Sequence(request=request, seed=0, max_tokens=0, arrival=0)
        self._pending.append(_Preparation(sequence=sequence, length=length))
        return True

    def plan(self) -> Item | None:
        """The next chunk, newest preparation first; None when there is nothing to run."""
        while self._pending:
            started = [one for one in self._pending if one.sequence.slot is not None]
            one = started[0] if started else self._pending[-1]
            if not started and not self._start(one):
                continue
            sequence = one.sequence
            return self._scheduler.plan_alone(
                sequence, min(CHUNK_TOKENS, one.length - sequence.done)
            )
        return None

    def ran(self, item: Item) -> None:
        """Note that a chunk was run and its snapshots planted."""
        self.counts.tokens += item.count
        one = next(one for one in self._pending if one.sequence is item.sequence)
        if one.sequence.done == one.length:
            self._finish(one)

    def pause(self) -> None:
        """Free all memory that is not the cache's; work done so far becomes a snapshot."""
        for one in self._pending:
            sequence = one.sequence
            if sequence.slot is None:
                continue
            ids = sequence.tokens(0, sequence.done)
            if sequence.ran and not self._prefix.holds(ids):
                self._scheduler.plant_here(sequence, "parked")
                self._forget_kept(one)
                one.kept = self._prefix.at(ids)
            self._scheduler.leave(sequence)
            self.counts.interrupted += 1

    def overtaken(self, prompt_ids: Ids[int]) -> None:
        """A request with this prompt has come: what it runs through needs no preparation."""
        self.pause()
        self._drop_covered(prompt_ids)

    def clear(self) -> None:
        """Drop everything."""
        self.pause()
        while self._pending:
            self._drop(self._pending[0])

    def _start(self, one: _Preparation) -> bool:
        if self._prefix.holds(one.ids):
            self._finish(one)
            return False
        if not self._scheduler.admit_alone(one.sequence):
            self._drop(one)
            return False
        return True

    def _finish(self, one: _Preparation) -> None:
        self._forget_kept(one)
        if one.sequence.slot is not None:
            self._scheduler.leave(one.sequence)
        self._pending.remove(one)
        self.counts.finished += 1

    def _drop_covered(self, ids: Ids[int]) -> None:
        """Drop what a prompt or a later preparation runs through anyway."""
        for one in list(self._pending):
            if tuple(ids[: one.length]) == one.ids:
                self._drop(one)

    def _drop(self, one: _Preparation) -> None:
        if one.sequence.slot is not None:
            self._scheduler.leave(one.sequence)
        self._pending.remove(one)
        self.counts.dropped += 1

    def _forget_kept(self, one: _Preparation) -> None:
        """A later snapshot of the same preparation makes an earlier one useless."""
        if one.kept is not None and one.kept in self._prefix and not one.kept.pinned:
            self._prefix.evict(one.kept)
        one.kept = None
