"""Two-step word problems, comparing, sorting, counting and last letters, with worked traces."""

from collections.abc import Callable
from random import Random

from qnext.data.generate.arithmetic import added, may_train, multiplied, subtracted
from qnext.data.generate.exercise import Exercise, is_held_out

NAMES = ("Tom", "Anna", "Ben", "Lily", "Sam", "Mia", "Max", "Sara", "Tim", "Lucy", "Jack", "Emma",
         "Leo", "Nina", "Paul", "Rosa")  # fmt: skip
THINGS = ("apples", "books", "balls", "cookies", "stickers", "eggs", "cups", "pens", "shells",
          "cards", "coins", "stones", "flowers", "stamps")  # fmt: skip
BOXES = ("boxes", "bags", "baskets", "rows", "shelves")
WORDS = (
    "apple", "banana", "river", "mountain", "window", "garden", "summer", "winter", "letter",
    "yellow", "purple", "orange", "rabbit", "kitten", "puppy", "butter", "pepper", "coffee",
    "little", "middle", "bottle", "rocket", "pocket", "button", "cotton", "ribbon", "school",
    "teacher", "student", "kitchen", "chicken", "morning", "evening", "thunder", "weather",
    "feather", "father", "mother", "brother", "sister", "village", "bridge", "castle", "forest",
    "animal", "monkey", "turtle", "tiger", "zebra", "elephant", "giraffe", "penguin", "dolphin",
    "whale", "spider", "butterfly", "planet", "star", "moon", "cloud", "rain", "snow", "street",
    "house",
)  # fmt: skip


def _step(a: int, sign: str, b: int) -> tuple[str, int]:
    """One worked step and its result."""
    if sign == "+":
        return f"{a}+{b}: {added(a, b)}", a + b
    if sign == "-":
        return f"{a}-{b}: {subtracted(a, b)}", a - b
    return f"{a}×{b}: {multiplied(a, b)}", a * b


def _story(
    rng: Random, kind: str, *, held_out: bool
) -> tuple[str, list[tuple[int, str, int]], str, tuple[int, ...]]:
    """(text and question, steps, form of the answer, operands) of one kind."""
    while True:
        name, other = rng.sample(NAMES, 2)
        thing, box = rng.choice(THINGS), rng.choice(BOXES)
        a, b, c = rng.randint(11, 99), rng.randint(3, 60), rng.randint(2, 50)
        if kind == "gain and loss":
            text = (
                f"{name} has {a} {thing}. {other} gives {name} {b} more. Then {name} loses {c}. "
                f"How many {thing} does {name} have now?"
            )
            steps = [(a, "+", b), (a + b, "-", c)]
            says = f"{name} has {{}} {thing} now."
        elif kind == "groups and more":
            a, b = rng.randint(11, 49), rng.randint(2, 9)
            text = (
                f"There are {b} {box} with {a} {thing} in each. {name} brings {c} more {thing}. "
                f"How many {thing} are there in all?"
            )
            steps = [(a, "×", b), (a * b, "+", c)]
            says = f"There are {{}} {thing} in all."
        elif kind == "groups and less":
            a, b = rng.randint(11, 49), rng.randint(2, 9)
            text = (
                f"{name} fills {b} {box} with {a} {thing} each and gives {c} {thing} to {other}. "
                f"How many {thing} are left?"
            )
            steps = [(a, "×", b), (a * b, "-", c)]
            says = f"There are {{}} {thing} left."
        elif kind == "more than":
            text = (
                f"{name} has {a} {thing}. {other} has {b} more than {name}. "
                f"How many {thing} do they have together?"
            )
            steps = [(a, "+", b), (a + b, "+", a)]
            says = f"They have {{}} {thing} together."
            c = a
        else:
            a, b = rng.randint(11, 29), rng.randint(2, 6)
            c = rng.randint(a * b + 1, 199)
            text = (
                f"{name} buys {b} {thing} for {a} coins each and pays with {c} coins. "
                f"How many coins does {name} get back?"
            )
            steps = [(a, "×", b), (c, "-", a * b)]
            says = f"{name} gets {{}} coins back."
        if any(x < y for x, sign, y in steps if sign == "-"):
            continue
        if not held_out and not all(may_train(x, sign, y) for x, sign, y in steps):
            continue
        if is_held_out(a, b, c) == held_out:
            return text, steps, says, (a, b, c)


WORD_PROBLEMS = ("gain and loss", "groups and more", "groups and less", "more than", "change")


def word_problem(rng: Random, kind: str | None = None, *, held_out: bool = False) -> Exercise:
    """Two steps about things, coins and boxes; ``kind`` is one of ``WORD_PROBLEMS``."""
    kind = kind or rng.choice(WORD_PROBLEMS)
    text, steps, says, _ = _story(rng, kind, held_out=held_out)
    worked = []
    result = 0
    for number, (a, sign, b) in enumerate(steps, 1):
        clause, result = _step(a, sign, b)
        worked.append(f"step {number}: {clause}")
    return Exercise(
        kind="word problem",
        difficulty=kind,
        question=text,
        trace=". ".join(worked),
        answer=says.format(result),
        value=str(result),
    )


def comparison(rng: Random, *, held_out: bool = False) -> Exercise:
    """Which of two numbers is larger or smaller."""
    while True:
        digits = rng.choice((2, 3, 3, 4))
        a = rng.randint(10 ** (digits - 1), 10**digits - 1)
        b = rng.randint(10, 10**digits - 1) if rng.random() < 0.3 else a + rng.randint(-40, 40)
        if a != b and b > 0 and is_held_out(a, b) == held_out:
            break
    word = rng.choice(("larger", "smaller"))
    value = max(a, b) if word == "larger" else min(a, b)
    x, y = str(a), str(b)
    if len(x) != len(y):
        why = f"{a} has {len(x)} digits, {b} has {len(y)}"
    else:
        at = next(n for n in range(len(x)) if x[n] != y[n])
        same = f"{' '.join(x[:at])} same, " if at else ""
        why = f"{same}{x[at]} {'>' if x[at] > y[at] else '<'} {y[at]}"
    return Exercise(
        kind="compare",
        difficulty=f"{max(len(x), len(y))} digits",
        question=f"Which number is {word}, {a} or {b}?",
        trace=f"{a} and {b}: {why}, so {a} {'>' if a > b else '<'} {b}",
        answer=f"The {word} number is {value}.",
        value=str(value),
    )


def sorting(rng: Random, *, held_out: bool = False) -> Exercise:
    """Three to five numbers from smallest to largest."""
    while True:
        count = rng.randint(3, 5)
        numbers = rng.sample(range(1, rng.choice((20, 100))), count)
        # 100 is no operand: with it, lists of single digits can be held out too.
        if is_held_out(*numbers, 100) == held_out:
            break
    left, clauses = list(numbers), []
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        clauses.append(f"smallest {least}, left {' '.join(map(str, left))}")
    result = sorted(numbers)
    return Exercise(
        kind="sort",
        difficulty=f"{count} numbers",
        question=f"Sort these numbers from smallest to largest: {', '.join(map(str, numbers))}.",
        trace="; ".join(clauses),
        answer=", ".join(map(str, result)) + ".",
        value=" ".join(map(str, result)),
        verifier="numbers",
    )


def letters(rng: Random, *, held_out: bool = False) -> Exercise:
    """How often a letter stands in a word, or the last letter of each of two words."""
    if rng.random() < 0.5:
        while True:
            word = rng.choice(WORDS)
            letter = rng.choice(word)
            if is_held_out(word, letter) == held_out:
                break
        count, marks = 0, []
        for one in word:
            count += one == letter
            marks.append(f"{one} {count}" if one == letter else one)
        times = "times" if count > 1 else "time"
        return Exercise(
            kind="letters",
            difficulty="count",
            question=f'How many times does the letter {letter} stand in "{word}"?',
            trace=f"{' '.join(marks)} → {count}",
            answer=f'The letter {letter} stands {count} {times} in "{word}".',
            value=str(count),
        )
    while True:
        words = rng.sample(WORDS, 2)
        if is_held_out(*words) == held_out:
            break
    last = "".join(one[-1] for one in words)
    spelled = "; ".join(f"{' '.join(one)} → {one[-1]}" for one in words)
    return Exercise(
        kind="letters",
        difficulty="last letters",
        question=f'Take the last letters of "{words[0]}" and "{words[1]}" and put them together.',
        trace=spelled,
        answer=f"The letters are {last}",
        value=last,
        verifier="last word",
    )


def counting(rng: Random, *, held_out: bool = False) -> Exercise:
    """How many times a thing stands in a list."""
    while True:
        kinds = rng.sample(("apple", "pear", "cup", "ball", "book", "star", "hat", "key"), 3)
        things = [rng.choice(kinds) for _ in range(rng.randint(4, 9))]
        if is_held_out(*things) == held_out:
            break
    asked = rng.choice(kinds)
    count, marks = 0, []
    for one in things:
        count += one == asked
        marks.append(f"{one} {count}" if one == asked else one)
    return Exercise(
        kind="count",
        difficulty=f"{len(things)} things",
        question=f"How many times does the word {asked} stand in this list? {', '.join(things)}",
        trace=f"{', '.join(marks)} → {count}",
        answer=f"The word {asked} stands there {count} times.".replace("1 times", "1 time"),
        value=str(count),
    )


SMALL: tuple[tuple[Callable[..., Exercise], int], ...] = (
    (comparison, 3), (sorting, 3), (letters, 2), (counting, 2),
)  # fmt: skip


def small(rng: Random, *, held_out: bool = False) -> Exercise:
    """One of the shorter kinds."""
    makers, weights = zip(*SMALL, strict=True)
    return rng.choices(makers, weights)[0](rng, held_out=held_out)
