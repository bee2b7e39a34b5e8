"""Mistakes to plant in the engine: the covering arrays have to notice every one of them.

Each function patches one mistake in. The tables at the end say which settings of a row make it
matter.
"""

from dataclasses import replace

from qnext.engine import native_runner
from qnext.engine.engine import Engine
from qnext.engine.native_runner import NativeRunner
from qnext.engine.runner import Runner
from qnext.model.cache import HybridCache
from qnext.model.native import DeferredCache


def a_state_is_resumed_without_its_window(patch):
    copy = HybridCache.copy_slot

    def half(self, source, target):
        copy(self, source, target)
        self.conv[:, target] = 0.0

    patch.setattr(HybridCache, "copy_slot", half)


def rejected_drafts_stay_in_the_state(patch):
    keep = DeferredCache.keep

    def everything(self, counts=None):
        pieces = self._open_pieces
        keep(self, counts)
        for piece in pieces:
            if piece.speculative:
                self.kept[piece.slot] = piece.tokens

    advance = DeferredCache.advance

    def all_of_it(self, slot, count, pending):
        advance(self, slot, count, pending)
        if pending:
            self.kept[slot] = min(self.kept[slot] + 1, self.most_pending)

    patch.setattr(DeferredCache, "keep", everything)
    patch.setattr(DeferredCache, "advance", all_of_it)


def accepted_drafts_are_not_settled(patch):
    def forget(self, slot):
        self.kept[slot] = 0

    patch.setattr(DeferredCache, "settle", forget)


def the_last_accepted_token_is_not_applied(patch):
    keep = DeferredCache.keep

    def all_but_one(self, counts=None):
        keep(self, counts)
        self.kept[:] = [max(count - 1, 0) for count in self.kept]

    advance = DeferredCache.advance

    def less_one(self, slot, count, pending):
        advance(self, slot, count, pending)
        self.kept[slot] = max(self.kept[slot] - 1, 0)

    patch.setattr(DeferredCache, "keep", all_but_one)
    patch.setattr(DeferredCache, "advance", less_one)


def positions_start_over(patch):
    table = native_runner._table

    def again(works, starts, rest):
        works = [replace(work, start=work.start % 64) for work in works]
        return table(works, starts, rest)

    patch.setattr(native_runner, "_table", again)


def everybody_has_the_same_pending_row(patch):
    table = native_runner._table

    def first(works, starts, rest):
        return table(works, starts, [(*some, 0) for *some, _ in rest])

    patch.setattr(native_runner, "_table", first)
    pending_of = DeferredCache.pending_of

    def the_same(self, slot):
        pending_of(self, slot)
        return 0

    patch.setattr(DeferredCache, "pending_of", the_same)


def windows_of_accepted_drafts_are_lost(patch):
    begin = DeferredCache.begin

    def without(self, pieces):
        begin(self, pieces)
        self.pending_window.zero_()

    advance = DeferredCache.advance

    def lost(self, slot, count, pending):
        advance(self, slot, count, pending)
        self.pending_window.zero_()

    patch.setattr(DeferredCache, "begin", without)
    patch.setattr(DeferredCache, "advance", lost)


def rejected_drafts_stay_in_the_state_of_pytorch(patch):
    note = HybridCache._note

    def everything(self, view, live, kept):
        note(self, view, live, view.segments.lengths)

    patch.setattr(HybridCache, "_note", everything)


def a_shared_page_is_not_copied(patch):
    patch.setattr(Runner, "copy_page", lambda self, source, target: None)


def positions_of_a_chunk_start_over(patch):
    work = Engine._work

    def again(self, item):
        found = work(self, item)
        return replace(found, start=found.start % 64)

    patch.setattr(Engine, "_work", again)


def noise_goes_by_steps_instead_of_tokens(patch):
    row = Engine._row

    def by_steps(self, sequence, drafts):
        found = row(self, sequence, drafts)
        found.index = self.steps
        return found

    advance = NativeRunner.advance

    def lane_by_steps(self, running, lanes, **options):
        for sequence in running:
            sequence.seed += 1
            sequence.lane = None
        return advance(self, running, [self.lane_of(one) for one in running], **options)

    patch.setattr(Engine, "_row", by_steps)
    patch.setattr(NativeRunner, "advance", lane_by_steps)


def penalties_count_rejected_drafts(patch):
    row = Engine._row

    def counting(self, sequence, drafts):
        sequence.counts.update(drafts)
        return row(self, sequence, drafts)

    advance = NativeRunner.advance

    def told_drafts(self, running, lanes, **options):
        for sequence in running:
            sequence.lane = None
        lanes = [self.lane_of(sequence) for sequence in running]
        kept = [list(sequence.output_ids) for sequence in running]
        for sequence in running:
            newest = sequence.output_ids.pop()
            sequence.output_ids += [*sequence.drafts, newest]
        found = advance(self, running, lanes, **options)
        for sequence, before in zip(running, kept, strict=True):
            sequence.output_ids[:] = [
                *before, *sequence.output_ids[len(before) + len(sequence.drafts) :]
            ]  # fmt: skip
        return found

    patch.setattr(Engine, "_row", counting)
    patch.setattr(NativeRunner, "advance", told_drafts)


MISTAKES = {
    a_state_is_resumed_without_its_window: {"cache": ("exact", "partial", "branch")},
    a_shared_page_is_not_copied: {"cache": ("exact", "partial", "branch")},
    noise_goes_by_steps_instead_of_tokens: {"sampling": ("seeded", "penalised")},
    penalties_count_rejected_drafts: {"sampling": ("penalised",), "drafts": (2, 3, 4)},
}
OF_PYTORCH = {
    **MISTAKES,
    positions_of_a_chunk_start_over: {"chunk": (7, 64)},
    rejected_drafts_stay_in_the_state_of_pytorch: {"drafts": (3, 4), "rollback": ("snapshots",)},
}
OF_NATIVE = {
    **MISTAKES,
    rejected_drafts_stay_in_the_state: {"drafts": (3, 4)},
    accepted_drafts_are_not_settled: {"drafts": (1, 2, 3, 4), "park": ("often",)},
    the_last_accepted_token_is_not_applied: {"drafts": (1, 2, 3, 4)},
    positions_start_over: {"chunk": (7, 64)},
    everybody_has_the_same_pending_row: {"drafts": (1, 2, 3, 4), "batch": (3, 16)},
    windows_of_accepted_drafts_are_lost: {"drafts": (1, 2, 3, 4)},
}
