"""CacheView: what the layers read and write in one step, and in which rounds delta layers walk.

Delta layers may have to stop in the middle of a sequence's new tokens: after every token of a
speculative one, and where a state is to be captured. A *round* is a piece of some sequences that
is walked without a stop. Short sequences go token by token, long ones in chunks; the two never
share a round, so what a token gets does not depend on its company.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qnext.ops import Segments

if TYPE_CHECKING:
    from qnext.model.cache import HybridCache

STEP_TOKENS = 16
"""Sequences of at most so many new tokens are walked token by token, longer ones in chunks."""


class Capture(NamedTuple):
    """A wish: the state of a sequence after ``count`` of its new tokens, copied to ``slot``."""

    sequence: int
    count: int
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Pieces of some sequences, walked in one call of a delta op."""

    lanes: Tensor
    """[B'] int64: the sequences, by number in the batch."""
    rows: Tensor
    """[P'] int64: their tokens of this round, packed."""
    segments: Segments
    """Lengths of the pieces."""
    by_step: bool
    captured: tuple[tuple[int, int], ...]
    """(lane in this round, slot) of states to copy once the round is over."""
    speculative: bool
    """Whether the states after each of its tokens are wanted."""
    is_whole: bool = False
    """Whether it is all tokens of all sequences, in their order: nothing has to be gathered."""


def rounds_of(
    segments: Segments,
    speculative: Sequence[int],
    captures: Sequence[Capture],
    rollback: str,
) -> tuple[Round, ...]:
    """Cut a batch into rounds.

    Speculative sequences are one round; with "snapshots" its states after every token are noted.
    """
    rounds: list[Round] = []
    asked = {b: sorted(c for c in captures if c.sequence == b) for b in {c[0] for c in captures}}
    undecided = set(speculative)
    settled = [b for b, n in enumerate(segments.lengths) if n and b not in undecided]
    short = [b for b in settled if segments.lengths[b] <= STEP_TOKENS]
    long = [b for b in settled if segments.lengths[b] > STEP_TOKENS]
    for group, by_step in ((short, True), (long, False)):
        cuts = {b: _cuts(segments.lengths[b], asked.get(b, [])) for b in group}
        for number in range(max((len(cut) for cut in cuts.values()), default=0)):
            pieces = [(b, *cuts[b][number]) for b in group if number < len(cuts[b])]
            rounds.append(_round(segments, pieces, by_step=by_step, speculative=False))
    if speculative:
        pieces = [(b, 0, segments.lengths[b], ()) for b in speculative]
        rounds.append(_round(segments, pieces, by_step=True, speculative=rollback == "snapshots"))
    return tuple(rounds)


Slots = tuple[int, ...]


def _cuts(length: int, asked: Sequence[Capture]) -> list[tuple[int, int, Slots]]:
    """(start, end, slots to copy the state at end to) of the pieces of one sequence."""
    ends = sorted({length, *(capture.count for capture in asked)})
    assert not ends or 0 < ends[0] <= length == ends[-1], (length, asked)
    starts = [0, *ends[:-1]]
    return [
        (start, end, tuple(c.slot for c in asked if c.count == end))
        for start, end in zip(starts, ends, strict=True)
    ]


def _round(
    segments: Segments,
    pieces: Sequence[tuple[int, int, int, Slots]],
    *,
    by_step: bool,
    speculative: bool,
) -> Round:
    starts, device = segments.starts, segments.device
    captured = tuple((lane, slot) for lane, piece in enumerate(pieces) for slot in piece[3])
    if [piece[:3] for piece in pieces] == [(b, 0, n) for b, n in enumerate(segments.lengths)]:
        # Nothing is left out, so the batch's own tables serve.
        return Round(
            lanes=torch.arange(segments.count, device=device),
            rows=torch.arange(segments.total, device=device),
            segments=segments,
            by_step=by_step,
            captured=captured,
            speculative=speculative,
            is_whole=True,
        )
    rows = [torch.arange(starts[b] + start, starts[b] + end) for b, start, end, _ in pieces]
    return Round(
        lanes=torch.tensor([b for b, *_ in pieces], device=device),
        rows=torch.cat(rows).to(device),
        segments=Segments.of([end - start for _, start, end, _ in pieces], device),
        by_step=by_step,
        captured=captured,
        speculative=speculative,
    )


@dataclass(kw_only=True, slots=True)
class CacheView:
    """What the layers read and write in one step of some sequences."""

    cache: "HybridCache"
    slots: tuple[int, ...]
    page_table: Tensor
    """[B, max pages] int64."""
    before: tuple[int, ...]
    """Position of each sequence's first new token: the tokens it has in the cache."""
    segments: Segments
    slot_index: Tensor
    target_pages: Tensor
    target_offsets: Tensor
    first: tuple[int, ...] | None = None
    """First position each sequence can see; None for 0 everywhere."""
    speculative: tuple[int, ...] = ()
    """Sequences whose new tokens may be dropped again."""
    settled: tuple[int, ...] = ()
    """Sequences whose new tokens all stay."""
    captures: tuple[Capture, ...] = ()
    rounds: tuple[Round, ...] = ()
    held: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """By delta layer, of the new tokens of speculative sequences: convolution inputs, and for
    "replay" also k, v, g, beta."""
    held_rows: Tensor | None = None
    """[P'] int64: packed rows of the speculative sequences; None if there are no others."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """By delta layer: states [T, B', W, K, M] of the speculative sequences after each token."""
    hidden: Tensor | None = None
    keeps_first: bool = False
    """Whether at least one new token of every sequence will stay."""
    noted: dict[int, Tensor] = field(default_factory=dict)
    """By delta layer: states [T, B', W, K, M] that the sequences' own are among; or nothing."""
    noted_at: tuple[Tensor, ...] = ()
    """For each sequence, where its own is: T and B', int64 [B] each."""

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [P, G, H] of attention layer number ``layer``; return that layer's pages.

        Returned shape: [pages, 2, page size, G, H].
        """
        pages = self.cache.kv[:, layer]
        pages[self.target_pages, 0, self.target_offsets] = k.to(pages.dtype)
        pages[self.target_pages, 1, self.target_offsets] = v.to(pages.dtype)
        return pages

    def read_state(self, layer: int) -> tuple[Tensor, Tensor]:
        """Convolution window [B, J-1, ch] and state [B, W, K, M] of delta layer ``layer``."""
        conv = self.cache.conv[layer, self.slot_index]
        if self.noted_at:
            return conv, self.noted.pop(layer)[self.noted_at]
        return conv, self.cache.recurrent[layer, self.slot_index]

    def write_state(
        self, layer: int, conv: Tensor, recurrent: Tensor, inputs: tuple[Tensor, ...]
    ) -> None:
        """Store the state after this step of the sequences that keep all their tokens.

        ``inputs`` are the convolution inputs [P, ch] and k, v, g, beta of the delta rule; they are
        held until ``keep`` says how many tokens of the others stay.
        """
        for capture in self.captures:
            self._capture_window(layer, inputs[0], capture)
        if self.speculative:
            # Nothing of the other sequences is needed: their chunks may be long.
            held = inputs if self.cache.rollback == "replay" else inputs[:1]
            rows = self.held_rows
            self.held[layer] = held if rows is None else tuple(x[rows] for x in held)
        if not self.speculative:
            self.cache.conv[layer, self.slot_index] = conv.to(self.cache.conv.dtype)
            self.cache.recurrent[layer, self.slot_index] = recurrent
        elif self.settled:
            settled = list(self.settled)
            slots = self.slot_index[settled]
            self.cache.conv[layer, slots] = conv[settled].to(self.cache.conv.dtype)
            self.cache.recurrent[layer, slots] = recurrent[settled]

    def end_round(self, layer: int, done: Round, state: Tensor) -> None:
        """Copy the states [B', W, K, M] after a round that were asked for."""
        for lane, slot in done.captured:
            self.cache.recurrent[layer, slot] = state[lane]

    def remember(self, hidden: Tensor) -> None:
        """Note the final hidden rows [P, D] of this step; ``keep`` stores the last kept one."""
        self.hidden = hidden
        starts = self.segments.starts
        for capture in self.captures:
            row = starts[capture.sequence] + capture.count - 1
            self.cache.last_hidden[capture.slot] = hidden[row].to(self.cache.last_hidden.dtype)
            length = self.before[capture.sequence] + capture.count
            self.cache._lengths[capture.slot] = length

    def rows_of(self, sequences: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Rows of ``held`` of the first ``counts[b]`` new tokens of some speculative sequences."""
        starts, at = {}, 0
        for b in self.speculative:
            starts[b] = at
            at += self.segments.lengths[b]
        rows = [row for b in sequences for row in range(starts[b], starts[b] + counts[b])]
        return torch.tensor(rows, device=self.segments.device)

    def _capture_window(self, layer: int, x: Tensor, capture: Capture) -> None:
        """The last inputs before a captured state; called before the old window is written over."""
        windows = self.cache.conv[layer]
        start = self.segments.starts[capture.sequence]
        old, new = windows[self.slots[capture.sequence]], x[start : start + capture.count]
        windows[capture.slot] = torch.cat((old, new.to(old.dtype)))[-old.shape[0] :]
