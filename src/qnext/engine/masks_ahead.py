"""Masks of a step, found on a thread of their own while the model's forward runs.

Most choices need no mask (``ruled.py``); those behind a filter do. What it depends on is known
before the forward: the answer so far, and the drafts behind it. The kernels and the library that
walks through grammars both work without the interpreter, so the two go on side by side where there
is a second core. Handing work to another thread takes about as long as a mask or two, so few of
them are found in the step itself.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from qnext.engine.guide import Guide

FEWEST = 4
"""Sequences with rules for which another thread is worth its while."""

Wanted = Sequence[tuple[Guide, Sequence[int]]]
"""Guides, and the drafts behind each answer."""


class MasksAhead:
    """A thread that finds masks; it begins with the first step that has enough of them."""

    def __init__(self, *, fewest: int = FEWEST, cores: int | None = None) -> None:
        cores = cores or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
        self._fewest = fewest if cores > 1 else None
        self._pool: ThreadPoolExecutor | None = None

    def is_worth(self, sequences: int) -> bool:
        """Whether masks of so many sequences are found beside the forward."""
        return self._fewest is not None and sequences >= self._fewest

    def begin(self, wanted: Wanted) -> Future[None] | None:
        """Start to find the masks of a step; nobody else may use these guides until it is done.

        None where they are too few.
        """
        if not self.is_worth(len(wanted)):
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qnext-masks")
        return self._pool.submit(_find, wanted)

    def close(self) -> None:
        """Let the thread end."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _find(wanted: Wanted) -> None:
    for guide, drafts in wanted:
        for count in range(len(drafts) + 1):
            guide.mask(drafts[:count])
