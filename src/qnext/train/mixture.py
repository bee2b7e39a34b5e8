"""Mixture: sources in given shares, packed, as a pure function of the step number.

Every source is read as an endless stream of documents, shuffled anew each epoch by a keyed
permutation. The stream is measured in tokens, and block b of a stage takes tokens [b q, (b + 1) q)
of each source's stream, where q is the source's share of a block. So any step can be made without
the ones before it, and a run goes on from the number of its step alone.

Inside a block documents longer than a row are cut into rows, and everything is packed into
micro-batches: at random while there is room, then the piece that fits best; what does not fit is
cut, and the remainder goes on in a later micro-batch. Conversations are never cut.
"""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qnext.data.shards import Shard, open_shards
from qnext.errors import DataError
from qnext.train.batch import TrainBatch

if TYPE_CHECKING:
    from qnext.train.recipe import Need

_log = logging.getLogger(__name__)

BLOCK_MICRO_BATCHES = 64
"""Micro-batches packed together; more waste less and cost more memory."""
SHORTEST = 12
"""Pieces of fewer tokens are not made by cutting; so many may be left empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Data of a stage: shards of a prepared folder in shares of tokens."""

    folder: str
    """Folder with shards, such as DATA/train."""
    shares: Mapping[str, float]
    """Source -> share of the tokens; they are scaled to sum 1."""
    whole: tuple[str, ...] = ()
    """Sources whose documents are never cut: those with conversations."""
    verify: bool = True
    """Compute the checksums of all files at the start."""

    def open(self, need: "Need") -> "PackedMixture":
        """Check the shards and make the source of batches. Raises DataError."""
        shards = open_shards(self.folder, verify=self.verify)
        missing = sorted(set(self.shares) - set(shards))
        if missing:
            raise DataError(
                f"{self.folder} has no shard {', '.join(missing)}; it has "
                f"{', '.join(sorted(shards))}."
            )
        unknown = sorted(set(self.whole) - set(self.shares))
        if unknown:
            raise DataError(f"whole: {', '.join(unknown)} has no share.")
        used = {name: shards[name] for name, share in self.shares.items() if share > 0}
        for name, shard in used.items():
            if not len(shard):
                raise DataError(f"shard {name} of {self.folder} has no documents.")
            # Mapped now: data prepared again meanwhile does not reach a run that has begun.
            assert len(shard.ids) == len(shard.weights) == shard.tokens, name
            if shard.description["id_limit"] > need.vocab_size:
                raise DataError(
                    f"shard {name} has ids up to {shard.description['id_limit']} and the model's "
                    f"vocabulary holds {need.vocab_size}. Prepare the data with the model's "
                    "tokenizer."
                )
        if not used:
            raise DataError("shares: no source has a share above 0.")
        return PackedMixture(
            used,
            {name: float(self.shares[name]) for name in used},
            whole=frozenset(self.whole),
            seed=(need.seed, need.stage),
            row_tokens=need.row_tokens,
            micro_tokens=need.micro_tokens,
            micro_batches=max(1, need.batch_tokens // need.micro_tokens),
        )

    def tokenizer_digest(self) -> str | None:
        """SHA-256 of the tokenizer.json the shards were made with."""
        shards = open_shards(self.folder, verify=False)
        digests = {shards[n].description["tokenizer"] for n in self.shares if n in shards}
        if len(digests) > 1:
            raise DataError(
                f"{self.folder}: the shards were made with different tokenizers. Prepare them "
                "again with one."
            )
        return digests.pop() if digests else None


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one."""

    source: str
    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Stream:
    """One source as an endless sequence of tokens: all documents in a new order each epoch.

    With ``longest``, all documents of at most so many tokens.
    """

    def __init__(
        self, name: str, shard: Shard, key: Sequence[int | str], longest: int | None = None
    ) -> None:
        self.name, self.shard, self._key = name, shard, [*key, name]
        self.lengths = np.diff(shard.ends, prepend=0)
        fits = self.lengths <= (self.lengths.max() if longest is None else longest)
        self.documents = np.flatnonzero(fits)
        self.total = int(self.lengths[fits].sum())
        if not self.total:
            raise DataError(
                f"{name}: all {len(fits)} conversations are longer than a micro-batch of {longest} "
                "tokens. Raise the stage's micro_tokens, or leave the source out."
            )
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in the order of this epoch, where each ends in its stream)."""
        if epoch not in self._orders:
            order = self.documents[generator(*self._key, epoch).permutation(len(self.documents))]
            self._orders[epoch] = order, np.cumsum(self.lengths[order])
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def between(self, start: int, stop: int, *, whole: bool) -> list[Piece]:
        """The pieces of tokens [start, stop); ``whole``: the documents that begin there."""
        found: list[Piece] = []
        while start < stop:
            epoch, first = divmod(start, self.total)
            last = min(self.total, first + stop - start)
            order, ends = self.order(epoch)
            at = int(np.searchsorted(ends, first, side="right"))
            while at < len(order):
                document = int(order[at])
                begins = int(ends[at]) - int(self.lengths[document])
                if begins >= last:
                    break
                if whole:
                    if begins >= first:
                        found.append(Piece(self.name, document, 0, int(self.lengths[document])))
                else:
                    low, high = max(begins, first), min(int(ends[at]), last)
                    found.append(Piece(self.name, document, low - begins, high - begins))
                at += 1
            start += last - first
        return found


class PackedMixture:
    """Batches of a mixture by step number; see the module's text."""

    def __init__(
        self,
        shards: Mapping[str, Shard],
        shares: Mapping[str, float],
        *,
        whole: frozenset[str] = frozenset(),
        seed: tuple[int, int],
        row_tokens: int,
        micro_tokens: int,
        micro_batches: int,
    ) -> None:
        total = sum(shares.values())
        self.shards = dict(shards)
        self.shares = {name: share / total for name, share in sorted(shares.items())}
        self.streams = {
            n: Stream(n, self.shards[n], ("order", *seed), micro_tokens if n in whole else None)
            for n in self.shares
        }
        self.whole, self._seed = whole, seed
        self.row_tokens, self.micro_tokens = row_tokens, micro_tokens
        self.micro_batches_per_step = micro_batches
        self.dropped: dict[str, int] = {}
        """Documents of ``whole`` sources that are longer than a micro-batch, by source."""
        for name, stream in self.streams.items():
            long = len(stream.lengths) - len(stream.documents)
            if long:
                self.dropped[name] = long
                _log.warning(
                    "%s: %d of %d conversations are longer than a micro-batch of %d tokens and "
                    "are left out.", name, long, len(stream.lengths), micro_tokens,
                )  # fmt: skip
        self._blocks: OrderedDict[int, list[list[Piece]]] = OrderedDict()

    def digest(self) -> str:
        """SHA-256 over the checksums of the files that are read, shortened."""
        files = [(name, self.shards[name].description["files"]) for name in self.shares]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]

    def micro_batches(self, step: int) -> Sequence[TrainBatch]:
        """The micro-batches of optimiser step ``step``."""
        first = step * self.micro_batches_per_step
        numbers = range(first, first + self.micro_batches_per_step)
        return [self._batch(number) for number in numbers]

    def _batch(self, number: int) -> TrainBatch:
        block, place = divmod(number, BLOCK_MICRO_BATCHES)
        pieces = self.block(block)[place]
        documents = []
        for piece in pieces:
            ids, weights = self.shards[piece.source].document(piece.document)
            part = slice(piece.start, piece.stop)
            documents.append((ids[part], weights[part]))
        return TrainBatch.pack(
            documents, length=self.micro_tokens, sources=[piece.source for piece in pieces]
        )

    def block(self, number: int) -> list[list[Piece]]:
        """The pieces of each micro-batch of block ``number``."""
        if number not in self._blocks:
            self._blocks[number] = self._packed(number)
            while len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def _packed(self, number: int) -> list[list[Piece]]:
        room = BLOCK_MICRO_BATCHES * self.micro_tokens
        pieces: list[Piece] = []
        for name, share in self.shares.items():
            start, stop = (round(room * share * n) for n in (number, number + 1))
            for piece in self.streams[name].between(start, stop, whole=name in self.whole):
                if name not in self.whole:
                    pieces += _rows(piece, self.row_tokens)
                else:
                    pieces.append(piece)
        order = generator("pack", *self._seed, number).permutation(len(pieces))
        return pack([pieces[n] for n in order], BLOCK_MICRO_BATCHES, self.micro_tokens, self.whole)


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on ``key`` alone: Philox keyed with its hash."""
    digest = hashlib.sha256(repr(key).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _rows(piece: Piece, row: int) -> list[Piece]:
    """A piece cut into rows; a last crumb stays with the row before it if it can."""
    cuts = list(range(piece.start, piece.stop, row))
    parts = [Piece(piece.source, piece.document, low, min(low + row, piece.stop)) for low in cuts]
    # One or two tokens teach nothing.
    return [part for part in parts if len(part) > 2]


def pack(
    pieces: Sequence[Piece], bins: int, size: int, whole: frozenset[str] = frozenset()
) -> list[list[Piece]]:
    """Lay pieces into ``bins`` of ``size`` tokens each.

    Bins are filled in the given order until the next piece does not fit; then with the longest
    piece that does, and at last by cutting one whose source allows it. Pieces that find no place
    are left out; there are none beyond what exceeds the room of all bins.
    """
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    # Longest-fit search: pieces by length, taken ones marked.
    by_length = np.argsort(lengths, kind="stable")
    sorted_lengths = lengths[by_length]
    taken = np.zeros(len(pieces), dtype=bool)
    remainders: list[Piece] = []
    packed: list[list[Piece]] = []
    cursor = 0
    for _ in range(bins):
        content: list[Piece] = []
        room = size
        while remainders and len(remainders[-1]) <= room:
            content.append(remainders.pop())
            room -= len(content[-1])
        while cursor < len(pieces) and (taken[cursor] or lengths[cursor] <= room):
            if not taken[cursor]:
                taken[cursor] = True
                content.append(pieces[cursor])
                room -= int(lengths[cursor])
            cursor += 1
        while room > 2:
            at = int(np.searchsorted(sorted_lengths, room, side="right")) - 1
            while at >= 0 and taken[by_length[at]]:
                at -= 1
            fits = pieces[by_length[at]] if at >= 0 else None
            if fits is not None and (len(fits) >= room - 2 or room < SHORTEST):
                taken[by_length[at]] = True
                content.append(fits)
                room -= len(fits)
                continue
            cut = _first_cuttable(pieces, taken, cursor, room, whole)
            if cut is None:
                if fits is None:
                    break
                taken[by_length[at]] = True
                content.append(fits)
                room -= len(fits)
                continue
            taken[cut] = True
            piece = pieces[cut]
            border = piece.start + room
            content.append(Piece(piece.source, piece.document, piece.start, border))
            remainders.append(Piece(piece.source, piece.document, border, piece.stop))
            room = 0
        packed.append(content)
    return packed


def _first_cuttable(
    pieces: Sequence[Piece], taken: np.ndarray, start: int, room: int, whole: frozenset[str]
) -> int | None:
    """The next piece that may be cut to ``room`` with a worthwhile rest; None without one."""
    if room < SHORTEST:
        return None
    for at in range(start, min(len(pieces), start + 200)):
        piece = pieces[at]
        if not taken[at] and piece.source not in whole and len(piece) >= room + SHORTEST:
            return at
    return None
