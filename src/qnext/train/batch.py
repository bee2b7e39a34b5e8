"""TrainBatch: packed documents and, for every token, the weight of the loss term it is target of.

A data source is anything with ``micro_batches(step)``: a pure function of the step number, so
that a run goes on where it stopped from that number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qnext.model.batch import TokenBatch
from qnext.ops import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The loss terms of one prediction distance: who predicts, what, and how much it counts."""

    rows: Tensor
    """[R] int64: packed positions that predict."""
    inputs: Tensor
    """[R] int64: id of the token ``depth`` after each row, which an MTP layer reads."""
    labels: Tensor
    """[R] int64: id of the token ``depth + 1`` after each row."""
    weights: Tensor
    """[R] float32: weight of each term; never 0."""


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Documents laid end to end. Lives on one device; ``to`` moves it."""

    tokens: TokenBatch
    """Ids, positions and borders, as the model takes them."""
    weight_P: Tensor
    """[P] float32: weight of the loss term whose *target* is this token. 0 at the first token of
    each document, at prompts, and at padding."""
    padding: int = 0
    """How many tokens at the end are padding: a last segment of its own without weight."""
    sources: tuple[str, ...] = ()
    """Where each document came from, for telemetry; empty if not recorded."""
    _made: dict[int, Targets] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def pack(
        cls,
        documents: Sequence[tuple[np.ndarray | Tensor, np.ndarray | Tensor]],
        *,
        length: int | None = None,
        pad_id: int = 0,
        sources: Sequence[str] = (),
    ) -> "TrainBatch":
        """Lay (ids, weights) of documents end to end, padded to ``length`` tokens if given.

        The weight of each document's first token is set to 0: nothing predicts it.
        """
        ids = [_copied(i, torch.int64) for i, _ in documents]
        weights = [_copied(w, torch.float32) for _, w in documents]
        assert ids, "no documents"
        for number, (i, w) in enumerate(zip(ids, weights, strict=True)):
            assert i.shape == w.shape, (number, i.shape, w.shape)
            assert i.ndim == 1, (number, i.shape)
            assert len(i), number
            w[0] = 0
        used = sum(len(i) for i in ids)
        padding = 0 if length is None else length - used
        assert padding >= 0, (length, used)
        if padding:
            ids.append(torch.full((padding,), pad_id, dtype=torch.int64))
            weights.append(torch.zeros(padding))
        return cls(
            tokens=TokenBatch.pack(ids),
            weight_P=torch.cat(weights),
            padding=padding,
            sources=tuple(sources),
        )

    @property
    def ids(self) -> Tensor:
        """[P] int64."""
        return self.tokens.ids

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Packed position of each document's first token, and P at the end; padding is last."""
        return self.tokens.segments.starts

    @property
    def cu_seqlens_tensor(self) -> Tensor:
        """``cu_seqlens`` as int32 on the batch's device."""
        return self.tokens.segments.cu_seqlens()

    @property
    def documents(self) -> int:
        """Number of documents, padding not counted."""
        return self.tokens.segments.count - (self.padding > 0)

    @property
    def real_tokens(self) -> int:
        """Tokens without padding: what balance counts and throughput refer to."""
        return self.tokens.segments.total - self.padding

    @cached_property
    def loss_tokens(self) -> float:
        """Sum of the weights: this batch's part of the global denominator of every objective."""
        return float(self.weight_P.sum(dtype=torch.float64))

    def targets(self, depth: int = 0) -> Targets:
        """Loss terms of the main head (``depth`` 0) or of MTP depth 1, 2, ...

        Row t stands at its own index and predicts token t + depth + 1 of the same document. Terms
        of weight 0 are left out.
        """
        if depth not in self._made:
            sequence = self.tokens.segments.ids()
            ahead = depth + 1
            same = sequence[:-ahead] == sequence[ahead:]
            rows = torch.nonzero(same & (self.weight_P[ahead:] != 0)).flatten()
            self._made[depth] = Targets(
                rows=rows,
                inputs=self.ids[rows + depth],
                labels=self.ids[rows + ahead],
                weights=self.weight_P[rows + ahead],
            )
        return self._made[depth]

    def shifted_ids(self, depth: int) -> Tensor:
        """[P] int64: the token ``depth`` after each, 0 where the document has ended."""
        sequence = self.tokens.segments.ids()
        out = torch.zeros_like(self.ids)
        same = sequence[:-depth] == sequence[depth:]
        out[:-depth] = torch.where(same, self.ids[depth:], 0)
        return out

    def to(self, device: torch.device | str) -> "TrainBatch":
        """The batch on ``device``."""
        if self.ids.device == torch.device(device):
            return self
        segments = Segments.of(self.tokens.segments.lengths, device)
        tokens = TokenBatch(
            ids=self.ids.to(device), positions=self.tokens.positions.to(device), segments=segments
        )
        return TrainBatch(
            tokens=tokens,
            weight_P=self.weight_P.to(device),
            padding=self.padding,
            sources=self.sources,
        )


def _copied(x: np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own; arrays may be of any integer type and read-only."""
    return (x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))).to(dtype, copy=True)


class DataSource(Protocol):
    """Batches by step number; the same step gives the same batches, today and after a crash."""

    def micro_batches(self, step: int) -> Sequence[TrainBatch]:
        """The micro-batches whose gradients together make optimiser step ``step`` (from 0)."""
        ...

    def digest(self) -> str | None:
        """Changes when the stored data do; None for batches made by rule."""
        ...
