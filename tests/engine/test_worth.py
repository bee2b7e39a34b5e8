"""Which snapshot goes first: what it would take to get it back, per byte that only it holds."""

import pytest

from qnext.engine.blocks import PagePool
from qnext.engine.prefix import PrefixCache
from qnext.engine.worth import HALF_LIFE_S, PrefillTime

PAGE = 64
SHARE = 1e-3


class Shelf:
    """A prefix cache whose pages are made up as a sequence would hold them."""

    def __init__(self, *, slots: int = 8, share: float = 0.0, state_bytes=1000, page_bytes=1000):
        self.now = 0.0
        self.pool = PagePool(1000)
        self.cache = PrefixCache(
            self.pool, range(slots), clock=lambda: self.now,
            prefill=PrefillTime(context_share=share), state_bytes=state_bytes,
            page_bytes=page_bytes,
        )  # fmt: skip

    def plant(self, ids, *, after=None, why="stable"):
        """A snapshot at the end of ``ids``; pages before ``after`` are those of that snapshot."""
        full = after.length // PAGE if after else 0
        shared = after.pages[:full] if after else []
        fresh = self.pool.take(-(-len(ids) // PAGE) - full)
        slot = self.cache.take_slot()
        assert slot is not None
        snapshot = self.cache.insert(ids, slot=slot, pages=[*shared, *fresh], mtp_first=1, why=why)
        self.pool.give_back(fresh)  # the sequence has ended: only the snapshot holds them
        return snapshot

    def next_victim(self):
        before = list(self.cache)
        assert self.cache._evict_one()
        [gone] = set(before) - set(self.cache)
        return gone


def text(seed: int, length: int) -> list[int]:
    return [seed * 100_000 + i for i in range(length)]


def test_a_long_prefix_right_after_another_is_cheap_to_get_back():
    """By whole length 1010 would be worth five times 200; but it is ten tokens after 1000."""
    shelf = Shelf()
    long = text(1, 1010)
    first = shelf.plant(long[:1000], why="system")
    second = shelf.plant(long, after=first)
    alone = shelf.plant(text(2, 200))
    assert shelf.next_victim() is second
    assert set(shelf.cache) == {first, alone}


def test_when_the_snapshot_before_goes_the_next_becomes_dear():
    shelf = Shelf()
    long = text(1, 1010)
    first = shelf.plant(long[:1000])
    second = shelf.plant(long, after=first)
    cheap = shelf.cache.worth(second)
    shelf.cache.evict(first)
    # It takes 1010 tokens to get back now, and holds all its pages alone.
    expected = cheap * 1010 / 10 * (1000 + 1000 * 1) / (1000 + 1000 * 16)
    assert shelf.cache.worth(second) - second.floor == pytest.approx(expected)


@pytest.mark.parametrize("state_bytes", [100, 1_000_000])
def test_memory_is_counted_in_bytes_of_state_and_of_pages(state_bytes):
    """A state of a hundred pages makes pages cheap: then the longer one is worth its room."""
    shelf = Shelf(state_bytes=state_bytes, page_bytes=10_000)
    short, long = shelf.plant(text(1, 64)), shelf.plant(text(2, 640), why="end")
    # Seconds per byte: 64 tokens for a state and a page, 640 for a state and ten, half as likely.
    assert shelf.next_victim() is (long if state_bytes == 100 else short)


def test_pages_that_running_sequences_hold_are_not_freed_and_do_not_count():
    shelf = Shelf()
    one, other = shelf.plant(text(1, 640)), shelf.plant(text(2, 640))
    shelf.pool.share(other.pages)  # a running sequence
    assert shelf.cache.worth(other) > 5 * shelf.cache.worth(one)
    assert shelf.next_victim() is one


def test_the_end_of_a_long_prompt_is_dearer_than_the_beginning_of_a_short_one():
    shelf = Shelf(share=SHARE)
    long = text(1, 6400)
    first = shelf.plant(long[:5760], why="system")
    deep = shelf.plant(long, after=first)
    flat = shelf.plant(text(2, 640))
    # The same 640 tokens and ten pages each; those of ``deep`` look at 6000 more.
    assert shelf.cache.worth(deep) > 4 * shelf.cache.worth(flat)
    assert shelf.next_victim() is flat


def test_what_is_not_used_falls_behind_with_time():
    """A high worth of long ago must not hold its place for ever: victims raise the floor."""
    shelf = Shelf(slots=2)
    old = shelf.plant(text(1, 640), why="system")
    for number in range(2, 40):
        shelf.plant(text(number, 320), why="end")
        if old not in shelf.cache:
            break
    # Its worth is 2.7 times theirs, so it outlives two of them and not many more.
    assert 4 <= number <= 6


def test_uses_count_and_fade():
    shelf = Shelf()
    used, fresh = shelf.plant(text(1, 64)), shelf.plant(text(2, 64))
    shelf.cache.use(used)
    assert shelf.cache.worth(used) > 2 * shelf.cache.worth(fresh)
    shelf.now += 20 * HALF_LIFE_S
    assert shelf.cache.worth(used) == pytest.approx(shelf.cache.worth(fresh), rel=1e-3)


def test_for_pages_a_snapshot_goes_that_has_some():
    shelf = Shelf()
    long = text(1, 1000)
    first = shelf.plant(long[:896], why="end")
    deep = shelf.plant(long, after=first, why="system")
    # Nearly worthless, but all its pages are the other's too: giving it up frees none.
    assert shelf.pool.exclusive(first.pages) == 0
    assert shelf.cache.make_room(shelf.pool.free + 1)
    assert set(shelf.cache) == {first}
    assert deep.pages[:14] == first.pages


class TestPrefillTime:
    def test_both_rates_are_found_where_steps_tell_them_apart(self):
        time = PrefillTime()
        for start in (0, 100, 1000, 5000, 300):
            tokens, contexts = 64, sum(range(start + 1, start + 65))
            time.note([(start, start + 64)], 1e-3 * tokens + 1e-6 * contexts)
        assert time.seconds(0, 1) == pytest.approx(1e-3 + 1e-6)
        assert time.seconds(10, 20) == pytest.approx(1e-2 + 1e-6 * sum(range(11, 21)))

    def test_steps_that_are_all_alike_leave_the_ratio_to_the_arithmetic(self):
        time = PrefillTime(context_share=SHARE)
        for _ in range(5):
            time.note([(0, 100)], 2.0)
        assert time.seconds(0, 100) == pytest.approx(2.0)
        near, far = time.seconds(0, 1), time.seconds(10_000, 10_001)
        assert far / near == pytest.approx((1 + 10_001 * SHARE) / (1 + SHARE))

    def test_a_clock_that_stands_still_and_one_that_jumps_back_give_positive_times(self):
        time = PrefillTime(context_share=SHARE)
        assert time.seconds(0, 10) > 0
        for seconds in (0.0, -1.0, 0.0):
            time.note([(0, 10), (50, 70)], seconds)
            assert time.seconds(3, 4) > 0
            assert time.seconds(5, 5) == 0

    def test_newer_steps_count_more(self):
        time = PrefillTime()
        for seconds in [1.0] * 50 + [3.0] * 200:
            time.note([(0, 10)], seconds)
        assert time.seconds(0, 10) == pytest.approx(3.0, rel=0.05)
