"""The prefix cache of a hybrid model: which prompts can start from where another one was.

Keys and values of a prefix are not enough: the delta layers need their state at exactly the
position to resume from. So the unit of reuse is a *snapshot*: a saved state at some length,
together with the pages that hold the keys and values up to there. Snapshots sit at any token. A
radix tree over token ids finds the deepest one that fits a prompt, and remembers token ids after a
snapshot is gone, so that a point where prompts part is recognised when it comes again.

Nothing here touches a tensor: a snapshot names a cache slot and pages.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qnext.engine.blocks import PagePool
from qnext.engine.worth import HALF_LIFE_S, PrefillTime, likelihood

CLOSE_TOKENS = 64
"""A new snapshot replaces one of the same path that lies fewer tokens before it, hints excepted."""
MAX_TREE_TOKENS = 1 << 20
"""Token ids remembered in all, snapshots or not."""


@dataclass(eq=False, kw_only=True, slots=True)
class Snapshot:
    """A saved state at ``length`` tokens, and the pages up to there."""

    length: int
    slot: int
    """Cache slot that holds the recurrent state, the convolution window and the last hidden row."""
    pages: list[int]
    mtp_first: int
    """First position whose MTP keys and values are there; ``length`` if none are."""
    why: str
    born: float
    node: "Node"
    uses: float = 0.0
    """Decayed number of uses."""
    used_at: float = 0.0
    floor: float = 0.0
    """Worth of the last victim when this one was last used: its worth counts from there."""
    awaited: int = 0
    """Waiting requests that would start from it now; they keep it from growing old."""
    pinned: int = 0
    """Requests that are about to load it; it is not evicted meanwhile."""


@dataclass(eq=False, slots=True)
class Node:
    """An edge of the radix tree: ``tokens`` follow what the parents spell."""

    start: int
    tokens: tuple[int, ...]
    parent: "Node | None"
    children: dict[int, "Node"] = field(default_factory=dict)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    """By length; start < length <= start + len(tokens)."""
    used_at: float = 0.0
    lost: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By length: why a snapshot that had to go was taken, and when it went."""

    @property
    def end(self) -> int:
        """Tokens from the root to the end of this edge."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What is known about a prompt."""

    known: int
    """Tokens of the prompt that were seen before."""
    snapshot: Snapshot | None
    """The deepest one that leaves at least one token to run."""
    expected: int | None = None
    """The token that an earlier prompt had where they part; None where it ended."""
    lost: tuple[int, str, float] | None = None
    """(length, why, when it went) of the deepest one that would be better and had to go."""
    ways: int = 1
    """How many continuations of the known part were seen."""


class PrefixCache:
    """Snapshots of prefixes, found by tokens and evicted by value.

    ``slots`` are the cache slots set aside for snapshots. ``clock`` gives seconds, ``prefill`` what
    a stretch of a prompt takes. ``state_bytes`` and ``page_bytes`` are those of a slot and a page.
    """

    def __init__(
        self,
        pool: PagePool,
        slots: Sequence[int],
        *,
        clock: Callable[[], float],
        prefill: PrefillTime | None = None,
        state_bytes: int = 1,
        page_bytes: int = 1,
    ) -> None:
        self.pool, self._clock = pool, clock
        self._prefill = prefill or PrefillTime()
        self._state_bytes, self._page_bytes = state_bytes, page_bytes
        self._slots = list(slots)
        self.num_slots = len(self._slots)
        self.root = Node(0, (), None)
        self._snapshots: list[Snapshot] = []
        self._tree_tokens = 0
        self._floor = 0.0
        """Worth of the last victim: what is not used falls behind it with time."""
        self.on_evict: Callable[[Snapshot], None] | None = None
        """Called with a snapshot that is about to go for lack of room."""
        self.awaiting: Callable[[Sequence[int]], int] = lambda ids: 0
        """How many waiting requests begin with some tokens and go on; they are told of by
        ``expect`` as well."""
        self.version = 0
        """Changes whenever a lookup may find something else than before."""

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    # -- lookup ----------------------------------------------------------------------------------

    def match(self, ids: Sequence[int]) -> Match:
        """The longest known prefix of ``ids`` and the deepest snapshot on it."""
        node, at, best = self.root, 0, None
        lost: tuple[int, str, float] | None = None
        expected: int | None = None
        limit, ways = len(ids) - 1, 1
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                others = node.children.values()
                last = max(others, key=lambda other: other.used_at, default=None)
                expected = last.tokens[0] if last else None
                ways = max(len(others), 1)
                break
            shared = _common(child.tokens, ids, at)
            for length, (why, when) in child.lost.items():
                if length <= min(at + shared, limit) and (lost is None or length > lost[0]):
                    lost = (length, why, when)
            for length, snapshot in child.snapshots.items():
                deeper = best is None or length > best.length
                if length <= min(at + shared, limit) and deeper:
                    best = snapshot
            child.used_at = self._clock()
            at += shared
            node = child
            if shared < len(child.tokens):
                expected = child.tokens[shared]
                break
        if lost is not None and best is not None and lost[0] <= best.length:
            lost = None
        return Match(known=at, snapshot=best, expected=expected, lost=lost, ways=ways)

    def age(self, since: float) -> float:
        """Seconds from a time that this cache has noted until now."""
        return self._clock() - since

    def use(self, snapshot: Snapshot) -> None:
        """Note that a request resumed from a snapshot."""
        now = self._clock()
        snapshot.uses = snapshot.uses * 0.5 ** ((now - snapshot.used_at) / HALF_LIFE_S) + 1.0
        snapshot.used_at = now
        snapshot.floor = self._floor

    def tokens_of(self, snapshot: Snapshot) -> tuple[int, ...]:
        """The token ids a snapshot lies behind."""
        edges: list[tuple[int, ...]] = []
        node: Node | None = snapshot.node
        while node is not None:
            edges.append(node.tokens)
            node = node.parent
        return tuple(token for edge in reversed(edges) for token in edge)[: snapshot.length]

    def expect(self, ids: Sequence[int], count: int) -> None:
        """So many requests more, or fewer if negative, wait with the prompt ``ids``."""
        node, at, deepest = self.root, 0, None
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                break
            at += _common(child.tokens, ids, at)
            usable = [length for length in child.snapshots if length <= at and length < len(ids)]
            if usable:
                deepest = child.snapshots[max(usable)]
            if at < child.end:
                break
            node = child
        if deepest is not None:
            deepest.awaited += count

    # -- growth ----------------------------------------------------------------------------------

    def learn(self, ids: Sequence[int]) -> None:
        """Remember the tokens of a prompt that begins to run."""
        self._grow(tuple(ids))
        self._forget_ghosts()

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether there is a snapshot at exactly these tokens."""
        return self.at(ids) is not None

    def at(self, ids: Sequence[int]) -> Snapshot | None:
        """The snapshot at exactly these tokens."""
        node = self._walk(ids)
        return None if node is None else node.snapshots.get(len(ids))

    def continues(self, ids: Sequence[int]) -> bool:
        """Whether a snapshot lies further on, so that a prompt has run through these tokens."""
        node = self._walk(ids)
        if node is None:
            return False
        below = [node, *self._nodes(node)]
        return any(length > len(ids) for one in below for length in one.snapshots)

    def take_slot(self) -> int | None:
        """A slot for a new snapshot, evicting if need be; None when there is none to be had."""
        if not self._slots and not self._evict_one():
            return None
        return self._slots.pop()

    def return_slot(self, slot: int) -> None:
        """Give back a slot from ``take_slot`` that did not become a snapshot."""
        self._slots.append(slot)

    def insert(
        self,
        ids: Sequence[int],
        *,
        slot: int,
        pages: Sequence[int],
        mtp_first: int,
        why: str,
    ) -> Snapshot:
        """Add the snapshot at the end of ``ids``; its pages are shared, its slot is the cache's.

        The caller has made sure that none is there yet (``holds``).
        """
        node = self._grow(tuple(ids))
        assert len(ids) not in node.snapshots, len(ids)
        now = self._clock()
        self.pool.share(pages)
        snapshot = Snapshot(
            length=len(ids), slot=slot, pages=list(pages), mtp_first=mtp_first, why=why,
            born=now, node=node, used_at=now,
        )  # fmt: skip
        # Who waits would start from the deepest one: those further on have theirs already.
        below = [node, *self._nodes(node)]
        snapshot.awaited = self.awaiting(ids) - sum(
            one.awaited for each in below for n, one in each.snapshots.items() if n > len(ids)
        )
        node.snapshots[len(ids)] = snapshot
        above = self._above(snapshot)
        if above is not None:
            above.awaited -= snapshot.awaited
        node.lost.pop(len(ids), None)
        self._snapshots.append(snapshot)
        self._replace_close(node, len(ids))
        snapshot.floor = self._floor
        self.version += 1
        self._forget_ghosts()
        return snapshot

    # -- eviction --------------------------------------------------------------------------------

    def make_room(self, pages: int) -> bool:
        """Evict until so many pages are free; False when nothing more can go.

        Those whose pages others hold too are spared as long as there are better ones to give up.
        """
        while self.pool.free < pages:
            if not self._evict_one(frees_pages=True):
                return False
        return True

    def evictable(self) -> int:
        """Pages that evicting everything unpinned would free."""
        held: dict[int, int] = {}
        for snapshot in self._snapshots:
            if not snapshot.pinned:
                for page in snapshot.pages:
                    held[page] = held.get(page, 0) + 1
        return sum(self.pool.holders(page) == count for page, count in held.items())

    def evict(self, snapshot: Snapshot, *, replaced: bool = False) -> None:
        """Give up one snapshot, for lack of room or for a better one; its tokens stay known."""
        assert not snapshot.pinned, snapshot
        self._floor = max(self._floor, self.worth(snapshot))
        if self.on_evict is not None and not replaced:
            self.on_evict(snapshot)
        if not replaced:
            snapshot.node.lost[snapshot.length] = (snapshot.why, self._clock())
        self._drop(snapshot)

    def _drop(self, snapshot: Snapshot) -> None:
        self.version += 1
        above = self._above(snapshot)
        if above is not None:
            above.awaited += snapshot.awaited
        self._snapshots.remove(snapshot)
        del snapshot.node.snapshots[snapshot.length]
        self.pool.give_back(snapshot.pages)
        self._slots.append(snapshot.slot)

    def clear(self) -> None:
        """Give up everything, tokens included. No snapshot may be pinned."""
        for snapshot in list(self._snapshots):
            assert not snapshot.pinned, snapshot
            self._drop(snapshot)
        self.root.children.clear()
        self._tree_tokens = 0
        self.version += 1

    def worth(self, snapshot: Snapshot) -> float:
        """Seconds expected to be saved per byte that giving it up would free, aged.

        Changes with its surroundings: when the snapshot before it goes, this one takes longer to
        compute again; when one that shares its pages goes, more bytes are its own.
        """
        likely = likelihood(snapshot.why, snapshot.uses, self._clock() - snapshot.used_at)
        likely += snapshot.awaited
        floor = self._floor if snapshot.awaited else snapshot.floor
        seconds = self._prefill.seconds(self._before(snapshot), snapshot.length)
        held = self._state_bytes + self._page_bytes * self.pool.exclusive(snapshot.pages)
        return floor + likely * seconds / held

    def _before(self, snapshot: Snapshot) -> int:
        """Length of the nearest snapshot on its path that is shorter; 0 if there is none."""
        above = self._above(snapshot)
        return above.length if above else 0

    def _above(self, snapshot: Snapshot) -> Snapshot | None:
        """The nearest snapshot on its path that is shorter."""
        node: Node | None = snapshot.node
        while node is not None:
            shorter = [length for length in node.snapshots if length < snapshot.length]
            if shorter:
                return node.snapshots[max(shorter)]
            node = node.parent
        return None

    def _evict_one(self, *, frees_pages: bool = False) -> bool:
        loose = [snapshot for snapshot in self._snapshots if not snapshot.pinned]
        if frees_pages:
            loose = [one for one in loose if self.pool.exclusive(one.pages)] or loose
        if not loose:
            return False
        self.evict(min(loose, key=lambda snapshot: (self.worth(snapshot), snapshot.born)))
        return True

    def _replace_close(self, node: Node, length: int) -> None:
        """Drop snapshots of chance that lie just before a new one, where no other path parts.

        Those stay from which somebody who waits would start.
        """
        step: Node | None = node
        while step is not None and step.end > length - CLOSE_TOKENS:
            if step is not node and len(step.children) > 1:
                return
            for near, snapshot in list(step.snapshots.items()):
                by_chance = snapshot.why in ("end", "interval", "branch", "parked")
                by_chance = by_chance and not snapshot.awaited
                if length - CLOSE_TOKENS < near < length and by_chance and not snapshot.pinned:
                    self.evict(snapshot, replaced=True)
            step = step.parent

    # -- the tree --------------------------------------------------------------------------------

    def _walk(self, ids: Sequence[int]) -> Node | None:
        """The node in which ``ids`` ends, if all of it is known."""
        node, at = self.root, 0
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                return None
            shared = _common(child.tokens, ids, at)
            at += shared
            if at < len(ids) and shared < len(child.tokens):
                return None
            node = child
        return node

    def _grow(self, ids: tuple[int, ...]) -> Node:
        """The node in which ``ids`` ends, made if need be."""
        node, at = self.root, 0
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                child = Node(at, ids[at:], node, used_at=self._clock())
                node.children[ids[at]] = child
                self._tree_tokens += len(ids) - at
                return child
            shared = _common(child.tokens, ids, at)
            at += shared
            if at < len(ids) and shared < len(child.tokens):
                child = self._split(child, shared)
            node = child
        return node

    def _split(self, node: Node, shared: int) -> Node:
        """Cut an edge after ``shared`` tokens; returns the upper part."""
        assert node.parent is not None
        upper = Node(node.start, node.tokens[:shared], node.parent, used_at=node.used_at)
        node.parent.children[upper.tokens[0]] = upper
        node.start, node.tokens, node.parent = upper.end, node.tokens[shared:], upper
        upper.children[node.tokens[0]] = node
        for length in [length for length in node.snapshots if length <= upper.end]:
            snapshot = node.snapshots.pop(length)
            snapshot.node = upper
            upper.snapshots[length] = snapshot
        for length in [length for length in node.lost if length <= upper.end]:
            upper.lost[length] = node.lost.pop(length)
        return upper

    def _forget_ghosts(self) -> None:
        """Prune the leaves that were not looked at for longest and hold no snapshot."""
        while self._tree_tokens > MAX_TREE_TOKENS:
            leaves = [n for n in self._nodes() if not n.children and not n.snapshots]
            if not leaves:
                return
            oldest = min(leaves, key=lambda n: n.used_at)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.tokens[0]]
            self._tree_tokens -= len(oldest.tokens)
            self.version += 1

    def _nodes(self, top: Node | None = None) -> Iterator[Node]:
        """Every node below one (the root)."""
        stack = list((top or self.root).children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node


def _common(edge: tuple[int, ...], ids: Sequence[int], at: int) -> int:
    """How many tokens of an edge agree with ``ids`` from position ``at``."""
    length = min(len(edge), len(ids) - at)
    if tuple(ids[at : at + length]) == edge[:length]:
        return length
    for i in range(length):
        if edge[i] != ids[at + i]:
            return i
    return length
