"""Rows that must be looked up: lists of keys and values, copies, and needles in long texts.

``needle`` is the one definition of retrieval that training and evaluation share. Names and values
of the evaluation are never trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from qnext.data.chats import Chat
from qnext.data.generate.exercise import is_held_out

_FIRST = ("Ada", "Bo", "Carl", "Dora", "Elsa", "Finn", "Greta", "Hugo", "Ida", "Jon", "Kim", "Lars",
          "Mona", "Nils", "Olga", "Pia", "Ruth", "Sven", "Tess", "Uma", "Vera", "Will", "Yara",
          "Zoe", "Anna", "Ben", "Clara", "David", "Eva", "Felix")  # fmt: skip
_LAST = ("Hill", "Wood", "Stone", "Lake", "Field", "Brook", "Rose", "Snow", "Bell", "King", "Fox",
         "Bird", "Green", "Gray", "Black", "White", "Young", "Long", "Short", "Cook", "Baker",
         "Smith", "Miller", "Fisher", "Hunter", "Mason")  # fmt: skip


def name(rng: Random, *, held_out: bool) -> str:
    """A full name of the asked side of the split."""
    while True:
        made = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
        if is_held_out(made) == held_out:
            return made


def code(rng: Random, *, held_out: bool) -> str:
    """Four digits of the asked side of the split."""
    while True:
        made = f"{rng.randrange(10_000):04}"
        if is_held_out("code " + made) == held_out:
            return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Needle:
    """A long text with facts in it, and the question about one of them."""

    text: str
    question: str
    answer: str
    value: str
    others: tuple[tuple[str, str], ...] = ()
    """(question, answer) of the distractors."""

    def chat(self, *, everything: bool = False, further: int = 0) -> Chat:
        """Text and question in one turn, the empty think block in the prompt.

        ``further`` distractors are asked for in later turns; ``everything`` lets the model learn
        the text too.
        """
        turns = [(f"{self.text}\n\n{self.question}", self.answer), *self.others[:further]]
        messages = []
        for ask, say in turns:
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        return Chat(
            messages=tuple(messages),
            enable_thinking=False,
            learn="everything" if everything else "assistant",
        )

    def right(self, text: str) -> bool:
        """Whether an answer names the value: exactly this number and no other."""
        digits = "".join(c if c.isdigit() else " " for c in text).split()
        return digits == [self.value]


def needle(
    rng: Random, sentences: Sequence[str], *, depth: float, distractors: int, held_out: bool
) -> Needle:
    """ "The secret number of NAME is 7394." at ``depth`` (0 start, 1 end) among ``sentences``.

    Distractors are such sentences about other names, at random places.
    """
    people: list[str] = []
    while len(people) <= distractors:
        one = name(rng, held_out=held_out)
        if one not in people:
            people.append(one)
    values = [code(rng, held_out=held_out) for _ in people]
    facts = [f"The secret number of {p} is {v}." for p, v in zip(people, values, strict=True)]
    mixed = list(sentences)
    # The asked one goes in last, so that its depth is exact.
    for fact in facts[1:]:
        mixed.insert(rng.randint(0, len(mixed)), fact)
    mixed.insert(round(depth * len(mixed)), facts[0])
    return Needle(
        text=" ".join(mixed),
        question=f"What is the secret number of {people[0]}?",
        answer=facts[0],
        value=values[0],
        others=tuple(
            (f"What is the secret number of {one}?", fact)
            for one, fact in zip(people[1:], facts[1:], strict=True)
        ),
    )


def pairs(rng: Random) -> str:
    """A list of names with numbers, then some of them asked again: recall inside one text."""
    count = rng.choice((2, 3, 4, 6, 8, 12, 16))
    people = []
    while len(people) < count:
        one = name(rng, held_out=False)
        if one not in people:
            people.append(one)
    values = {one: code(rng, held_out=False) for one in people}
    form = rng.choice(("The secret number of {} is {}.", "{}: {}", "{} has the number {}."))
    said = [form.format(one, value) for one, value in values.items()]
    asked = rng.sample(people, min(count, rng.randint(2, 6)))
    questions = [
        f"What is the secret number of {one}? The secret number of {one} is {values[one]}."
        for one in asked
    ]
    return "\n".join([*said, *questions])


def copy(rng: Random, words: Sequence[str]) -> str:
    """A row of random words or digits, written twice."""
    if rng.random() < 0.5:
        row = " ".join(rng.choice(words) for _ in range(rng.randint(5, 40)))
    else:
        row = " ".join(str(rng.randrange(10)) for _ in range(rng.randint(8, 40)))
    return f"{row}\n{row}"
