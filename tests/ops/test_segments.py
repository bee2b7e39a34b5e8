"""Segments: every index table agrees with plain loops over the lengths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qnext.ops import Segments

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(LENGTHS)
def test_counts_and_borders(lengths):
    segments = Segments.of(lengths)
    assert segments.count == len(lengths)
    assert segments.total == sum(lengths)
    assert segments.longest == max(lengths)
    assert segments.starts == tuple(sum(lengths[:b]) for b in range(len(lengths) + 1))
    assert segments.cu_seqlens().tolist() == list(segments.starts)
    assert segments.cu_seqlens().dtype == torch.int32


@given(LENGTHS)
def test_ids_and_offsets(lengths):
    segments = Segments.of(lengths)
    assert segments.ids().tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert segments.offsets().tolist() == [t for n in lengths for t in range(n)]
    assert segments.ids().dtype == segments.offsets().dtype == torch.int64


@given(LENGTHS, st.integers(1, 4))
def test_windows_and_tails(lengths, history):
    """Rows are [saved inputs of all sequences ; packed tokens]; both tables name rows of these."""
    segments = Segments.of(lengths)
    saved = [[("saved", b, j) for j in range(history)] for b in range(len(lengths))]
    tokens = [[("token", b, t) for t in range(n)] for b, n in enumerate(lengths)]
    rows = [row for group in (*saved, *tokens) for row in group]
    windows = segments.window_table(history)
    tails = segments.tail_table(history)
    assert windows.shape == (sum(lengths), history)
    p = 0
    for b, n in enumerate(lengths):
        line = saved[b] + tokens[b]
        for t in range(n):
            assert [rows[i] for i in windows[p].tolist()] == line[t : t + history]
            p += 1
        assert [rows[i] for i in tails[b].tolist()] == line[len(line) - history :]


@given(LENGTHS, st.integers(1, 5))
def test_chunks(lengths, size):
    segments = Segments.of(lengths)
    table = segments.chunks(size)
    order = table.order.tolist()
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[b] for b in order] == sorted(lengths, reverse=True)
    want, active = [], []
    for first in range(0, max(lengths), size):
        lanes = [b for b in order if lengths[b] > first]
        active.append(len(lanes))
        for b in lanes:
            inside = range(first, min(first + size, lengths[b]))
            row = [segments.starts[b] + t for t in inside]
            want.append(row + [segments.total] * (size - len(row)))
    assert table.index.tolist() == want
    assert table.active == tuple(active)
    assert table.active == tuple(sorted(table.active, reverse=True))
    flat = table.index.flatten()
    assert flat[table.inverse].tolist() == list(range(segments.total))


def test_last_rows():
    assert Segments.of([3, 1, 5]).last_rows().tolist() == [2, 3, 8]
    with pytest.raises(AssertionError):
        Segments.of([3, 0]).last_rows()


def test_negative_lengths_are_refused():
    with pytest.raises(AssertionError):
        Segments.of([3, -1])


def test_no_sequences():
    segments = Segments.of([])
    assert (segments.count, segments.total, segments.longest) == (0, 0, 0)
    assert segments.starts == (0,)


def test_tables_are_built_once():
    segments = Segments.of([3, 2])
    assert segments.ids() is segments.ids()
    assert segments.chunks(4) is segments.chunks(4)
    assert segments.chunks(4) is not segments.chunks(5)
    assert segments.window_table(2) is not segments.window_table(3)


def test_equal_lengths_are_equal_segments():
    first, second = Segments.of([3, 2]), Segments.of([3, 2])
    first.ids()
    assert first == second
