"""Text streamed from ids equals the text of all ids, wherever the stream is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import TokenizerError
from qnext.text.tokenizer import Detokenizer


def ids_of_bytes(tokenizer, data):
    """One id per byte, so that every cut of a character can be tried."""
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    return [by_byte[bytes([byte])] for byte in data]


def cut(items, points):
    edges = [0, *sorted(point % (len(items) + 1) for point in points), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]


@given(
    ids=st.lists(st.integers(0, 499), max_size=40),
    points=st.lists(st.integers(0, 40), max_size=8),
    skip_special=st.booleans(),
)
def test_streamed_pieces_make_the_whole_for_any_ids_and_any_cut(tiny, ids, points, skip_special):
    stream = Detokenizer(tiny, skip_special=skip_special)
    pieces = [stream.push(piece) for piece in cut(ids, points)]
    assert "".join(pieces) + stream.finish() == tiny.decode(ids, skip_special=skip_special)


@given(data=st.binary(max_size=24), points=st.lists(st.integers(0, 24), max_size=8))
def test_streamed_pieces_make_the_whole_for_any_bytes_and_any_cut(tiny, data, points):
    ids = ids_of_bytes(tiny, data)
    stream = Detokenizer(tiny)
    pieces = [stream.push(piece) for piece in cut(ids, points)]
    assert "".join(pieces) + stream.finish() == data.decode("utf-8", errors="replace")


@given(data=st.binary(max_size=16), more=st.binary(max_size=8))
def test_what_was_pushed_out_never_changes(tiny, data, more):
    stream = Detokenizer(tiny)
    out = "".join(stream.push([i]) for i in ids_of_bytes(tiny, data))
    assert (data + more).decode("utf-8", errors="replace").startswith(out)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_every_character_comes_out_with_its_last_byte(tiny, text):
    stream = Detokenizer(tiny)
    for character in text:
        *first, last = ids_of_bytes(tiny, character.encode("utf-8"))
        assert stream.push(first) == ""
        assert stream.push([last]) == character
    assert stream.finish() == ""


def test_pushing_one_id_at_a_time_tells_what_each_completes(tiny):
    ids = tiny.encode("Hi 你<|im_end|>")
    stream = Detokenizer(tiny)
    pieces = [stream.push([i]) for i in ids]
    assert "".join(pieces) == "Hi 你<|im_end|>"
    assert pieces[-1] == "<|im_end|>"


def test_an_unfinished_character_becomes_one_replacement_at_the_end(tiny):
    stream = Detokenizer(tiny)
    assert stream.push(ids_of_bytes(tiny, "😀".encode()[:3])) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(tiny.encode("next text")) == "next text"


def test_an_unfinished_character_is_given_up_when_a_control_token_follows(tiny):
    stream = Detokenizer(tiny)
    stream.push(ids_of_bytes(tiny, "é".encode()[:1]))
    assert stream.push([tiny.added_tokens["</think>"]]) == "\ufffd</think>"


def test_an_undefined_id_takes_in_nothing(tiny):
    stream = Detokenizer(tiny)
    with pytest.raises(TokenizerError, match="token id 500 is not defined"):
        stream.push([*tiny.encode("Hi"), 500])
    assert stream.push(tiny.encode("Hello")) == "Hello"
