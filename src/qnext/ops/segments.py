"""Segments: the one object that knows where sequences begin and end in a packed batch.

Tokens of all sequences lie end to end in one axis P. Convolution, recurrent state and attention
read the borders from here; nobody derives them again. Index tables that several layers need are
built once per batch and kept on the object.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

Table = TypeVar("Table")


@dataclass(frozen=True)
class ChunkTable:
    """Chunks of C tokens, every sequence cut from its own start, ordered by chunk number.

    Sequences are visited longest first, so chunk number j is present in the first ``active[j]``
    of them: the lanes of a loop over chunks only ever shrink.
    """

    index: Tensor
    """[chunks, C] int64: packed position of each token; P marks padding of a last chunk."""
    inverse: Tensor
    """[P] int64: where packed token p stands in the flattened ``index``."""
    order: Tensor
    """[B] int64: sequences, longest first."""
    active: tuple[int, ...]
    """Sequences that have a chunk number j; the sum is the number of chunks."""


@dataclass(frozen=True)
class Segments:
    """Lengths of the sequences in a packed batch, as host integers and as tensors."""

    lengths: tuple[int, ...]
    """Tokens of each sequence; zero is allowed."""
    device: torch.device
    _tables: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """Segments of the given lengths."""
        assert all(length >= 0 for length in lengths), lengths
        return cls(lengths=tuple(lengths), device=torch.device(device))

    @property
    def count(self) -> int:
        """Number of sequences B."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Number of packed tokens P."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def starts(self) -> tuple[int, ...]:
        """Packed position of the first token of each sequence, and P at the end: [B + 1]."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    def cu_seqlens(self) -> Tensor:
        """``starts`` as an int32 tensor [B + 1]."""
        return self._once("cu", lambda: torch.tensor(self.starts, dtype=torch.int32))

    def ids(self) -> Tensor:
        """Sequence number of each packed token, int64 [P]."""

        # Every step of the engine makes some of these: NumPy takes a tenth of the time here.
        def build() -> Tensor:
            lengths = np.array(self.lengths, dtype=np.int64)
            return torch.from_numpy(np.repeat(np.arange(self.count), lengths))

        return self._once("ids", build)

    def offsets(self) -> Tensor:
        """Position of each packed token inside its own sequence, int64 [P]."""

        def build() -> Tensor:
            starts, lengths = np.array([self.starts[:-1], self.lengths], dtype=np.int64)
            return torch.from_numpy(np.arange(self.total) - np.repeat(starts, lengths))

        return self._once("offsets", build)

    def last_rows(self) -> Tensor:
        """Packed position of the last token of each sequence, int64 [B]; no sequence is empty."""
        assert all(self.lengths), self.lengths
        return self._once("last", lambda: torch.tensor(self.starts[1:], dtype=torch.int64) - 1)

    def window_table(self, history: int) -> Tensor:
        """Where the ``history`` inputs before each token stand: int64 [P, history].

        Oldest first. Indices refer to the rows ``[state (B * history) ; packed tokens (P)]``: a
        token near the start of its sequence reads the tail of that sequence's saved inputs.
        """

        def build() -> Tensor:
            offsets, ids = self.offsets().cpu(), self.ids().cpu()
            back = torch.arange(history, 0, -1)
            source = offsets[:, None] - back
            in_state = ids[:, None] * history + (history + source)
            in_batch = self.count * history + torch.arange(self.total)[:, None] - back
            return torch.where(source >= 0, in_batch, in_state)

        return self._once(("window", history), build)

    def tail_table(self, history: int) -> Tensor:
        """Where the last ``history`` inputs of each sequence stand afterwards: int64 [B, history].

        Same row numbering as ``window_table``; sequences shorter than ``history`` keep a part of
        their saved inputs.
        """

        def build() -> Tensor:
            starts, lengths = torch.tensor(self.starts[:-1]), torch.tensor(self.lengths)
            source = lengths[:, None] - torch.arange(history, 0, -1)
            in_state = torch.arange(self.count)[:, None] * history + (history + source)
            in_batch = self.count * history + starts[:, None] + source
            return torch.where(source >= 0, in_batch, in_state)

        return self._once(("tail", history), build)

    def chunks(self, size: int) -> ChunkTable:
        """The table of chunks of ``size`` tokens."""

        def build() -> ChunkTable:
            order = sorted(range(self.count), key=lambda b: (-self.lengths[b], b))
            starts, pieces, active = self.starts, [], []
            steps = torch.arange(size)
            for first in range(0, self.longest, size):
                lanes = [b for b in order if self.lengths[b] > first]
                active.append(len(lanes))
                begin = torch.tensor([starts[b] + first for b in lanes])
                left = torch.tensor([self.lengths[b] - first for b in lanes])
                inside = steps[None, :] < left[:, None]
                pieces.append(torch.where(inside, begin[:, None] + steps, self.total))
            index = torch.cat(pieces) if pieces else torch.empty(0, size, dtype=torch.int64)
            flat = index.flatten()
            inverse = torch.empty(self.total + 1, dtype=torch.int64)
            inverse[flat] = torch.arange(flat.numel())
            return ChunkTable(
                index=index.to(self.device),
                inverse=inverse[: self.total].to(self.device),
                order=torch.tensor(order, dtype=torch.int64, device=self.device),
                active=tuple(active),
            )

        return self._cached(("chunks", size), build)

    def remember(self, key: object, build: Callable[[], Table]) -> Table:
        """What ``build`` makes of these lengths, made once per batch."""
        return self._cached(key, build)

    def _once(self, key: object, build: Callable[[], Tensor]) -> Tensor:
        return self._cached(key, lambda: build().to(self.device))

    def _cached(self, key: object, build: Callable[[], Table]) -> Table:
        if key not in self._tables:
            self._tables[key] = build()
        return cast("Table", self._tables[key])
