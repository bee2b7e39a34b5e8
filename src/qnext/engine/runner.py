"""Runner: executes what the engine decided, on the model and its cache.

The engine speaks of sequences, positions and pages; the runner turns one step into a packed batch,
runs it, and keeps the hidden rows that the multi-token-prediction head still has to read.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qnext.model.batch import TokenBatch
from qnext.model.cache import HybridCache, Rollback
from qnext.model.model import CausalLM, Taps
from qnext.model.view import Capture
from qnext.ops import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """New tokens of one sequence in a step."""

    slot: int
    pages: Sequence[int]
    start: int
    """Position of the first new token."""
    ids: Sequence[int]
    rows: Sequence[int] = ()
    """Which of the new tokens get logits."""
    speculative: bool = False
    """Whether some of the tokens may be dropped again."""
    captures: Sequence[tuple[int, int]] = ()
    """(count, slot): copy the state after ``count`` new tokens to that slot."""
    wants_routes: bool = False
    """Whether the step is to say which experts ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MtpWork:
    """Rows of the MTP layer for one sequence.

    Row for position j embeds token j and reads the hidden row of token j - 1. ``ids`` are the
    tokens from position ``start`` on.
    """

    slot: int
    pages: Sequence[int]
    start: int
    ids: Sequence[int]
    first: int
    """First position whose MTP keys and values exist."""


class Runner:
    """One model and one cache; ``track_mtp`` keeps what the MTP head needs, unless it ``doze``s."""

    def __init__(
        self,
        model: CausalLM,
        *,
        num_slots: int,
        num_pages: int,
        track_mtp: bool,
        rollback: Rollback = "snapshots",
    ) -> None:
        cache = HybridCache(
            model.config,
            num_slots=num_slots,
            num_pages=num_pages,
            dtype=model.dtype,
            device=model.device,
            ops=model.ops,
            rollback=rollback,
        )
        self.model = model
        self._set_up(cache, track_mtp=track_mtp)

    def alone(self) -> AbstractContextManager[None]:
        """What a step runs in: the native kernels keep the cores to themselves in it."""
        return nullcontext()

    def _set_up(self, cache: HybridCache, *, track_mtp: bool) -> None:
        self.cache = cache
        self.keeps_rows = track_mtp
        """Whether hidden rows are kept for the MTP layer to read."""
        self.routes: np.ndarray | None = None
        """Experts [P, L, X] of the last step, int32, if one of its works wanted them: for each
        sparse layer those that ran, the one with the largest weight first."""
        self._works: Sequence[Work] = ()
        self._hidden: Tensor | np.ndarray | None = None
        self._step_rows = 0
        # Hidden rows not yet read by the MTP layer, oldest first, and its own last output.
        self._backlog: dict[int, list[Tensor | np.ndarray]] = {}
        self._drafting: dict[int, Tensor] = {}

    # -- slots and pages -------------------------------------------------------------------------

    def open(self) -> int:
        """A slot for an empty sequence."""
        slot = self.cache.open()
        self._backlog[slot] = []
        return slot

    def resume(self, snapshot_slot: int) -> int:
        """A slot for a sequence that starts from a snapshot."""
        slot = self.cache.open()
        self.cache.copy_slot(snapshot_slot, slot)
        self._backlog[slot] = [self.cache.last_hidden[slot][None].clone()]
        return slot

    def close(self, slot: int) -> None:
        """Forget a sequence."""
        self.cache.close(slot)
        self._backlog.pop(slot, None)
        self._drafting.pop(slot, None)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the state of a sequence into a snapshot slot."""
        self.cache.copy_slot(source, target)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of keys and values."""
        self.cache.copy_page(source, target)

    def page_bytes(self, page: int) -> bytes:
        """Keys and values of one page as bytes."""
        return self.cache.page_bytes(page)

    def load_page(self, page: int, data: bytes) -> None:
        """Put the bytes of a page into one."""
        self.cache.load_page(page, data)

    def slot_bytes(self, slot: int) -> bytes:
        """The state in a snapshot slot as bytes."""
        return self.cache.slot_bytes(slot)

    def load_slot(self, slot: int, length: int, data: bytes) -> None:
        """Put the bytes of a state after ``length`` tokens into a snapshot slot."""
        self.cache.load_slot(slot, length, data)

    def backlog(self, slot: int) -> int:
        """Hidden rows the MTP layer has not read yet."""
        return sum(rows.shape[0] for rows in self._backlog[slot])

    def shorten_backlog(self, slot: int, count: int) -> None:
        """Keep only the last ``count`` hidden rows that the MTP layer has not read."""
        rows, left = self._backlog[slot], self.backlog(slot) - count
        while left > 0:
            size = rows[0].shape[0]
            if size > left:
                rows[0] = torch.as_tensor(rows[0][left:]).clone()
            else:
                del rows[0]
            left -= size

    def doze(self) -> None:
        """Keep no hidden rows from now on, and forget those that were not read."""
        self.keeps_rows = False
        for rows in self._backlog.values():
            rows.clear()

    def wake(self, slots: Sequence[int]) -> None:
        """Keep them again; of these sequences that of the last token, as behind a snapshot."""
        self.keeps_rows = True
        for slot in slots:
            self._backlog[slot] = [self.cache.last_hidden[slot][None].clone()]

    # -- the model -------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, works: Sequence[Work]) -> Tensor:
        """Run the new tokens of all works; logits [R, V] of their rows, in order."""
        self._own_backlog()
        device = self.model.device
        segments = Segments.of([len(work.ids) for work in works], device)
        starts = torch.tensor([work.start for work in works], device=device)
        batch = TokenBatch(
            ids=torch.tensor([token for work in works for token in work.ids], device=device),
            positions=segments.offsets() + starts[segments.ids()],
            segments=segments,
        )
        view = self.cache.view(
            [work.slot for work in works],
            self._table(works),
            segments,
            speculative=[work.speculative for work in works],
            captures=[
                Capture(b, count, slot)
                for b, work in enumerate(works)
                for count, slot in work.captures
            ],
            keeps_first=True,
        )
        self._works = works
        taps = Taps(want_router_logits=True) if wants_routes(works) else None
        self._hidden = hidden = self.model.run(batch, view, taps=taps)
        self.routes = None
        if taps is not None and taps.router_logits:
            most = self.model.config.num_experts_per_tok
            chosen = [logits_PE.topk(most, dim=-1).indices for logits_PE in taps.router_logits]
            self.routes = torch.stack(chosen, dim=1).to(torch.int32).cpu().numpy()
        rows = [
            first + row
            for first, work in zip(segments.starts, works, strict=False)
            for row in work.rows
        ]
        return self.model.lm_logits(hidden[rows])

    @torch.inference_mode()
    def keep(self, counts: Sequence[int]) -> None:
        """Make the first ``counts[b]`` tokens of each work permanent."""
        self._keep(counts)

    def _keep(self, counts: Sequence[int]) -> None:
        assert self._hidden is not None, "keep() without a forward"
        self.cache.keep(counts)
        start = 0
        for work, count in zip(self._works, counts, strict=True):
            if self.keeps_rows and count:
                self._backlog[work.slot].append(self._hidden[start : start + count])
            start += len(work.ids)
        self._hidden, self._step_rows = None, start

    def _own_backlog(self) -> None:
        """Copy out rows that the MTP layer left unread beside many of a prompt.

        They are views of all hidden rows of their step, which are to be freed.
        """
        if not self.keeps_rows or self._step_rows <= 4 * len(self._works):
            return
        for work in self._works:
            rows = self._backlog.get(work.slot)
            if rows:
                rows[-1] = torch.as_tensor(rows[-1]).clone()

    @torch.inference_mode()
    def fill(self, works: Sequence[MtpWork]) -> Tensor:
        """Let the MTP layer read the backlog; logits [B, V] for the token after the last of each.

        Every work's ids must be as many as its backlog.
        """
        return self._mtp(works, self._take_backlog(works))

    def _take_backlog(self, works: Sequence[MtpWork]) -> Tensor:
        """The hidden rows [P, D] that the works read, taken out of the backlog."""
        hidden: list[Tensor] = []
        for work in works:
            rows = self._backlog[work.slot]
            count = sum(part.shape[0] for part in rows)
            assert count == len(work.ids), (count, len(work.ids))
            hidden += [torch.as_tensor(part) for part in rows]
            self._backlog[work.slot] = []
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    @torch.inference_mode()
    def draft(self, works: Sequence[MtpWork]) -> Tensor:
        """One more draft token for each: reads the MTP layer's own last output. Logits [B, V]."""
        return self._mtp(works, torch.stack([self._drafting[work.slot] for work in works]))

    def _mtp(self, works: Sequence[MtpWork], hidden: Tensor) -> Tensor:
        device = self.model.device
        segments = Segments.of([len(work.ids) for work in works], device)
        starts = torch.tensor([work.start for work in works], device=device)
        ids = torch.tensor([token for work in works for token in work.ids], device=device)
        batch = TokenBatch(
            ids=ids, positions=segments.offsets() + starts[segments.ids()], segments=segments
        )
        view = self.cache.mtp_view(
            [work.slot for work in works],
            self._table(works),
            segments,
            starts=[work.start for work in works],
            firsts=[work.first for work in works],
        )
        out = self.model.run_mtp(batch, ids, hidden, view)[segments.last_rows()]
        for b, work in enumerate(works):
            self._drafting[work.slot] = out[b]
        return self.model.lm_logits(out)

    def _table(self, works: Sequence[Work] | Sequence[MtpWork]) -> Tensor:
        widest = max(len(work.pages) for work in works)
        return torch.tensor(
            [[*work.pages, *[0] * (widest - len(work.pages))] for work in works],
            device=self.model.device,
        )


def wants_routes(works: Sequence[Work]) -> bool:
    """Whether a step of these works is to say which experts ran."""
    return any(work.wants_routes for work in works)
