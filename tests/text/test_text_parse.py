"""Reasoning and stop strings in streamed text: any cut gives what the whole gives."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import RequestError
from qnext.text.parse import ReasoningParser, StopMatcher

FRAGMENTS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "\n",
    "\n\n",
    "a",
    "b ",
    "<",
    "</",
    "<t",
    "think>",
    "</thin",
]
ANSWERS = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)
POINTS = st.lists(st.integers(0, 60), max_size=8)


def cut(text, points):
    edges = [0, *sorted(point % (len(text) + 1) for point in points), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def split(pieces, *, inside=False):
    """(reasoning, content) of an answer that arrives in these pieces."""
    parser = ReasoningParser(inside)
    out = [piece for text in pieces for piece in parser.push(text)]
    out += parser.finish()
    assert all(text for _, text in out)
    kinds = [kind for kind, _ in out]
    assert kinds == sorted(kinds, reverse=True), "content never comes before reasoning"
    return tuple(
        "".join(text for kind, text in out if kind == want) for want in ("reasoning", "content")
    )


@given(text=ANSWERS, points=POINTS, inside=st.booleans())
def test_any_cut_of_an_answer_splits_like_the_whole(text, points, inside):
    assert split(cut(text, points), inside=inside) == split([text], inside=inside)


@given(text=ANSWERS, inside=st.booleans())
def test_single_characters_split_like_the_whole(text, inside):
    assert split(list(text), inside=inside) == split([text], inside=inside)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nR\n</think>\n\nA", False, "R", "A"),
        ("R\n</think>\n\nA", True, "R", "A"),
        ("<think>\nR\n</think>\n\nA", True, "R", "A"),
        ("<think>\n\n</think>\n\nA", False, "", "A"),
        ("\n<think>R</think>A\n", False, "R", "A\n"),
        ("A", False, "", "A"),
        ("\n\nA", False, "", "\n\nA"),
        ("A <think> in </think> text", False, "", "A <think> in </think> text"),
        ("<think>\nR1\n\nR2\n</think>\n\nA\n\nB", False, "R1\n\nR2", "A\n\nB"),
        ("R and <think> again</think>A", True, "R and <think> again", "A"),
        ("R</think>A</think>B", True, "R", "AB"),
        ("R</think>\n\n</think>\n\nA", True, "R", "A"),
        ("R\n<tool_call>\n{}\n</tool_call>", True, "R", "<tool_call>\n{}\n</tool_call>"),
        ("R</think>\n\n<tool_call>\n{}", True, "R", "<tool_call>\n{}"),
        ("<tool_call>\n{}", False, "", "<tool_call>\n{}"),
        ("never closed\n", True, "never closed\n", ""),
        ("<think>\nnever closed </thi", False, "never closed </thi", ""),
        ("R</think>", True, "R", ""),
        ("R</think>\n\n", True, "R", ""),
        ("R</think>A </thi", True, "R", "A </thi"),
        ("<thi", False, "", "<thi"),
        ("\n<thi", True, "<thi", ""),
        ("", True, "", ""),
        ("\n\n", True, "", ""),
        ("\n\n", False, "", "\n\n"),
        ("<think>", False, "", ""),
    ],
)
def test_reasoning_and_content(text, inside, reasoning, content):
    assert split([text], inside=inside) == (reasoning, content)


@given(text=st.text(st.sampled_from("ab<>/ \n"), min_size=1))
def test_an_answer_without_tags_is_content_unchanged(text):
    assert split([text]) == ("", text)


def test_text_is_given_out_as_soon_as_it_is_certain():
    parser = ReasoningParser(True)
    assert parser.push("first ") == [("reasoning", "first ")]
    assert parser.push("second\n") == [("reasoning", "second")]
    assert parser.push("third</th") == [("reasoning", "\nthird")]
    assert parser.in_reasoning
    assert parser.push("ink>\n") == []
    assert not parser.in_reasoning
    assert parser.push("\nanswer") == [("content", "answer")]
    assert parser.finish() == []


def test_one_push_gives_neighbours_of_different_kinds():
    parser = ReasoningParser(False)
    pieces = parser.push("<think>R</think>A</think>B")
    assert pieces == [("reasoning", "R"), ("content", "AB")]
    assert (pieces[0].kind, pieces[0].text) == ("reasoning", "R")


def test_where_a_parser_starts_is_known_before_any_text():
    assert ReasoningParser(True).in_reasoning
    assert not ReasoningParser(False).in_reasoning


# Stop strings.

STOPS = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=3)


def stop_by_characters(text, stops):
    """The definition, character by character: (text before, matched)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(text=st.text(st.sampled_from("abc"), max_size=20), stops=STOPS, points=POINTS)
def test_any_cut_stops_where_the_definition_stops(text, stops, points):
    matcher = StopMatcher(stops)
    emitted, matched = "", None
    before, expected = stop_by_characters(text, stops)
    for piece in cut(text, points):
        result = matcher.push(piece)
        emitted += result.emit
        matched = result.matched
        assert result.stopped == (matched is not None)
        assert before.startswith(emitted), "a part of a stop string got out"
    emitted += matcher.finish()
    assert (emitted, matched) == (before, expected)


def test_a_stop_string_over_three_pushes_is_not_leaked():
    matcher = StopMatcher(["<|im_end|>"])
    assert matcher.push("Hello <|im") == ("Hello ", False, None)
    assert matcher.push("_e") == ("", False, None)
    assert matcher.push("nd|> more") == ("", True, "<|im_end|>")
    assert matcher.push("still more") == ("", True, "<|im_end|>")
    assert matcher.finish() == ""


def test_what_only_began_like_a_stop_string_comes_out():
    matcher = StopMatcher(["STOP"])
    assert matcher.push("a ST").emit == "a "
    assert matcher.push("ART").emit == "START"
    assert matcher.push(" S").emit == " "
    assert matcher.finish() == "S"


def test_the_stop_string_that_is_complete_first_wins():
    assert StopMatcher(["bcd", "c"]).push("abcd") == ("ab", True, "c")
    assert StopMatcher(["c", "abc"]).push("abc") == ("", True, "abc")


def test_without_stop_strings_everything_passes():
    matcher = StopMatcher([])
    assert matcher.push("text") == ("text", False, None)
    assert matcher.finish() == ""


def test_one_stop_string_may_be_given_alone():
    assert StopMatcher("\n\n").push("a\n\nb") == ("a", True, "\n\n")


@pytest.mark.parametrize(
    ("stop", "message"), [(["a", ""], r"stop\[1\]: .*got ''"), ([3], r"stop\[0\]: .*got 3")]
)
def test_a_stop_string_must_have_characters(stop, message):
    with pytest.raises(RequestError, match=message):
        StopMatcher(stop)
