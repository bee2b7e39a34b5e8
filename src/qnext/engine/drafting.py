"""Drafts for the next step: the MTP layer reads what is new, and guesses on from there."""

from collections.abc import Callable, Sequence

from qnext.engine.native_runner import NativeRunner
from qnext.engine.runner import MtpWork, Runner
from qnext.engine.sampler import SampleRow, sample
from qnext.engine.scheduler import Sequence as Running

RowOf = Callable[[Running, Sequence[int]], SampleRow]
"""What the sampler has to know about a sequence after so many drafts."""


def draft_ahead(
    runner: Runner,
    reading: Sequence[Running],
    counts: Sequence[int],
    *,
    row: RowOf,
    defined_ids: int,
    least_share: float = 0.0,
) -> list[list[int]]:
    """``counts[b]`` drafts for each sequence, 0 to let the MTP layer read only.

    A draft is chosen as its token will be: the most likely one, or sampled with the noise of its
    position. A native runner does it in one call where no grammar rules, and stops at what the
    head finds less likely than ``least_share``.
    """
    works = [read_up(sequence) for sequence in reading]
    drafting = [b for b, count in enumerate(counts) if count]
    if isinstance(runner, NativeRunner) and all(s.guide is None for s in reading):
        return runner.propose(
            works, counts, reading, defined_ids=defined_ids, least_share=least_share
        )
    logits = runner.fill(works)[drafting]
    drafts: list[list[int]] = [[] for _ in reading]
    while drafting:
        rows = [row(reading[b], drafts[b]) for b in drafting]
        for b, token in zip(drafting, sample(logits, rows, defined_ids=defined_ids), strict=True):
            drafts[b].append(token)
        drafting = [b for b in drafting if counts[b] > len(drafts[b])]
        if drafting:
            logits = runner.draft([_read_on(reading[b], drafts[b]) for b in drafting])
    return drafts


def read_up(sequence: Running) -> MtpWork:
    """MTP rows for everything up to the newest known token; they count as read from here on."""
    assert sequence.slot is not None
    start, end = sequence.mtp_len, sequence.done + 1
    work = MtpWork(
        slot=sequence.slot,
        pages=sequence.pages,
        start=start,
        ids=sequence.tokens(start, end),
        first=sequence.mtp_first,
    )
    sequence.mtp_len = end
    return work


def _read_on(sequence: Running, drafts: Sequence[int]) -> MtpWork:
    """One provisional MTP row for the last draft; the next reading writes over it."""
    assert sequence.slot is not None
    return MtpWork(
        slot=sequence.slot,
        pages=sequence.pages,
        start=sequence.length - 1 + len(drafts),
        ids=drafts[-1:],
        first=sequence.mtp_first,
    )
