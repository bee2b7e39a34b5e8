"""NativeRunner: a Runner whose step is one call of the native decoder.

What the engine sees is the same; nothing is a tensor operation per layer any more, so what is left
in Python is a few arrays that describe the step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qnext.engine.native_sampler import chooser_of
from qnext.engine.runner import MtpWork, Runner, Work, wants_routes
from qnext.engine.sequence import Sequence as Running
from qnext.engine.telling import stop_ids
from qnext.model.native import DeferredCache, NativeModel, Piece

_NO_CAPTURES = np.zeros((0, 3), dtype=np.int64)
LONGEST_RUN = 32
"""Steps whose hidden rows are kept together before they are told apart by sequence."""
WITHIN_S = 0.02
"""Seconds in which steps may follow each other without a look of Python's. A request that came or
was cancelled in between waits no longer, and tokens are told of at most so late."""


class _Run:
    """Rows [T, D] of one sequence among those of some steps [B, D] each."""

    __slots__ = ("place", "steps")

    def __init__(self, steps: list[np.ndarray], place: int) -> None:
        self.steps, self.place = steps, place

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.steps), self.steps[0].shape[1])


class NativeRunner(Runner):
    """One native model and one cache; ``track_mtp`` keeps what the MTP head needs, unless it
    ``doze``s.

    At most ``num_speculative`` sequences have drafts, ``max_drafts`` each.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        num_slots: int,
        num_pages: int,
        track_mtp: bool,
        num_speculative: int = 0,
        max_drafts: int = 0,
    ) -> None:
        self.native = model
        self.deferred = DeferredCache(
            model,
            num_slots=num_slots,
            num_pages=num_pages,
            num_pending=num_speculative,
            most_pending=max_drafts + 1 if num_speculative else 0,
        )
        self._set_up(self.deferred, track_mtp=track_mtp)
        self.seconds: tuple[float, ...] = (0.0, 0.0, 0.0)
        """Of the last ``advance``: its forwards, choosing tokens, drafting."""
        self.rounds = 0
        """Steps that the last ``advance`` ran."""
        self.logits: np.ndarray | None = None
        """Of the last ``advance``, if it was asked for them; float32 [R, V]."""
        # Hidden rows [B, D] of the last steps, each of one token of these slots. Most are dropped
        # unread, so they are told apart when they are read.
        self._backlog: dict[int, list[Any]]
        self._unread = np.empty((0, model.config.hidden_size), dtype=np.float32)
        self._run_slots: list[int] = []
        self._run_rows: list[np.ndarray] = []

    # -- sequences that decode -------------------------------------------------------------------

    def is_behind(self, running: Sequence[Running]) -> bool:
        """Whether the MTP layer has rows of any of them to read."""
        if self._run_rows:
            self._end_run()
        backlog = self._backlog
        # Asked in every step with drafts: a loop, which costs less there than a generator.
        for s in running:  # noqa: SIM110
            if s.slot is not None and backlog[s.slot]:
                return True
        return False

    def open(self) -> int:
        self._end_run()
        return super().open()

    def resume(self, snapshot_slot: int) -> int:
        self._end_run()
        return super().resume(snapshot_slot)

    def close(self, slot: int) -> None:
        self._end_run()
        super().close(slot)

    def backlog(self, slot: int) -> int:
        self._end_run()
        return super().backlog(slot)

    def shorten_backlog(self, slot: int, count: int) -> None:
        self._end_run()
        self._pick_rows(slot)
        super().shorten_backlog(slot, count)

    def doze(self) -> None:
        self._run_slots, self._run_rows = [], []
        super().doze()

    def keep(self, counts: Sequence[int]) -> None:
        self._end_run()
        self._keep(counts)  # no tensor is made here: the cache's own are written

    def _take_backlog(self, works: Sequence[MtpWork]) -> Tensor:
        self._end_run()
        for work in works:
            self._pick_rows(work.slot)
        return super()._take_backlog(works)

    def _end_run(self) -> None:
        """Give every sequence the rows of the last steps that are its own, not yet picked out."""
        if self._run_rows:
            for b, slot in enumerate(self._run_slots):
                self._backlog[slot].append(_Run(self._run_rows, b))
            self._run_slots, self._run_rows = [], []

    def _pick_rows(self, slot: int) -> None:
        parts = self._backlog[slot]
        for i, part in enumerate(parts):
            if isinstance(part, _Run):
                parts[i] = np.stack([rows_BD[part.place] for rows_BD in part.steps])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """PyTorch works in one thread meanwhile.

        Its other threads spin for milliseconds after each piece of work, on the cores that the
        kernels' threads need: the maximum of [3, 32768] logits between two steps halves the speed.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def lane_of(self, sequence: Running) -> Any:
        """What ``advance`` knows of a sequence for as long as it keeps its slot."""
        lane = sequence.lane
        if lane is None:
            request, slot = sequence.request, sequence.slot
            assert slot is not None
            chooser = chooser_of(
                request.params, seed=sequence.seed, prompt_ids=request.prompt_ids,
                stop_ids=stop_ids(request), bad_words=request.bad_ids,
            )  # fmt: skip
            lane = sequence.lane = self.native.module.Lane(
                chooser=chooser, slot=slot, first=sequence.mtp_first,
                pending=self.deferred.pending_of(slot), max_tokens=sequence.max_tokens,
                pages=sequence.pages,
            )  # fmt: skip
            sequence.lane_pages = len(sequence.pages)
        elif sequence.lane_pages != len(sequence.pages):
            lane.set_pages(sequence.pages)
            sequence.lane_pages = len(sequence.pages)
        return lane

    def advance(
        self,
        running: Sequence[Running],
        lanes: Sequence[Any],
        *,
        wanted: int,
        defined_ids: int,
        tie_bound: float,
        least_share: float,
        want_logits: bool,
        rounds: int = 1,
        masks: Sequence[np.ndarray | None] | None = None,
    ) -> tuple[list[Any], Tensor | None]:
        """``forward``, the choice of tokens, ``keep``, and with ``wanted`` up to so many drafts.

        As many times as ``rounds`` in a row, within ``WITHIN_S``, as long as no sequence ends, if
        nobody wants hidden rows or logits. ``masks`` are those of sequences without drafts, int32
        words as in ``SampleRow.mask``, for one round. Adds the tokens to ``output_ids``. Returns
        for each sequence (tokens, drafts of each step as (all, tried, accepted), places of
        near-ties, reason to end, drafts, whether the MTP layer has read the last step's tokens, how
        many those are, how many of them are not in the state yet), and on demand the logits of all
        rows.
        """
        self._own_backlog()
        self._step_rows = 0
        cache, config = self.deferred, self.native.config
        slots, starts, kept = [], [], []
        outputs, drafts = [], []
        rows = len(running)
        for s in running:
            slot = s.slot
            assert slot is not None
            slots.append(slot)
            starts.append(s.done)
            kept.append(cache.kept[slot])
            outputs.append(s.output_ids)
            drafts.append(s.drafts)
            rows += len(s.drafts)
        if want_logits or (self.keeps_rows and not wanted):
            rounds = 1
        hidden, room = self._unread, max(rows, len(running) * (1 + wanted))
        if self.keeps_rows or room > len(hidden):
            # Kept for the MTP layer, or room for the steps to come.
            hidden = self._unread = np.empty((room, config.hidden_size), dtype=np.float32)
        logits = np.empty((rows, config.vocab_size), dtype=np.float32) if want_logits else None
        found, *seconds = self.native.module.advance(
            cache.decoder,
            self.native.drafting(defined_ids),
            lanes,
            outputs,
            starts,
            kept,
            drafts,
            masks,
            wanted,
            hidden,
            logits,
            defined_ids,
            tie_bound,
            least_share,
            rounds,
            WITHIN_S,
        )
        self.seconds, self.logits = tuple(seconds), logits
        self.rounds = len(found[0][1])
        row, is_plain = 0, rows == len(running) and not wanted
        if is_plain and self.keeps_rows:
            if slots != self._run_slots or len(self._run_rows) >= LONGEST_RUN:
                self._end_run()
                self._run_slots = slots
            self._run_rows.append(hidden)
        for s, slot, (tokens, verified, *_, has_read, last, pending) in zip(
            running, slots, found, strict=True
        ):
            count = len(tokens)
            s.output_ids += tokens
            cache.advance(slot, count, pending)
            if has_read:
                s.mtp_len = s.done + count + 1
            elif self.keeps_rows and not is_plain:
                self._end_run()
                self._backlog[slot].append(hidden[row : row + last])
                if last < count:  # the steps before the last were read
                    s.mtp_len = s.done + count - last + 1
            row += 1 + verified[-1][0]
        return found, None if logits is None else torch.from_numpy(logits)

    # -- any step --------------------------------------------------------------------------------

    def forward(self, works: Sequence[Work]) -> Tensor:
        self._own_backlog()
        cache = self.deferred
        starts = _starts(works)
        cache.begin(
            [Piece(work.slot, len(work.ids), work.start, work.speculative) for work in works]
        )
        sequences, pages = _table(
            works,
            starts,
            [
                (0, cache.kept[work.slot], work.speculative, cache.pending_row.get(work.slot, 0))
                for work in works
            ],
        )
        captures = [
            (b, count, slot) for b, work in enumerate(works) for count, slot in work.captures
        ]
        rows = [starts[b] + row for b, work in enumerate(works) for row in work.rows]
        hidden = np.empty((starts[-1], self.native.config.hidden_size), dtype=np.float32)
        logits = np.empty((len(rows), self.native.config.vocab_size), dtype=np.float32)
        config = self.native.config
        sparse = sum(map(config.is_sparse, range(config.num_hidden_layers)))
        routes = None
        if sparse and wants_routes(works):
            routes = np.empty((sparse, starts[-1], config.num_experts_per_tok), dtype=np.int32)
        cache.decoder.forward(
            ids=np.array([token for work in works for token in work.ids], dtype=np.int32),
            sequences=sequences,
            pages=pages,
            captures=np.array(captures, dtype=np.int64) if captures else _NO_CAPTURES,
            hidden=hidden,
            logit_rows=np.array(rows, dtype=np.int32),
            logits=logits,
            **({} if routes is None else {"routes": routes}),
        )
        self.routes = None if routes is None else routes.swapaxes(0, 1)
        # Arrays, because handing tensors to the kernels costs several times as much.
        cache.remember(torch.from_numpy(hidden), captures)
        self._works, self._hidden = works, hidden
        return torch.from_numpy(logits)

    def propose(
        self,
        works: Sequence[MtpWork],
        counts: Sequence[int],
        sequences: Sequence[Running],
        *,
        defined_ids: int,
        least_share: float,
    ) -> list[list[int]]:
        """What ``fill`` reads, then up to ``counts[b]`` drafts for each, in one call.

        Drafts come from the part of the vocabulary that ``NativeModel.draft_head`` keeps, and are
        chosen as the tokens of their requests are.
        """
        table, pages = _table(works, _starts(works), [(work.first, 0, False, 0) for work in works])
        return self.native.module.propose(
            self.deferred.decoder,
            self.native.drafting(defined_ids),
            [self.lane_of(sequence) for sequence in sequences],
            [sequence.output_ids for sequence in sequences],
            np.array([token for work in works for token in work.ids], dtype=np.int32),
            table,
            pages,
            self._take_backlog(works).float().contiguous().numpy(),
            list(counts),
            least_share,
        )

    def _mtp(self, works: Sequence[MtpWork], hidden: Tensor) -> Tensor:
        starts = _starts(works)
        sequences, pages = _table(works, starts, [(work.first, 0, False, 0) for work in works])
        out = torch.empty(starts[-1], self.native.config.hidden_size)
        logits = torch.empty(len(works), self.native.config.vocab_size)
        rows = np.array(starts[1:], dtype=np.int32) - 1
        self.deferred.decoder.forward_mtp(
            ids=np.array([token for work in works for token in work.ids], dtype=np.int32),
            sequences=sequences,
            pages=pages,
            captures=_NO_CAPTURES,
            hidden_in=hidden.float().contiguous(),
            hidden=out,
            logit_rows=rows,
            logits=logits,
        )
        for work, row in zip(works, rows, strict=True):
            self._drafting[work.slot] = out[row]
        return logits


def _starts(works: Sequence[Work] | Sequence[MtpWork]) -> list[int]:
    starts = [0]
    for work in works:
        starts.append(starts[-1] + len(work.ids))
    return starts


def _table(
    works: Sequence[Work] | Sequence[MtpWork],
    starts: Sequence[int],
    rest: Sequence[tuple[int, int, bool, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """[B, 9], columns as in bind_decoder.cpp; and the pages of all sequences."""
    rows, pages = [], []
    for b, (work, (first, kept, speculative, pending)) in enumerate(zip(works, rest, strict=True)):
        rows.append(
            (starts[b], len(work.ids), work.start, first, work.slot, kept, speculative, pending,
             len(pages))
        )  # fmt: skip
        pages.extend(work.pages)
    return np.array(rows, dtype=np.int64), np.array(pages or [0], dtype=np.int64)
