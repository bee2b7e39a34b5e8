"""NativeRunner: a Runner whose step is one call of the native decoder.

What the engine sees is the same; nothing is a tensor operation per layer any more, so what is left
in Python is a few arrays that describe the step.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qnext.engine.runner import MtpWork, Runner, Work, wants_routes
from qnext.model.native import DeferredCache, NativeModel, Piece

_NO_CAPTURES = np.zeros((0, 3), dtype=np.int64)


class NativeRunner(Runner):
    """One native model and one cache; ``track_mtp`` keeps what the MTP head needs.

    At most ``num_speculative`` sequences have drafts, ``max_drafts`` each.
    """

    proposes = True

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
        self._deferred = DeferredCache(
            model,
            num_slots=num_slots,
            num_pages=num_pages,
            num_pending=num_speculative,
            most_pending=max_drafts + 1 if num_speculative else 0,
        )
        self._set_up(self._deferred, track_mtp=track_mtp)

    def forward(self, works: Sequence[Work]) -> Tensor:
        self._own_backlog()
        cache = self._deferred
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
            invariant=self.native.invariant,
            **({} if routes is None else {"routes": routes}),
        )
        self.routes = None if routes is None else routes.swapaxes(0, 1)
        # Arrays, because handing tensors to the kernels costs several times as much.
        rows_PD = torch.from_numpy(hidden)
        cache.remember(rows_PD, captures)
        self._works, self._hidden = works, rows_PD
        return torch.from_numpy(logits)

    def propose(
        self, works: Sequence[MtpWork], counts: Sequence[int], *, defined_ids: int
    ) -> list[list[int]]:
        """What ``fill`` reads, then ``counts[b]`` greedy drafts for each, in one call.

        Drafts come from the part of the vocabulary that ``NativeModel.draft_head`` keeps.
        """
        head = self.native.draft_head(defined_ids)
        starts = _starts(works)
        sequences, pages = _table(works, starts, [(work.first, 0, False, 0) for work in works])
        most = max(counts, default=0)
        tokens = np.zeros((len(works), most), dtype=np.int32)
        hidden = self._take_backlog(works).float().contiguous().numpy()
        self._deferred.decoder.propose(
            ids=np.array([token for work in works for token in work.ids], dtype=np.int32),
            sequences=sequences,
            pages=pages,
            hidden_in=hidden,
            hidden=np.empty(hidden.shape, dtype=np.float32),
            counts=np.array(counts, dtype=np.int32),
            head=head.matrix,
            head_ids=head.ids,
            limit=head.limit,
            most=most,
            tokens=tokens,
            invariant=self.native.invariant,
        )
        return [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]

    def _mtp(self, works: Sequence[MtpWork], hidden: Tensor) -> Tensor:
        starts = _starts(works)
        sequences, pages = _table(works, starts, [(work.first, 0, False, 0) for work in works])
        out = torch.empty(starts[-1], self.native.config.hidden_size)
        logits = torch.empty(len(works), self.native.config.vocab_size)
        rows = np.array(starts[1:], dtype=np.int32) - 1
        self._deferred.decoder.forward_mtp(
            ids=np.array([token for work in works for token in work.ids], dtype=np.int32),
            sequences=sequences,
            pages=pages,
            captures=_NO_CAPTURES,
            hidden_in=hidden.float().contiguous(),
            hidden=out,
            logit_rows=rows,
            logits=logits,
            invariant=self.native.invariant,
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
