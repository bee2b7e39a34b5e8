"""A model made of hashes: what it says shows whether the engine kept its memory in order.

The recurrent state is a rolling hash of the tokens, the convolution window the last tokens, the
keys and values of a position a hash of (position, token, state before it), written into the page
that the sequence's page table names. The hidden row hashes everything a real model would read: all
visible keys and values, state and window. A row of the MTP layer hashes the hidden row before it
and its token. So any wrong page, slot, length, rollback or reuse changes what is said.

``Chain`` computes the same from the tokens alone, without pages or slots. Memory nobody has written
since it was last freed is poison: reading it fails.
"""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qnext.engine import scheduler
from qnext.engine.blocks import PagePool
from qnext.engine.engine import Engine, choice_seed
from qnext.engine.prefix import Snapshot
from qnext.engine.request import FinishReason, Request
from qnext.engine.runner import MtpWork, Work
from qnext.engine.sampler import SampleRow, sample
from qnext.engine.sizes import Settings
from qnext.engine.speculative import MAX_DRAFTS

WINDOW = 3
"""Tokens of the convolution window."""
TABLE_ROWS = 4096
NO_TOKENS = 7
"""State of an empty sequence."""
NO_HIDDEN = 0
"""Last hidden row of an empty sequence."""


def next_state(state: int, token: int) -> int:
    """The delta layers' state after one more token."""
    return hash((1, state, token))


def kv_entry(position: int, token: int, state: int) -> int:
    """Keys and values of a token; ``state`` is the one before it."""
    return hash((2, position, token, state))


def hidden_row(visible: Sequence[int], state: int, window: Sequence[int]) -> int:
    """The hidden row of a token from all keys and values up to it, its state and its window."""
    return hash((3, tuple(visible), state, tuple(window)))


def mtp_entry(position: int, hidden: int, token: int) -> int:
    """Keys and values of the MTP layer for a token; ``hidden`` is the row of the one before."""
    return hash((4, position, hidden, token))


class Head:
    """Logits of hidden rows: each picks one of many random rows of a table."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(TABLE_ROWS, vocab_size, generator=generator) * 1.5
        self.logprobs = self.table.log_softmax(-1).tolist()

    def logits(self, hidden: Sequence[int]) -> Tensor:
        """[R, V]."""
        return self.table[[self.row(h) for h in hidden]]

    @staticmethod
    def row(hidden: int) -> int:
        """Which row of the table."""
        return (hidden >> 17) % TABLE_ROWS


class Chain:
    """Everything the model computes for some tokens, grown token by token from nothing."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.states = [NO_TOKENS]
        """After so many tokens."""
        self.entries: list[int] = []
        self.hidden: list[int] = []
        self.mtp: list[int] = []
        """By position; the first one does not exist."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token."""
        position, before = len(self.tokens), self.states[-1]
        self.tokens.append(token)
        self.entries.append(kv_entry(position, token, before))
        self.states.append(next_state(before, token))
        row = hidden_row(self.entries, self.states[-1], self.tokens[-WINDOW:])
        self.mtp.append(mtp_entry(position, self.hidden[-1], token) if position else NO_HIDDEN)
        self.hidden.append(row)


class Answer:
    """What a request must be given: a function of its prompt and parameters alone."""

    def __init__(
        self, head: Head, request: Request, *, max_model_len: int, defined_ids: int
    ) -> None:
        self.head, self.request, self.defined_ids = head, request, defined_ids
        params = request.params
        assert params.seed is not None, "only seeded requests have one right answer"
        self.seed = choice_seed(params.seed, request.choice)
        room = max_model_len - len(request.prompt_ids)
        self.most = room if params.max_tokens is None else min(params.max_tokens, room)
        self.stops = params.stop_token_ids
        if not params.ignore_eos:
            self.stops = (*request.eos_ids, *self.stops)
        self.chain = Chain(request.prompt_ids)
        self.output: list[int] = []
        self.reason: FinishReason | None = "length" if request.score_only else None
        """Why it ends with what is known of it; None while there is more to come."""

    def grow(self, count: int) -> list[int]:
        """The first ``count`` tokens, or all if there are fewer."""
        while len(self.output) < count and self.reason is None:
            self._grow_one()
        return self.output[:count]

    def prompt_logprobs(self) -> list[float]:
        """Of the prompt's tokens from the second on."""
        prompt = self.request.prompt_ids
        rows = [self.head.row(hidden) for hidden in self.chain.hidden]
        return [self.head.logprobs[rows[t]][prompt[t + 1]] for t in range(len(prompt) - 1)]

    def logprob(self, index: int) -> float:
        """Of output token ``index`` under the unmodified logits."""
        row = self.head.row(self.chain.hidden[len(self.request.prompt_ids) + index - 1])
        return self.head.logprobs[row][self.output[index]]

    def _grow_one(self) -> None:
        params = self.request.params
        row = SampleRow(
            params=params,
            seed=self.seed,
            index=len(self.output),
            prompt_ids=self.request.prompt_ids,
            stop_ids=self.stops,
            bad_words=self.request.bad_ids,
            recent=self.output,
        )
        row.counts.update(self.output)
        logits = self.head.logits(self.chain.hidden[-1:])
        [token] = sample(logits, [row], defined_ids=self.defined_ids)
        self.output.append(token)
        self.chain.append(token)
        if token in self.stops:
            self.reason = "stop"
        elif len(self.output) == self.most:
            self.reason = "length"


class WipingPool(PagePool):
    """Pages become poison when they are free."""

    def __init__(self, num_pages: int, runner: "HashRunner") -> None:
        super().__init__(num_pages)
        self._runner = runner

    def give_back(self, pages: Any) -> None:
        pages = list(pages)
        super().give_back(pages)
        for page in pages:
            if self.holders(page) == 0:
                self._runner.wipe(page)


class HashRunner:
    """The interface of ``qnext.engine.runner.Runner`` over a model made of hashes.

    Drafts come from ``answers`` (by request id) and are right with probability ``rightness``.
    """

    def __init__(
        self,
        head: Head,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_logits: int,
        track_mtp: bool,
        rightness: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.looks = True
        """Whether the MTP layer's rows are compared with what they should be."""
        self.head, self.page_size = head, page_size
        self.max_rows, self.max_logits = max_rows, max_logits
        self.track_mtp = self.keeps_rows = track_mtp
        self.rightness = rightness
        self.generator = random.Random(seed)
        self.engine: Engine | None = None
        self.answers: dict[str, Answer] = {}
        self.kv: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.mtp: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self.state: list[int | None] = [None] * num_slots
        self.window: list[tuple[int, ...]] = [()] * num_slots
        self.last_hidden = [NO_HIDDEN] * num_slots
        self.length = [0] * num_slots
        self._backlog: dict[int, list[tuple[int, int]]] = {}
        self._drafting: dict[int, list[int]] = {}
        self._step: (
            tuple[list[Work], list[list[tuple[int, tuple[int, ...]]]], list[list[int]]] | None
        )
        self._step = None
        self.computed: set[int] = set()
        """States of all prefixes that were ever run and kept."""
        self.plans: list[tuple[Any, ...]] = []
        """Everything that was asked of this runner, in order."""

    # -- slots and pages -------------------------------------------------------------------------

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def slots_free(self) -> int:
        """Slots no sequence holds."""
        return len(self._free)

    def open(self) -> int:
        """A slot for an empty sequence."""
        assert self._free, "S3: no free slot"
        slot = self._free.pop()
        self.state[slot], self.window[slot] = NO_TOKENS, ()
        self.last_hidden[slot], self.length[slot] = NO_HIDDEN, 0
        self._backlog[slot] = []
        return slot

    def resume(self, snapshot_slot: int) -> int:
        """A slot for a sequence that starts from a snapshot."""
        slot = self.open()
        self.copy_slot(snapshot_slot, slot)
        self._backlog[slot] = [(self.length[slot] - 1, self.last_hidden[slot])]
        self.plans.append(("resume", snapshot_slot, slot, self.length[slot]))
        return slot

    def close(self, slot: int) -> None:
        """Forget a sequence."""
        assert slot not in self._free, slot
        assert self._step is None, "keep() of the previous step has not been called"
        self._free.append(slot)
        self.state[slot] = None
        self._backlog.pop(slot, None)
        self._drafting.pop(slot, None)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy state, window, last hidden row and length."""
        assert self._step is None, "keep() of the previous step has not been called"
        assert self.state[source] is not None, f"slot {source} is poison"
        self.state[target], self.window[target] = self.state[source], self.window[source]
        self.last_hidden[target], self.length[target] = (
            self.last_hidden[source], self.length[source],
        )  # fmt: skip

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of keys and values."""
        self.kv[target], self.mtp[target] = list(self.kv[source]), list(self.mtp[source])

    def wipe(self, page: int) -> None:
        """Poison a page."""
        self.kv[page], self.mtp[page] = [None] * self.page_size, [None] * self.page_size

    def backlog(self, slot: int) -> int:
        """Hidden rows the MTP layer has not read yet."""
        return len(self._backlog[slot])

    def shorten_backlog(self, slot: int, count: int) -> None:
        """Keep only the last ``count`` hidden rows that the MTP layer has not read."""
        assert 0 < count <= len(self._backlog[slot]), (slot, count)
        self._backlog[slot] = self._backlog[slot][-count:]

    def doze(self) -> None:
        """Keep no hidden rows from now on, and forget those that were not read."""
        assert self.keeps_rows, "asleep already"
        self.keeps_rows = False
        for rows in self._backlog.values():
            rows.clear()

    def wake(self, slots: Sequence[int]) -> None:
        """Keep them again; of these sequences that of the last token."""
        assert self.track_mtp, "nobody reads them"
        assert not self.keeps_rows, "awake already"
        self.keeps_rows = True
        for slot in slots:
            self._backlog[slot] = [(self.length[slot] - 1, self.last_hidden[slot])]

    # -- the model -------------------------------------------------------------------------------

    def forward(self, works: Sequence[Work]) -> Tensor:
        """Run the new tokens of all works; logits [R, V] of their rows, in order."""
        assert self._step is None, "keep() of the previous step has not been called"
        assert sum(len(work.ids) for work in works) <= self.max_rows, "S5: too many rows"
        assert len({work.slot for work in works}) == len(works), "one work per sequence"
        assert sum(len(work.rows) for work in works) <= self.max_logits, "S5: too many logits"
        self.plans.append(
            tuple(
                (work.slot, tuple(work.pages), work.start, tuple(work.ids), tuple(work.rows),
                 work.speculative, tuple(work.captures))
                for work in works
            )
        )  # fmt: skip
        # All sequences write before any of them reads, as the layers of a model do.
        paths = [self._write(work) for work in works]
        hidden = [self._read(work, path) for work, path in zip(works, paths, strict=True)]
        for work, path, rows in zip(works, paths, hidden, strict=True):
            for count, slot in work.captures:
                assert not work.speculative, "a state that may be undone cannot be captured"
                assert 0 < count <= len(work.ids), (count, len(work.ids))
                self.state[slot], self.window[slot] = path[count]
                self.last_hidden[slot], self.length[slot] = rows[count - 1], work.start + count
            if not work.speculative:
                self.state[work.slot], self.window[work.slot] = path[-1]
        self._step = (list(works), paths, hidden)
        wanted = [rows[i] for work, rows in zip(works, hidden, strict=True) for i in work.rows]
        return self.head.logits(wanted)

    def keep(self, counts: Sequence[int]) -> None:
        """Make the first ``counts[b]`` tokens of each work permanent."""
        assert self._step is not None, "keep() without a forward"
        (works, paths, hidden), self._step = self._step, None
        for work, path, rows, count in zip(works, paths, hidden, counts, strict=True):
            slot = work.slot
            assert 0 <= count <= len(work.ids), (count, len(work.ids))
            assert work.speculative or count == len(work.ids), "these tokens cannot be dropped"
            self.state[slot], self.window[slot] = path[count]
            self.length[slot] = work.start + count
            if count:
                self.last_hidden[slot] = rows[count - 1]
            self.computed.update(state for state, _ in path[1 : count + 1])
            if self.keeps_rows:
                self._backlog[slot] += [(work.start + i, rows[i]) for i in range(count)]

    def _write(self, work: Work) -> list[tuple[int, tuple[int, ...]]]:
        """Write keys and values; returns (state, window) before and after every token."""
        assert work.ids, work
        assert work.start == self.length[work.slot], (work, self.length[work.slot])
        state, window = self.state[work.slot], self.window[work.slot]
        assert state is not None, f"slot {work.slot} is poison"
        path = [(state, window)]
        for position, token in enumerate(work.ids, work.start):
            page, offset = divmod(position, self.page_size)
            self.kv[work.pages[page]][offset] = kv_entry(position, token, state)
            state, window = next_state(state, token), (*window, token)[-WINDOW:]
            path.append((state, window))
        return path

    def _read(self, work: Work, path: Sequence[tuple[int, tuple[int, ...]]]) -> list[int]:
        """Hidden rows of the new tokens."""
        visible = self._visible(self.kv, work.pages, 0, work.start + len(work.ids))
        return [
            hidden_row(visible[: work.start + i], *path[i]) for i in range(1, len(work.ids) + 1)
        ]

    def _visible(
        self, memory: list[list[int | None]], pages: Sequence[int], first: int, end: int
    ) -> list[int]:
        """Entries at positions first ... end - 1, none of them poison."""
        needed = -(-end // self.page_size)
        assert needed <= len(pages), f"position {end - 1} lies beyond {len(pages)} pages"
        found: list[Any] = []
        for page in pages[:needed]:
            found += memory[page]
        found = found[first:end]
        assert None not in found, f"position {first + found.index(None)} of {list(pages)} is poison"
        return found

    def check_snapshot(self, snapshot: Snapshot, tokens: Sequence[int]) -> None:
        """A snapshot holds what its tokens give: state, window, hidden row and entries."""
        chain, length, slot = Chain(tokens), len(tokens), snapshot.slot
        name = f"the snapshot at {length} ({snapshot.why})"
        assert self.state[slot] == chain.states[-1], f"wrong state in {name}"
        assert self.window[slot] == tuple(tokens[-WINDOW:]), f"wrong window in {name}"
        assert self.last_hidden[slot] == chain.hidden[-1], f"wrong hidden row in {name}"
        assert self.length[slot] == length, f"wrong length in {name}"
        assert self._visible(self.kv, snapshot.pages, 0, length) == chain.entries, name
        if self.track_mtp:
            first = snapshot.mtp_first
            assert 1 <= first <= length, name
            assert self._visible(self.mtp, snapshot.pages, first, length) == chain.mtp[first:]

    # -- the MTP layer ---------------------------------------------------------------------------

    def fill(self, works: Sequence[MtpWork]) -> Tensor:
        """Let the MTP layer read the backlog; logits [B, V] for the token after the last."""
        for work in works:
            rows, self._backlog[work.slot] = self._backlog[work.slot], []
            assert len(rows) == len(work.ids), (len(rows), work)
            for position, (token, (row, hidden)) in enumerate(
                zip(work.ids, rows, strict=True), work.start
            ):
                assert row == position - 1, f"MTP row {position} reads hidden row {row}"
                self._put(work, position, mtp_entry(position, hidden, token))
            end = work.start + len(work.ids)
            self._check_mtp(work, end)
            self._drafting[work.slot] = []
        return self._guess(works)

    def draft(self, works: Sequence[MtpWork]) -> Tensor:
        """One more draft token for each. Logits [B, V]."""
        for work in works:
            rows = self._drafting[work.slot]
            [token] = work.ids
            true = work.start - len(rows)
            self._check_mtp(work, true)
            assert self._visible(self.mtp, work.pages, true, work.start) == rows
            entry = mtp_entry(-work.start, rows[-1] if rows else NO_HIDDEN, token)
            rows.append(entry)
            self._put(work, work.start, entry)
        return self._guess(works)

    def _put(self, work: MtpWork, position: int, entry: int) -> None:
        page, offset = divmod(position, self.page_size)
        assert page < len(work.pages), f"MTP row {position} lies beyond {len(work.pages)} pages"
        self.mtp[work.pages[page]][offset] = entry

    def _check_mtp(self, work: MtpWork, end: int) -> None:
        """Rows the MTP layer sees before ``end`` are those of a fill from nothing."""
        if not self.looks:
            return
        assert 1 <= work.first <= end, work
        seen = self._visible(self.mtp, work.pages, work.first, end)
        chain = self._answer(work.slot).chain
        assert seen == chain.mtp[work.first : end], f"S11: wrong MTP rows, {work}"

    def _answer(self, slot: int) -> Answer:
        """What the request in a slot is given, grown as far as the engine knows it."""
        assert self.engine is not None
        for sequence in self.engine.scheduler.running:
            if sequence.slot == slot:
                answer = self.answers[sequence.request.id]
                answer.grow(len(sequence.output_ids))
                return answer
        prepared = self.engine.background.running
        if prepared is not None and prepared.slot == slot:
            return Answer(
                self.head, prepared.request, max_model_len=self.engine.max_model_len,
                defined_ids=self.engine.defined_ids,
            )  # fmt: skip
        raise AssertionError(f"slot {slot} belongs to nobody")

    def _guess(self, works: Sequence[MtpWork]) -> Tensor:
        """Logits that are sure of one token: often the right one."""
        guesses = []
        for work in works:
            answer = self._answer(work.slot)
            index = work.start + len(work.ids) - len(answer.request.prompt_ids)
            tokens = answer.grow(index + 1) if index >= 0 else []
            right = tokens[index] if 0 <= index < len(tokens) else 0
            wrong = (right + 1 + self.generator.randrange(self.head.vocab_size - 1)) % (
                self.head.vocab_size
            )
            guesses.append(right if self.generator.random() < self.rightness else wrong)
        logits = torch.full((len(works), self.head.vocab_size), -40.0)
        logits[torch.arange(len(works)), torch.tensor(guesses)] = 40.0
        return logits


def hash_engine(
    head: Head, settings: Settings, *, num_pages: int, rightness: float, seed: int, clock: Any
) -> Engine:
    """An engine over a ``HashRunner``."""
    runner = HashRunner(
        head,
        num_slots=settings.num_slots + settings.num_snapshots,
        num_pages=num_pages,
        page_size=settings.page_size,
        max_rows=settings.max_batch_tokens,
        max_logits=scheduler.SCORED_ROWS + settings.num_slots * (1 + MAX_DRAFTS),
        track_mtp=settings.speculative_tokens != 0,
        rightness=rightness,
        seed=seed,
    )
    runner.engine = Engine.around(runner, WipingPool(num_pages, runner), settings, clock=clock)
    return runner.engine
