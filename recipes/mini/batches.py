"""Mixing the shards: an endless, reproducible stream of batches in given shares of tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from recipes.mini.data import Shard
from torch import Tensor

from qnext.model.batch import TokenBatch

Piece = tuple[np.ndarray, np.ndarray]
"""(ids, judged) of one document or a part of one."""


@dataclass(frozen=True, slots=True)
class JudgedBatch:
    """Packed documents and, for each token, whether the model is judged on it."""

    tokens: TokenBatch
    judged: Tensor
    """[P] uint8."""


class _Stream:
    """All documents of one shard in a new random order each epoch, cut to pieces of ``limit``."""

    def __init__(self, shard: Shard, seed: int) -> None:
        self.shard, self.seed = shard, seed
        self.epoch = self.position = self.offset = 0
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.shard))

    def next(self, limit: int) -> Piece:
        ids, judged = self.shard.document(int(self._order[self.position]))
        piece = slice(self.offset, self.offset + limit)
        self.offset += limit
        # A last crumb of a few tokens is not worth a document of its own.
        if self.offset >= len(ids) - 8:
            self.offset = 0
            self.position += 1
            if self.position == len(self.shard):
                self.position, self.epoch = 0, self.epoch + 1
                self._order = self._shuffled()
        return ids[piece], judged[piece]

    def state(self) -> list[int]:
        return [self.epoch, self.position, self.offset]

    def restore(self, state: list[int]) -> None:
        self.epoch, self.position, self.offset = state
        self._order = self._shuffled()


class Mixture:
    """Draws documents so that each source's share of tokens follows its weight exactly."""

    def __init__(self, shards: dict[str, Shard], weights: dict[str, float], seed: int) -> None:
        self.streams = {
            name: _Stream(shards[name], seed + number)
            for number, name in enumerate(sorted(shards))
            if weights.get(name, 0) > 0 and len(shards[name])
        }
        total = sum(weights[name] for name in self.streams)
        self.weights = {name: weights[name] / total for name in self.streams}
        self.taken = dict.fromkeys(self.streams, 0)

    def documents(self, tokens: int, limit: int) -> list[Piece]:
        """Documents of together at least ``tokens`` tokens, each of at most ``limit``."""
        picked = []
        size = 0
        while size < tokens:
            name = min(self.streams, key=lambda n: self.taken[n] / self.weights[n])
            ids, judged = self.streams[name].next(limit)
            self.taken[name] += len(ids)
            size += len(ids)
            if len(ids) > 2:
                picked.append((ids, judged))
        return picked

    def state(self) -> dict:
        """Where every stream stands."""
        return {name: [*s.state(), self.taken[name]] for name, s in self.streams.items()}

    def restore(self, state: dict) -> None:
        """The inverse of ``state``."""
        for name, (epoch, position, offset, taken) in state.items():
            self.streams[name].restore([epoch, position, offset])
            self.taken[name] = taken


def pack(documents: list[Piece]) -> JudgedBatch:
    """Lay documents end to end."""
    ids = [torch.from_numpy(ids.astype(np.int64)) for ids, _ in documents]
    judged = torch.from_numpy(np.concatenate([judged for _, judged in documents]))
    return JudgedBatch(TokenBatch.pack(ids), judged)


def split(documents: list[Piece], parts: int) -> list[list[Piece]]:
    """Documents dealt into ``parts`` lists of about equal tokens; empty lists are left out."""
    dealt: list[list[Piece]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for document in sorted(documents, key=lambda piece: -len(piece[0])):
        least = sizes.index(min(sizes))
        dealt[least].append(document)
        sizes[least] += len(document[0])
    return [part for part in dealt if part]
