"""Sums, differences and products, worked digit by digit from the right.

Every clause of a trace stands for itself: it names the digits it uses and the carry it leaves, so
that only a short memory is needed to write the next one.
"""

from random import Random

from qnext.data.generate.exercise import Exercise, is_held_out


def added(a: int, b: int) -> str:
    """``7+6=13 write 3 carry 1; 1+8+1=10 write 0 carry 1; 5+0+1=6 write 6. digits 3 0 6 → 603``"""
    clauses, digits, carry = [], [], 0
    places = max(len(str(a)), len(str(b)))
    for place in range(places):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        plus = f"+{carry}" if carry else ""
        last = place == places - 1
        if last:
            clauses.append(f"{x}+{y}{plus}={total} write {total}")
            digits += [str(total % 10)] + ([str(total // 10)] if total > 9 else [])
        else:
            carry = total // 10
            clauses.append(f"{x}+{y}{plus}={total} write {total % 10} carry {carry}")
            digits.append(str(total % 10))
    return "; ".join(clauses) + f". digits {' '.join(digits)} → {a + b}"


def subtracted(a: int, b: int) -> str:
    """``4-8 borrow: 14-8=6; 0-1-5 borrow: 10-1-5=4; 3-1-1=1. digits 6 4 1 → 146``, a >= b."""
    assert a >= b >= 0, (a, b)
    clauses, digits, borrow = [], [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        taken = f"-{borrow}" if borrow else ""
        left = x - y - borrow
        if left < 0:
            clauses.append(f"{x}{taken}-{y} borrow: {x + 10}{taken}-{y}={left + 10}")
        else:
            clauses.append(f"{x}{taken}-{y}={left}")
        digits.append(str(left % 10))
        borrow = int(left < 0)
    return "; ".join(clauses) + f". digits {' '.join(digits)} → {a - b}"


def times_digit(a: int, digit: int) -> str:
    """``7×6=42 write 2 carry 4; 4×6+4=28 → 282``, for a one-digit factor."""
    clauses, carry = [], 0
    places = len(str(a))
    for place in range(places):
        x = a // 10**place % 10
        total = x * digit + carry
        plus = f"+{carry}" if carry else ""
        if place == places - 1:
            clauses.append(f"{x}×{digit}{plus}={total}")
        else:
            carry = total // 10
            clauses.append(f"{x}×{digit}{plus}={total} write {total % 10} carry {carry}")
    return "; ".join(clauses) + f" → {a * digit}"


def multiplied(a: int, b: int) -> str:
    """Partial products, each shifted, then their sum."""
    if a < 10 <= b:
        a, b = b, a
    if b < 10:
        return times_digit(a, b)
    clauses, partial = [], []
    for place, digit in enumerate(map(int, reversed(str(b)))):
        product = a * digit * 10**place
        shift = f", shift → {product}" if place else ""
        clauses.append(f"{a}×{digit}: {times_digit(a, digit)}{shift}")
        partial.append(product)
    total = partial[0]
    for product in partial[1:]:
        clauses.append(f"{total}+{product}: {added(total, product)}")
        total += product
    return "; ".join(clauses)


def may_train(a: int, sign: str, b: int) -> bool:
    """Whether neither this pair nor one met while working it out is held out."""
    if is_held_out(a, b):
        return False
    if sign != "×" or min(a, b) < 10:
        return True
    for x, y in ((a, b), (b, a)):
        tens, ones = divmod(y, 10)
        if is_held_out(x, ones) or is_held_out(x, tens) or is_held_out(x * ones, x * tens * 10):
            return False
    return True


_KINDS = {"add": "+", "subtract": "-", "multiply": "×"}
_WORDS = {"+": "plus", "-": "minus", "×": "times"}
_ASK = (
    "What is {q}?",
    "What is {q}?",
    "What is {q}?",
    "{q}",
    "{q} = ?",
    "How much is {q}?",
    "Calculate {q}.",
    "Please work out {q}.",
)


def exercise(kind: str, a: int, b: int, wording: str = "What is {q}?") -> Exercise:
    """``a`` and ``b`` added, subtracted (a >= b) or multiplied."""
    sign = _KINDS[kind]
    if kind == "add":
        trace, value = f"{a} + {b}: {added(a, b)}", a + b
    elif kind == "subtract":
        trace, value = f"{a} - {b}: {a}≥{b}; {subtracted(a, b)}", a - b
    else:
        trace, value = f"{a} × {b}: {multiplied(a, b)}", a * b
    sizes = sorted((len(str(a)), len(str(b))), reverse=True)
    size = f"{sizes[0]} by {sizes[1]} digits" if kind == "multiply" else f"{sizes[0]} digits"
    return Exercise(
        kind=kind,
        difficulty=size.replace("1 digits", "1 digit"),
        question=wording.format(q=f"{a} {sign} {b}"),
        trace=trace,
        answer=f"{a} {sign} {b} = {value}.",
        value=str(value),
    )


def operands(rng: Random, kind: str, digits: tuple[int, int], *, held_out: bool) -> tuple[int, int]:
    """Operands of the given digits on the asked side of the split; carries come three times as
    often as they would.
    """
    while True:
        a, b = (rng.randint(10 ** (d - 1) if d > 1 else 0, 10**d - 1) for d in digits)
        if kind == "subtract" and a < b:
            a, b = b, a
        wanted = is_held_out(a, b) if held_out else may_train(a, _KINDS[kind], b)
        if not wanted and max(a, b) > 9:
            continue
        if held_out or kind == "multiply" or _carries(kind, a, b) or rng.random() < 0.35:
            return a, b


def _carries(kind: str, a: int, b: int) -> bool:
    """Whether a carry or borrow runs on into the next place, the hard case."""
    chain = run = 0
    carry = 0
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        carry = int(x + y + carry > 9) if kind == "add" else int(x - y - carry < 0)
        run = run + 1 if carry else 0
        chain = max(chain, run)
    return chain >= (2 if max(a, b) > 99 else 1)


LEVELS = (
    ("add", (1, 1), 2), ("add", (2, 1), 2), ("add", (2, 2), 5), ("add", (3, 2), 4),
    ("add", (3, 3), 9),
    ("subtract", (1, 1), 2), ("subtract", (2, 1), 2), ("subtract", (2, 2), 5),
    ("subtract", (3, 2), 4), ("subtract", (3, 3), 9),
    ("multiply", (1, 1), 4), ("multiply", (2, 1), 5), ("multiply", (2, 2), 12),
)  # fmt: skip
"""(kind, digits, weight) of what is trained."""


def calculation(rng: Random, *, thinking: bool = True) -> Exercise:
    """A training question of any level, in one of several wordings.

    Without thinking, products of two digits by two are rare: they cannot be learned by heart.
    """
    weights = [
        w if thinking or (kind, digits) != ("multiply", (2, 2)) else 1 for kind, digits, w in LEVELS
    ]
    kind, digits, _ = rng.choices(LEVELS, weights)[0]
    a, b = operands(rng, kind, digits, held_out=False)
    if kind != "subtract" and rng.random() < 0.5:
        a, b = b, a
    made = exercise(kind, a, b, rng.choice(_ASK))
    sign = _KINDS[kind]
    question = made.question
    if rng.random() < 0.12:
        question = question.replace(f" {sign} ", f" {_WORDS[sign]} ")
    elif rng.random() < 0.15:
        question = question.replace(f" {sign} ", sign)
    if sign == "×" and rng.random() < 0.5:
        question = question.replace("×", rng.choice("x*"))
    return Exercise(
        kind=kind, difficulty=made.difficulty, question=question, trace=made.trace,
        answer=made.answer, value=made.value,
    )  # fmt: skip


def lines(rng: Random) -> str:
    """A page of sums for pretraining: many bare ones, some worked."""
    found = []
    for _ in range(rng.randint(12, 30)):
        made = calculation(rng, thinking=False)
        found.append(made.answer.rstrip(".") if rng.random() < 0.9 else made.trace)
    return "\n".join(found)


def worked(rng: Random) -> str:
    """A page of worked sums for pretraining."""
    found = []
    for _ in range(rng.randint(3, 7)):
        made = calculation(rng)
        found.append(f"{made.trace}. {made.answer}")
    return "\n".join(found)
