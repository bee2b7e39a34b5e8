"""Exercise: a question with a worked trace, an answer, and how to check one."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

Verifier = Literal["last number", "numbers", "last word"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exercise:
    """One question of a kind. ``right`` checks an answer; reinforcement can use the same object."""

    kind: str
    """Such as ``add``; the evaluation reports by kind and difficulty."""
    difficulty: str
    """Such as ``3 digits``."""
    question: str
    trace: str
    """Worked steps for the think block; empty where there is nothing to work out."""
    answer: str
    """The sentence to say."""
    value: str
    """What the verifier looks for."""
    verifier: Verifier = "last number"

    def right(self, text: str) -> bool:
        """Whether ``text``, without its reasoning, holds the answer."""
        if self.verifier == "last word":
            words = re.findall(r"\w+", text.casefold())
            return bool(words) and words[-1] == self.value.casefold()
        # A minus sign belongs to a number only where it is not an operator between two.
        numbers = re.findall(r"(?<![\d\s])-\d+|(?<!\d )-\d+|\d+", text)
        if self.verifier == "last number":
            return bool(numbers) and numbers[-1] == self.value
        return numbers == self.value.split()


def is_held_out(*operands: int | str) -> bool:
    """Whether a set of operands is kept for evaluation, in any order and any format.

    One set in ten, by hash. Single digits and differences such as 14 - 8 are never held out:
    there are few of them, and all working is built from them.
    """
    numbers = [one for one in operands if isinstance(one, int)]
    if len(numbers) == len(operands) and max(numbers) < 19 and sum(n > 9 for n in numbers) < 2:
        return False
    key = ",".join(map(str, sorted(numbers) if numbers else operands))
    return hashlib.sha256(key.encode()).digest()[0] < 26
