"""Shares with their uncertainty, and the record every task fills."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share (95 % by default); (0, 1) when nothing was asked."""
    if not total:
        return 0.0, 1.0
    share = right / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    below = 1 + z * z / total
    return max(0.0, (middle - spread) / below), min(1.0, (middle + spread) / below)


def share(answers: Iterable[bool]) -> dict[str, Any]:
    """How many of the answers are right: ``share``, ``right``, ``of`` and the interval."""
    marks = list(answers)
    right = sum(marks)
    low, high = wilson(right, len(marks))
    return {
        "share": round(right / len(marks), 4) if marks else None,
        "right": right,
        "of": len(marks),
        "interval": [round(low, 4), round(high, 4)],
    }


@dataclass
class Report:
    """Results by task, and why some were left out."""

    results: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
