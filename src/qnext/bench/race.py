"""Contestants, measured in turn with the machine in between.

Memory bandwidth drifts by a third within minutes, so a speed alone says little. Every repetition
of every contestant stands between two looks at the machine and beside a repetition of the others.
"""

import mmap
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qnext import native
from qnext.bench.cases import Limits, Repetition, Spread

READ_BYTES = 256 << 20
"""Read at once to measure the bandwidth: many times the caches."""
TRIES = 3
PAUSE_S = 0.01
"""Between repetitions: threads of another contestant that spin have gone to sleep by then."""


class Session(Protocol):
    """A case, ready to be run by one contestant."""

    def reset(self) -> None:
        """Go back to where a repetition starts; not timed."""
        ...

    def step(self) -> None:
        """One step; timed."""
        ...

    @property
    def experts(self) -> float | None:
        """Distinct routed experts read since ``reset``, of all layers; None if not counted."""
        ...


class Machine:
    """The limits of this machine, measured on the spot."""

    def __init__(self) -> None:
        self._native = native.load()
        room = mmap.mmap(-1, READ_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            room.madvise(mmap.MADV_HUGEPAGE)
        self._room = np.frombuffer(room, dtype=np.uint8)
        self._room.fill(1)
        self.seen: list[Limits] = []

    def look(self) -> Limits:
        """Bandwidth and peaks now, about 50 ms.

        The best of a few tries: whatever disturbs a try makes the limit look lower than it is.
        """
        n = self._native
        now = Limits(
            max(n.read_bandwidth(self._room) for _ in range(TRIES)),
            max(n.peak_int8() for _ in range(TRIES)),
            max(n.peak_bf16() for _ in range(TRIES)),
        )
        self.seen.append(now)
        return now


def race(
    sessions: Mapping[str, Session], machine: Machine, *, steps: int, repetitions: int
) -> dict[str, list[Repetition]]:
    """Repetitions of every session in turn, after one warm-up each."""
    for session in sessions.values():
        session.reset()
        for _ in range(min(steps, 2)):
            session.step()
    found: dict[str, list[Repetition]] = {name: [] for name in sessions}
    before = machine.look()
    for _ in range(repetitions):
        for name, session in sessions.items():
            session.reset()
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            for _ in range(steps):
                session.step()
            seconds = time.perf_counter() - start
            time.sleep(PAUSE_S)
            after = machine.look()
            experts = session.experts
            each = None if experts is None else experts / steps
            found[name].append(Repetition(seconds, Limits.between(before, after), each))
            before = after
    return found


def machine_report(seen: Sequence[Limits]) -> dict[str, Any]:
    """What the machine gave while a race was on, JSON-ready."""

    def spread(values: list[float]) -> dict[str, float]:
        return Spread.of([value / 1e9 for value in values]).as_dict()

    return {
        "read_gigabytes_per_second": spread([one.bandwidth for one in seen]),
        "int8_gigaoperations_per_second": spread([one.integers for one in seen]),
        "bf16_gigaoperations_per_second": spread([one.floats for one in seen]),
    }
