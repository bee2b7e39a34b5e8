"""Generators: answers are right, traces lead to them, held-out operands never appear."""

import re
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from qnext.data.generate import arithmetic, reasoning, recall, stories, tools
from qnext.data.generate.exercise import Exercise, is_held_out

NUMBER = st.integers(0, 999)


@given(NUMBER, NUMBER)
def test_every_clause_of_a_trace_is_true(a: int, b: int) -> None:
    low, high = sorted((a, b))
    for kind, pair in (
        ("add", (a, b)),
        ("subtract", (high, low)),
        ("multiply", (a % 100, b % 100)),
    ):
        made = arithmetic.exercise(kind, *pair)
        assert made.right(made.answer)
        assert re.split("[→>]", made.trace)[-1].strip() == made.value
        for left, right in re.findall(r"([\d+×-]+)=(\d+)", made.trace):
            assert eval(left.replace("×", "*")) == int(right), made.trace


def test_traces_are_written_as_documented() -> None:
    assert arithmetic.exercise("add", 517, 86).trace == (
        "517 + 86: 7+6=13 write 3 carry 1; 1+8+1=10 write 0 carry 1; 5+0+1=6 write 6. "
        "digits 3 0 6 → 603"
    )
    assert arithmetic.exercise("subtract", 304, 158).trace == (
        "304 - 158: 304≥158; 4-8 borrow: 14-8=6; 0-1-5 borrow: 10-1-5=4; 3-1-1=1. "
        "digits 6 4 1 → 146"
    )
    assert arithmetic.exercise("multiply", 47, 36).trace.startswith(
        "47 × 36: 47×6: 7×6=42 write 2 carry 4; 4×6+4=28 → 282; "
        "47×3: 7×3=21 write 1 carry 2; 4×3+2=14 → 141, shift → 1410; 282+1410: "
    )


def pairs_in(made: Exercise) -> set[tuple[int, int]]:
    found = re.findall(
        r"(\d+) ?(?:[+×x*-]|plus|minus|times) ?(\d+)", made.question + " | " + made.trace
    )
    return {(int(a), int(b)) for a, b in found}


def test_held_out_operands_are_never_trained() -> None:
    rng = Random(0)
    for _ in range(3000):
        for made in (arithmetic.calculation(rng), arithmetic.calculation(rng, thinking=False)):
            whole = {p for p in pairs_in(made) if max(p) > 9 and max(p) < 1000}
            assert not [p for p in whole if is_held_out(*p)], made
        for made in (reasoning.word_problem(rng), reasoning.small(rng)):
            assert made.right(made.answer), made
    shares = [is_held_out(a, b) for a in range(10, 99) for b in range(a)]
    assert 0.08 < sum(shares) / len(shares) < 0.12


def test_evaluation_asks_held_out_operands_only() -> None:
    rng = Random(1)
    for kind, digits in (("add", (3, 3)), ("subtract", (2, 2)), ("multiply", (2, 2))):
        for _ in range(50):
            assert is_held_out(*arithmetic.operands(rng, kind, digits, held_out=True))
    trained = {reasoning.word_problem(Random(n)).question for n in range(200)}
    asked = {reasoning.word_problem(Random(n), held_out=True).question for n in range(200)}
    assert not trained & asked


def test_wrong_answers_are_refused() -> None:
    rng = Random(2)
    for _ in range(200):
        made = reasoning.small(rng)
        wrong = made.answer.replace(made.value.split()[-1], "7777")
        assert not made.right(wrong), made
        assert not made.right("")
    made = arithmetic.exercise("add", 2, 3)
    assert made.right("5")
    assert not made.right("5 or 6")


def test_a_needle_stands_where_it_is_asked_to() -> None:
    sentences = [f"Sentence {n} is here." for n in range(100)]
    for depth in (0.0, 0.5, 1.0):
        made = recall.needle(Random(3), sentences, depth=depth, distractors=3, held_out=True)
        at = made.text.index(made.answer) / (len(made.text) - len(made.answer))
        assert abs(at - depth) < 0.03
        assert made.text.count("secret number") == 4
        assert made.right(made.answer)
        assert not made.right(made.others[0][1])
    with_split = {recall.name(Random(n), held_out=True) for n in range(50)}
    assert not with_split & {recall.name(Random(n), held_out=False) for n in range(500)}


def test_tool_tasks_check_the_exact_call() -> None:
    rng = Random(4)
    for _ in range(100):
        task = tools.tool_task(rng)
        names = [tool["function"]["name"] for tool in task.chat.tools]
        assert task.name in names
        assert task.right([{"name": task.name, "arguments": task.arguments}])
        assert not task.right([])
        assert not task.right([{"name": task.name, "arguments": {}}])


def test_haystacks_have_the_length_asked_for() -> None:
    text = " ".join(stories.haystack(Random(5), 5000))
    assert 4900 < len(text) < 5500
