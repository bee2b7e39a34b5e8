"""A model, a cache, and some sequences in it: what an engine does, with nothing around it."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qnext.model.batch import TokenBatch
from qnext.model.cache import HybridCache, Rollback
from qnext.model.model import CausalLM
from qnext.model.view import CacheView, Capture


class Stepper:
    """Feeds pieces of sequences through a cache whose free pages hold NaN.

    Pages are handed out in random order, so that neither neighbours nor ascending numbers can be
    relied on by chance; a few belong to nobody.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        sequences: int = 1,
        capacity: int = 256,
        page_size: int = 16,
        seed: int = 0,
        rollback: Rollback = "snapshots",
    ) -> None:
        self.model = model
        pages_each = -(-capacity // page_size)
        self.cache = HybridCache(
            model.config,
            num_slots=sequences + 2,
            num_pages=sequences * pages_each + 3,
            page_size=page_size,
            dtype=model.dtype,
            ops=model.ops,
            rollback=rollback,
        )
        self.cache.kv.fill_(float("nan"))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.cache.num_pages, generator=generator)
        self.page_table = order[: sequences * pages_each].view(sequences, pages_each)
        self.slots = [self.cache.open() for _ in range(sequences)]
        self.hidden: Tensor | None = None

    @torch.inference_mode()
    def step(
        self,
        pieces: Mapping[int, Tensor],
        *,
        keep: Sequence[int] | None = None,
        speculative: bool | Sequence[bool] = False,
        captures: Sequence[Capture] = (),
        keeps_first: bool = False,
    ) -> list[Tensor]:
        """Run the next tokens [T] of some sequences together; logits [T, V] of each piece."""
        batch, view = self.prepare(
            pieces, speculative=speculative, captures=captures, keeps_first=keeps_first
        )
        self.hidden = self.model.run(batch, view)
        self.cache.keep(keep)
        logits = self.model.lm_logits(self.hidden)
        return list(logits.split(batch.segments.lengths))

    def prepare(
        self,
        pieces: Mapping[int, Tensor],
        *,
        speculative: bool | Sequence[bool] = False,
        captures: Sequence[Capture] = (),
        keeps_first: bool = False,
    ) -> tuple[TokenBatch, CacheView]:
        """The batch and the cache view of a step; the caller runs the model and calls ``keep``."""
        rows = list(pieces)
        slots = [self.slots[row] for row in rows]
        batch = TokenBatch.pack(
            list(pieces.values()), first_positions=[self.cache.length(slot) for slot in slots]
        )
        view = self.cache.view(
            slots,
            self.page_table[rows],
            batch.segments,
            speculative=speculative,
            captures=captures,
            keeps_first=keeps_first,
        )
        return batch, view

    def feed(self, ids: Tensor, splits: Sequence[int], row: int = 0) -> Tensor:
        """One sequence in pieces that end at ``splits`` and at its end; all its logits [T, V]."""
        borders = [0, *splits, ids.shape[0]]
        pieces = [ids[a:b] for a, b in itertools.pairwise(borders)]
        return torch.cat([self.step({row: piece})[0] for piece in pieces])

    def state(self, row: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
        """Copies of recurrent state, convolution window and last hidden row, and the length."""
        saved = self.cache.save(self.slots[row])
        return saved.recurrent, saved.conv, saved.last_hidden, saved.length
