"""The machine that knows where in an answer a token stands, on ids and on text."""

import pytest

from qnext.engine.regions import Regions, Tag

NAMES = ("<think>", "</think>", "<tool_call>", "</tool_call>")
NEWLINE, TWO = 10, 11


def regions(*, ids: bool, **settings) -> Regions:
    """Tokens 0 ... 3 are the tags; with ``ids=False`` their characters are tokens of their own."""
    think, end, call, back = (
        Tag(text=text.encode(), id=i if ids else None) for i, text in enumerate(NAMES)
    )
    return Regions(
        think=(think, end), tool=(call, back), newlines={NEWLINE: 1, TWO: 2},
        spell=lambda token: b"\n\n" if token == TWO else bytes([token]), **settings,
    )  # fmt: skip


def spelled(text: str) -> list[int]:
    return list(text.encode())


def follow(machine: Regions, tokens) -> str:
    """First letters of the regions after each token."""
    state, found = machine.start(), ""
    for token in tokens:
        state = machine.next(state, token)
        found += state.region[0]
    return found


@pytest.mark.parametrize(
    ("starts_in", "tokens", "found"),
    [
        ("reasoning", [65, 65, 1, TWO, 65], "rrccc"),
        ("reasoning", [65, 2, 65, 3, 65], "rttcc"),  # a call ends the reasoning for good
        ("content", [0, 65, 1, 65, 0, 65], "rrcccc"),  # a block at the start only
        ("content", [NEWLINE, 0, 65], "crr"),
        ("content", [65, 0, 65], "ccc"),
        ("content", [2, 65, 1, 0, 3, 2], "ttttct"),  # no other tag counts inside a call
    ],
)
def test_tags_that_are_tokens(starts_in, tokens, found):
    assert follow(regions(ids=True, starts_in=starts_in), tokens) == found


def test_tags_in_text_change_the_region_behind_their_last_character():
    machine = regions(ids=False, starts_in="reasoning")
    text = "ab</thi</think>c<tool_call>x</think></tool_call>d"
    found = follow(machine, spelled(text))
    assert found.index("c") == text.index("</think>") + len("</think>") - 1
    assert found.index("t") == text.index("<tool_call>") + len("<tool_call>") - 1
    assert found.rindex("t") == text.index("</tool_call>") + len("</tool_call>") - 2
    assert found[-1] == "c"


def test_spelled_tags_are_text_where_the_vocabulary_has_tokens_for_them():
    assert set(follow(regions(ids=True, starts_in="reasoning"), spelled("</think>"))) == {"r"}


def test_reasoning_is_counted_without_tags_and_stays_counted():
    machine = regions(ids=True)
    state = machine.start()
    for token in (0, NEWLINE, 65, 65, 1, TWO, 65, 66):
        state = machine.next(state, token)
    assert state.thought == 3
    assert state.said
    assert state.lead is None


def test_an_answer_that_may_not_think_has_no_block():
    assert follow(regions(ids=True, may_think=False), [0, 65]) == "cc"
