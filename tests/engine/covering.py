"""Rows of a covering array: every combination of values of any two factors appears in one."""

import itertools
import random
from collections.abc import Mapping, Sequence

Row = dict[str, object]
Rule = Mapping[str, Sequence[object]]
"""Values that cannot be combined: a row is ruled out if every factor named has one of them."""


def covering_array(
    factors: Mapping[str, Sequence[object]],
    *,
    strength: int = 2,
    seed: int = 0,
    ruled_out: Sequence[Rule] = (),
) -> list[Row]:
    """A greedy covering array: few rows in which every ``strength``-tuple of values appears.

    Tuples that a rule forbids appear nowhere. The first value of every factor must be one that
    no rule names.
    """
    names = list(factors)
    generator = random.Random(seed)
    missing = {
        tuple(zip(some, values, strict=True))
        for some in itertools.combinations(names, strength)
        for values in itertools.product(*(factors[name] for name in some))
        if not is_ruled_out(dict(zip(some, values, strict=True)), ruled_out)
    }
    rows = []
    while missing:
        best: tuple[int, Row] | None = None
        ordered = sorted(missing, key=str)
        for _ in range(12):
            start = generator.choice(ordered)
            row: Row = dict(start)
            rest = [name for name in names if name not in row]
            generator.shuffle(rest)
            for name in rest:
                allowed = [
                    value
                    for value in factors[name]
                    if not is_ruled_out({**row, name: value}, ruled_out)
                ]
                row[name] = max(
                    allowed,
                    key=lambda value, name=name, row=row: (
                        _gain({**row, name: value}, name, missing, strength),
                        generator.random(),
                    ),
                )
            covered = len(_tuples(row, names, strength) & missing)
            if best is None or covered > best[0]:
                best = (covered, row)
        assert best is not None
        rows.append({name: best[1][name] for name in names})
        missing -= _tuples(best[1], names, strength)
    return rows


def is_ruled_out(row: Row, rules: Sequence[Rule]) -> bool:
    """Whether a row, or the part of one that is there, has a combination that is forbidden."""
    return any(
        all(name in row and row[name] in values for name, values in rule.items()) for rule in rules
    )


def _tuples(row: Row, names: Sequence[str], strength: int) -> set:
    there = [name for name in names if name in row]
    return {
        tuple((name, row[name]) for name in some)
        for some in itertools.combinations(there, strength)
    }


def _gain(row: Row, name: str, missing: set, strength: int) -> int:
    others = [other for other in row if other != name]
    count = 0
    for some in itertools.combinations(others, strength - 1):
        wanted = {*some, name}
        key = tuple((n, row[n]) for n in row if n in wanted)
        count += key in missing or tuple(sorted(key)) in missing
    return count
