"""Numbers in plain sentences: sums, products, counting, comparing, small word problems.

Each exercise has a worked trace for thinking mode and a short answer for plain mode. One operand
pair in ten (by hash) is kept for evaluation and never generated for training, in any wording.
"""

import hashlib
from dataclasses import dataclass
from random import Random

from recipes.mini.chats import Chat, single


@dataclass(frozen=True, kw_only=True, slots=True)
class Exercise:
    """A question, how to work it out, and what to say."""

    kind: str
    question: str
    trace: str
    answer: str
    """The sentence to say."""
    value: str
    """What a checker looks for in the sentence."""


_NAMES = ("Tom", "Anna", "Ben", "Lily", "Sam", "Mia", "Max", "Sara", "Tim", "Lucy", "Jack", "Emma")
_THINGS = (
    "apples",
    "books",
    "balls",
    "cookies",
    "stars",
    "eggs",
    "cups",
    "pens",
    "shells",
    "cards",
)
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
          "eleven", "twelve")  # fmt: skip


def is_held_out(a: int, b: int) -> bool:
    """Whether the unordered pair is kept for evaluation. Sums of two digits are never held out."""
    if max(a, b) < 10:
        return False
    low, high = sorted((a, b))
    return hashlib.sha256(f"{low},{high}".encode()).digest()[0] < 26


def addition(a: int, b: int) -> Exercise:
    """``a + b``, digit by digit from the right."""
    clauses, carry = [], 0
    low_first = (str(a)[::-1], str(b)[::-1])
    places = max(len(digits) for digits in low_first)
    for place in range(places):
        x, y = (int(d[place]) if place < len(d) else 0 for d in low_first)
        total = x + y + carry
        plus = f" + {carry}" if carry else ""
        step = f"{x} + {y}{plus} = {total}"
        carry = total // 10
        if place < places - 1:
            step += f", write {total % 10}, carry {carry}"
        clauses.append(step)
    trace = f"{a} + {b}: " + "; ".join(clauses) + f". So {a + b}."
    return Exercise(
        kind="add",
        question=f"{a} + {b}",
        trace=trace,
        answer=f"{a} + {b} = {a + b}.",
        value=str(a + b),
    )


def subtraction(a: int, b: int) -> Exercise:
    """``a - b`` for ``a >= b``, digit by digit from the right, borrowing where needed."""
    assert a >= b, (a, b)
    clauses, borrow = [], 0
    low_a, low_b = str(a)[::-1], str(b)[::-1]
    for place in range(len(low_a)):
        x = int(low_a[place])
        y = int(low_b[place]) if place < len(low_b) else 0
        minus = f" - {borrow}" if borrow else ""
        left = x - y - borrow
        if left < 0:
            clauses.append(f"{x} - {y}{minus} borrow, {x + 10} - {y}{minus} = {left + 10}")
        else:
            clauses.append(f"{x} - {y}{minus} = {left}")
        borrow = int(left < 0)
    trace = f"{a} - {b}: " + "; ".join(clauses) + f". So {a - b}."
    return Exercise(
        kind="subtract",
        question=f"{a} - {b}",
        trace=trace,
        answer=f"{a} - {b} = {a - b}.",
        value=str(a - b),
    )


def product(a: int, b: int) -> Exercise:
    """``a * b`` with a one-digit ``b``: the tens and ones of ``a`` apart, then their sum."""
    tens, ones = a // 10 * 10, a % 10
    if tens and ones:
        trace = f"{a} x {b}: {tens} x {b} = {tens * b}; {ones} x {b} = {ones * b}; "
        trace += f"{tens * b} + {ones * b} = {a * b}. So {a * b}."
    else:
        trace = f"{a} x {b} = {a * b}."
    return Exercise(
        kind="multiply",
        question=f"{a} x {b}",
        trace=trace,
        answer=f"{a} x {b} = {a * b}.",
        value=str(a * b),
    )


_ASK = (
    "What is {q}?",
    "{q}",
    "{q} = ?",
    "How much is {q}?",
    "Calculate {q}.",
    "Please work out {q}.",
)
_WORDED = {"+": " plus ", "-": " minus ", "x": " times "}


def _operands(rng: Random) -> tuple[int, int]:
    """Mostly small numbers; two digits often, three digits sometimes."""
    top_a, top_b = rng.choice(
        ((9, 9), (9, 9), (20, 9), (99, 9), (99, 99), (99, 99), (999, 99), (999, 999))
    )
    while True:
        a, b = rng.randint(0, top_a), rng.randint(0, top_b)
        if not is_held_out(a, b):
            return a, b


def calculation(rng: Random) -> Exercise:
    """A bare sum, difference or product in one of several wordings."""
    a, b = _operands(rng)
    choice = rng.random()
    if choice < 0.5:
        work = addition(a, b)
    elif choice < 0.8:
        work = subtraction(max(a, b), min(a, b))
    else:
        while True:
            a, b = rng.randint(0, rng.choice((9, 9, 12, 99))), rng.randint(0, 9)
            if not is_held_out(a, b):
                break
        work = product(a, b)
    question = work.question
    symbol = next(s for s in _WORDED if f" {s} " in question)
    if rng.random() < 0.2:
        question = question.replace(f" {symbol} ", _WORDED[symbol])
    elif rng.random() < 0.2:
        question = question.replace(" ", "")
    if symbol == "x" and rng.random() < 0.5:
        question = question.replace("x", "*")
    return Exercise(
        kind=work.kind,
        question=rng.choice(_ASK).format(q=question),
        trace=work.trace,
        answer=work.answer,
        value=work.value,
    )


def word_problem(rng: Random) -> Exercise:
    """Somebody has things, gets or gives some; the trace names the sum."""
    name, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    a, b = rng.randint(2, 12), rng.randint(1, 9)
    kind = rng.randrange(4)
    if kind == 0:
        text = f"{name} has {a} {thing}. {other} gives {name} {b} more {thing}."
        ask, value, work = f"How many {thing} does {name} have now?", a + b, f"{a} + {b} = {a + b}"
        answer = f"{name} has {value} {thing} now."
    elif kind == 1:
        a = max(a, b + 1)
        text = f"{name} has {a} {thing}. {name} gives {b} {thing} to {other}."
        ask, value, work = f"How many {thing} does {name} have left?", a - b, f"{a} - {b} = {a - b}"
        answer = f"{name} has {value} {thing} left."
    elif kind == 2:
        text = f"There are {b} boxes. There are {a} {thing} in each box."
        ask, value, work = f"How many {thing} are there in all?", a * b, f"{b} x {a} = {a * b}"
        answer = f"There are {value} {thing} in all."
    else:
        text = f"{name} has {a} {thing} and {other} has {b} {thing}."
        ask, value, work = f"How many {thing} do they have together?", a + b, f"{a} + {b} = {a + b}"
        answer = f"They have {value} {thing} together."
    return Exercise(
        kind="word problem",
        question=f"{text} {ask}",
        trace=f"{work}.",
        answer=answer,
        value=str(value),
    )


def counting(rng: Random) -> Exercise:
    """Count up or down between two numbers."""
    low = rng.choice((1, 1, 1, 0, rng.randint(2, 60)))
    high = low + rng.randint(3, 15)
    if rng.random() < 0.75:
        numbers, phrase = range(low, high + 1), f"from {low} to {high}"
        if low == 1 and rng.random() < 0.4:
            phrase = f"to {high}"
    else:
        numbers, phrase = range(high, low - 1, -1), f"down from {high} to {low}"
    listed = ", ".join(map(str, numbers))
    ask = rng.choice(("Count {p}.", "Can you count {p}?", "Please count {p}."))
    return Exercise(
        kind="count",
        question=ask.format(p=phrase),
        trace="",
        answer=f"{listed}.",
        value=listed,
    )


def comparison(rng: Random) -> Exercise:
    """Which of two numbers is larger or smaller."""
    top = rng.choice((10, 100, 1000))
    a, b = rng.sample(range(top), 2)
    while is_held_out(a, b):
        a, b = rng.sample(range(top), 2)
    word, value = rng.choice((("larger", max(a, b)), ("smaller", min(a, b)), ("bigger", max(a, b))))
    return Exercise(
        kind="compare",
        question=f"Which number is {word}, {a} or {b}?",
        trace="",
        answer=f"{value} is {word} than {a + b - value}.",
        value=str(value),
    )


def neighbour(rng: Random) -> Exercise:
    """What comes after or before a number or a letter."""
    if rng.random() < 0.5:
        n = rng.randint(1, rng.choice((20, 100)))
        word, value = rng.choice((("after", n + 1), ("before", n - 1)))
        return Exercise(
            kind="neighbour",
            question=f"What number comes {word} {n}?",
            trace="",
            answer=f"The number {value} comes {word} {n}.",
            value=str(value),
        )
    place = rng.randrange(1, 25)
    word, step = rng.choice((("after", 1), ("before", -1)))
    letter, value = chr(65 + place), chr(65 + place + step)
    return Exercise(
        kind="neighbour",
        question=f"What letter comes {word} {letter}?",
        trace="",
        answer=f"The letter {value} comes {word} {letter}.",
        value=value,
    )


def number_word(rng: Random) -> Exercise:
    """A small sum asked in words."""
    a, b = rng.randint(0, 6), rng.randint(0, 6)
    return Exercise(
        kind="add",
        question=f"What is {_WORDS[a]} plus {_WORDS[b]}?",
        trace=f"{a} + {b} = {a + b}.",
        answer=f"{_WORDS[a].capitalize()} plus {_WORDS[b]} is {_WORDS[a + b]}.",
        value=_WORDS[a + b],
    )


_KINDS = (
    (calculation, 12),
    (word_problem, 4),
    (counting, 2),
    (comparison, 2),
    (neighbour, 1),
    (number_word, 1),
)


def exercise(rng: Random) -> Exercise:
    """One exercise of a random kind."""
    makers, weights = zip(*_KINDS, strict=True)
    return rng.choices(makers, weights)[0](rng)


def arithmetic_chat(rng: Random) -> Chat:
    """An exercise as a chat: thinking, told not to think, or answered with the block in the
    prompt.
    """
    work = exercise(rng)
    mode = rng.random()
    if not work.trace:
        return single(work.question, work.answer)
    if mode < 0.6:
        question = work.question + (" /think" if mode < 0.04 else "")
        return single(question, work.answer, reasoning=work.trace)
    if mode < 0.66:
        return single(work.question + " /no_think", work.answer)
    return single(work.question, work.answer, forced_block=True)


def arithmetic_text(rng: Random) -> str:
    """A few lines of worked numbers for pretraining."""
    lines = []
    for _ in range(rng.randint(4, 10)):
        work = exercise(rng)
        lines.append(rng.choice((work.trace or work.answer, f"{work.question} {work.answer}")))
    return "\n".join(lines)
