"""Prompts that wait in the queue: where a prompt that starts now parts from them.

A state is worth saving where others are to go on from, and those who wait say where that is before
anything has run. ``Foresight`` is a radix tree over their tokens that counts prompts. Edges point
into the prompts themselves, so a long queue of long prompts takes no second copy. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_SHARED = 16
"""Fewer tokens than this are quicker run than started from."""
MAX_POINTS = 4
"""Snapshots that a single prompt may plant for others in the queue."""


@dataclass(eq=False, slots=True)
class _Edge:
    """Tokens ``ids[start:end]`` of prompts that agree up to there."""

    ids: tuple[int, ...]
    start: int
    end: int
    count: int = 0
    """Prompts that run through it, those that end at its end included."""
    ending: int = 0
    """Prompts that end at its end."""
    children: dict[int, "_Edge"] = field(default_factory=dict)


class Foresight:
    """The prompts of a queue."""

    def __init__(self) -> None:
        self._root = _Edge((), 0, 0)

    def add(self, ids: tuple[int, ...]) -> None:
        """A prompt waits."""
        edge, at = self._root, 0
        edge.count += 1
        while at < len(ids):
            child = edge.children.get(ids[at])
            if child is None:
                child = edge.children[ids[at]] = _Edge(ids, at, len(ids))
            else:
                shared = common(child.ids, ids, at, child.end)
                if shared < child.end:
                    child = self._split(edge, child, shared)
            child.count += 1
            edge, at = child, child.end
        edge.ending += 1

    def remove(self, ids: tuple[int, ...]) -> None:
        """A prompt that was added waits no more."""
        edge, at = self._root, 0
        edge.count -= 1
        while at < len(ids):
            child = edge.children[ids[at]]
            child.count -= 1
            if not child.count:
                del edge.children[ids[at]]
                return
            edge, at = child, child.end
        edge.ending -= 1

    def sharing(self, ids: Sequence[int]) -> int:
        """How many waiting prompts begin with ``ids`` and go on."""
        edge, at = self._root, 0
        while at < len(ids):
            child = edge.children.get(ids[at])
            if child is None or common(child.ids, ids, at, child.end) < min(child.end, len(ids)):
                return 0
            edge, at = child, child.end
        return edge.count - (edge.ending if at == len(ids) else 0)

    def partings(self, ids: tuple[int, ...]) -> dict[int, int]:
        """Length -> how many waiting prompts could go on from ``ids`` there and no further.

        A prompt that ends on the way, or is the same, has its last token left to run.
        """
        found: dict[int, int] = {}
        edge, at = self._root, 0
        while True:
            if edge.ending and at:
                found[at - 1] = found.get(at - 1, 0) + edge.ending
            left = edge.count - edge.ending
            child = edge.children.get(ids[at]) if at < len(ids) else None
            left -= child.count if child else 0
            if left:
                found[at] = found.get(at, 0) + left
            if child is None:
                return found
            shared = common(child.ids, ids, at, child.end)
            if shared < child.end:
                found[shared] = found.get(shared, 0) + child.count
                return found
            edge, at = child, child.end

    def _split(self, above: _Edge, edge: _Edge, at: int) -> _Edge:
        """Cut an edge at a position; returns the upper part."""
        upper = _Edge(edge.ids, edge.start, at, count=edge.count)
        above.children[upper.ids[upper.start]] = upper
        edge.start = at
        upper.children[edge.ids[at]] = edge
        return upper


def points(
    partings: dict[int, int], *, start: int, planned: Sequence[int], least: int
) -> list[int]:
    """Where a prompt should leave snapshots for those who wait, in order of length.

    ``start`` is where it starts itself, ``planned`` where it leaves some anyway. A snapshot saves
    everybody who goes on from there, or from further on, the tokens since the one before it; it is
    worth taking if that makes ``least`` tokens in all.
    """
    found: list[tuple[int, int]] = []
    last, going = start, sum(partings.values())
    for length in sorted(partings):
        last = max(last, max((one for one in planned if one <= length), default=0))
        saved = length - last
        if saved >= min(MIN_SHARED, least) and saved * going >= least:
            found.append((saved * going, length))
            last = length
        going -= partings[length]
    return sorted(length for _, length in sorted(found)[-MAX_POINTS:])


def deepest_common(first: tuple[int, ...], second: tuple[int, ...], lengths: Sequence[int]) -> int:
    """The largest of ``lengths``, less than all of ``first``, up to which two prompts agree."""
    for length in sorted(lengths, reverse=True):
        if length >= len(first) or first[length - 1] != second[length - 1]:
            continue
        if first[:length] == second[:length]:
            return length
    return 0


def common(first: Sequence[int], second: Sequence[int], start: int, end: int) -> int:
    """Where two rows of tokens that agree before ``start`` part, at most ``end``.

    Looks at pieces of growing size, so that early partings are found early.
    """
    end = min(end, len(first), len(second))
    at, step = start, 8
    while at < end:
        stop = min(at + step, end)
        if tuple(first[at:stop]) == tuple(second[at:stop]):
            at, step = stop, step * 4
        elif step <= 8:
            return next(i for i in range(at, stop) if first[i] != second[i])
        else:
            end, step = stop, max((stop - at) // 2, 8)
    return at
