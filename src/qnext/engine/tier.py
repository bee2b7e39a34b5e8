"""Between the prefix cache in memory and its files: what goes to disk, and when it comes back.

A snapshot is written when it is evicted and when the engine is closed. It is read when a prompt
matches one on disk further than any in memory, if reading is expected to take less time than
computing; then it is entered into the prefix cache like any other and found there. All copying
in and out of the cache happens on the engine's thread, between steps; files are written elsewhere.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qnext.engine.blocks import PagePool
from qnext.engine.disk import DiskState, DiskStore, Missing, Record
from qnext.engine.explain import Reason
from qnext.engine.prefix import PrefixCache, Snapshot
from qnext.engine.worth import DECAY, PrefillTime

SHORT_LIVED = ("parked", "fork")
"""Snapshots of running requests: of no use to anybody after a restart."""
RETRY_EVERY = 16
"""Every so often something is read although it seemed slower, so that the estimate stays fresh."""


class ByteSlots(Protocol):
    """What the tier needs of a runner: slots and pages as bytes that nobody here looks into."""

    def slot_bytes(self, slot: int) -> bytes: ...
    def page_bytes(self, page: int) -> bytes: ...
    def load_slot(self, slot: int, length: int, data: bytes) -> None: ...
    def load_page(self, page: int, data: bytes) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """What a look at the disk has come to."""

    snapshot: Snapshot | None = None
    """In memory now."""
    reason: Reason | None = None
    """Why a snapshot on disk was not used."""
    known: int = 0
    """Tokens of the prompt that the disk knows."""


class LoadTime:
    """Seconds that reading takes, from what was read; 0 before anything was."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def note(self, nbytes: int, seconds: float) -> None:
        """So many bytes were read, checked and copied in so many seconds."""
        self._bytes = self._bytes * DECAY + nbytes
        self._seconds = self._seconds * DECAY + seconds

    def seconds(self, nbytes: int) -> float:
        """Expected time for so many bytes."""
        return nbytes * self._seconds / self._bytes if self._bytes else 0.0


class DiskTier:
    """The disk behind a prefix cache. ``clock`` measures reading, in seconds."""

    def __init__(
        self,
        store: DiskStore,
        *,
        slots: ByteSlots,
        pool: PagePool,
        prefix: PrefixCache,
        page_size: int,
        prefill: PrefillTime,
        clock: Callable[[], float],
    ) -> None:
        self.store, self.load_time = store, LoadTime()
        self._slots, self._pool, self._prefix = slots, pool, prefix
        self._page_size, self._prefill, self._clock = page_size, prefill, clock
        self._refused = 0
        prefix.on_evict = self.save

    # -- to disk ---------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, *, timeout_s: float = 0.0) -> None:
        """Copy a snapshot out and queue it, unless it is there already or the queue is full."""
        if snapshot.why in SHORT_LIVED or not self.store.writable:
            return
        ids = self._prefix.tokens_of(snapshot)
        if self.store.holds(ids):
            return
        if not timeout_s and not self.store.accepts:
            self.store.counts["dropped"] += 1
            return
        self.store.submit(self._record(snapshot, ids), timeout_s=timeout_s)

    def _record(self, snapshot: Snapshot, ids: tuple[int, ...]) -> Record:
        pages, full = snapshot.pages, len(ids) // self._page_size
        return Record(
            ids=ids,
            why=snapshot.why,
            mtp_first=snapshot.mtp_first,
            state=self._slots.slot_bytes(snapshot.slot),
            tail=self._slots.page_bytes(pages[full]) if len(pages) > full else b"",
            pages={
                number: self._slots.page_bytes(pages[number])
                for number in self.store.lacking(ids, snapshot.mtp_first)
            },
        )

    def close(self, drain_s: float) -> None:
        """Write what is in memory, the most useful first, for so long at most; then let go."""
        end = time.monotonic() + drain_s
        first = ("system", "stable")
        for snapshot in sorted(
            self._prefix, key=lambda s: (s.why in first, self._prefix.worth(s)), reverse=True
        ):
            left = end - time.monotonic()
            if left <= 0:
                break
            self.save(snapshot, timeout_s=left)
        self.store.close(max(end - time.monotonic(), 0.1))

    # -- from disk -------------------------------------------------------------------------------

    def fetch(self, ids: Sequence[int], base: Snapshot | None) -> Fetched:
        """Bring in the deepest snapshot of a prompt that lies beyond ``base``, if that pays."""
        reached = base.length if base else 0
        state = self.store.find(ids, longer_than=reached)
        if state is None:
            return Fetched()
        shared = reached // self._page_size
        nbytes = self.store.bytes_to_load(state, skip_pages=shared)
        if not self._pays(nbytes, reached, state.length):
            return Fetched(reason="disk_slower", known=state.length)
        if base is not None:
            base.pinned += 1
        try:
            return self._fetch(ids, state, base, shared, nbytes)
        finally:
            if base is not None:
                base.pinned -= 1

    def _pays(self, nbytes: int, start: int, end: int) -> bool:
        if self.load_time.seconds(nbytes) < self._prefill.seconds(start, end):
            return True
        self._refused += 1
        return self._refused % RETRY_EVERY == 0

    def _fetch(
        self,
        ids: Sequence[int],
        state: DiskState,
        base: Snapshot | None,
        shared: int,
        nbytes: int,
    ) -> Fetched:
        needed = -(-state.length // self._page_size) - shared
        slot = self._prefix.take_slot()
        if slot is None:
            return Fetched(reason="budget", known=state.length)
        if self._pool.free < needed and (
            self._pool.free + self._prefix.evictable() < needed
            or not self._prefix.make_room(needed)
        ):
            self._prefix.return_slot(slot)
            return Fetched(reason="budget", known=state.length)
        fresh = self._pool.take(needed)
        began = self._clock()
        try:
            first = self._load(state, slot, fresh, shared)
        except Missing as missing:
            # Nobody has seen the slot or the pages yet.
            self._prefix.return_slot(slot)
            self._pool.give_back(fresh)
            reason = "disk_corrupt" if missing.corrupt else "evicted"
            return Fetched(reason=reason, known=state.length)
        self.load_time.note(nbytes, self._clock() - began)
        if base is not None and shared:
            first = max(first, min(base.mtp_first, shared * self._page_size))
        pages = [*(base.pages[:shared] if base else ()), *fresh]
        snapshot = self._prefix.insert(
            ids[: state.length], slot=slot, pages=pages, mtp_first=first, why=state.why
        )
        self._pool.give_back(fresh)  # the snapshot holds them now
        self.store.counts["loaded"] += 1
        return Fetched(snapshot=snapshot, known=state.length)

    def _load(self, state: DiskState, slot: int, fresh: Sequence[int], shared: int) -> int:
        """Fill slot and pages; returns the first position from which all MTP rows are there."""
        data, tail = self.store.load_state(state)
        first = state.mtp_first
        for number in range(shared, len(state.path)):
            page, rows_from = self.store.load_page(state, number)
            if rows_from > max(number * self._page_size, 1):
                first = max(first, rows_from)
            self._slots.load_page(fresh[number - shared], page)
        if tail:
            self._slots.load_page(fresh[-1], tail)
        self._slots.load_slot(slot, state.length, data)
        return first
