"""The sampler of ``sampler.py`` as the native kernels run it: the same choices, no tensors.

``sampler.py`` is the definition. Here its rows become ``Chooser`` objects, which the native step of
decoding (``lanes.py``) also takes; one piece of C++ (``csrc/sampling.cpp``) chooses for both, so a
token does not depend on which of the two ways it was asked for.

Every engine whose logits are on the CPU chooses with it where the kernels are there, those that run
the model in PyTorch too: for 16 rows of 16384 logits it takes a tenth of a millisecond, not three.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from qnext import native
from qnext.engine import sampler
from qnext.engine.request import SamplingParams, TokenLogprobs
from qnext.engine.sampler import SampleRow

_MASK = (1 << 64) - 1
_LARGEST = (1 << 63) - 1
"""Counts may be any whole number in a request; beyond this they mean the same."""


def chooser_of(
    params: SamplingParams,
    *,
    seed: int,
    prompt_ids: Sequence[int],
    stop_ids: Sequence[int],
    bad_words: Sequence[tuple[int, ...]],
) -> Any:
    """How a request chooses its tokens, for the native kernels; nothing is chosen yet."""
    repeats = params.repetition_penalty != 1.0
    return native.load().Chooser(
        temperature=params.temperature,
        top_k=min(params.top_k, _LARGEST),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        seed=seed & _MASK,
        min_tokens=min(params.min_tokens, _LARGEST),
        bias=dict(params.logit_bias),
        bad_words=[list(word) for word in bad_words],
        stops=list(stop_ids),
        prompt=list(prompt_ids) if repeats else [],
    )


def choose(
    logits: Tensor,
    rows: Sequence[SampleRow],
    *,
    defined_ids: int,
    tie_bound: float | None,
) -> tuple[list[int], list[bool]]:
    """One token per row of logits [R, V], and for each whether rounding might have decided it.

    Logits that are not on the CPU are left to ``sampler.choose``.
    """
    if logits.device.type != "cpu":
        tokens, rivals = sampler.choose(logits, rows, defined_ids=defined_ids, tie_bound=tie_bound)
        return tokens, [bool(others) for others in rivals]
    masks = None
    if any(row.mask is not None for row in rows):
        masks = [None if row.mask is None else row.mask.view(np.int32) for row in rows]
    choosers = []
    for row in rows:
        chooser = chooser_of(
            row.params, seed=row.seed, prompt_ids=row.prompt_ids, stop_ids=row.stop_ids,
            bad_words=row.bad_words,
        )  # fmt: skip
        # Copied where it is asked for only: a long answer has hundreds of tokens.
        counts = dict(row.counts) if _counts(row.params) else {}
        chooser.set_history(row.index, counts, list(row.recent))
        choosers.append(chooser)
    return native.load().choose(
        logits.float().contiguous().numpy(), choosers, masks, defined_ids,
        -1.0 if tie_bound is None else tie_bound,
    )  # fmt: skip


def _counts(params: SamplingParams) -> bool:
    """Whether it matters how often a token was generated."""
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


def sample(logits: Tensor, rows: Sequence[SampleRow], *, defined_ids: int) -> list[int]:
    """``choose`` without a look at near-ties."""
    return choose(logits, rows, defined_ids=defined_ids, tie_bound=None)[0]


def ranked(logits_V: np.ndarray, *, defined_ids: int, most: int) -> Iterable[tuple[int, float]]:
    """The best tokens and their scores, largest first, of equals the lower id; float32 logits."""
    return zip(*native.load().best_scores(logits_V, defined_ids, most), strict=True)


def logprobs_of(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Under the unmodified logits [R, V]: one token of each row and the best ``tops[r]``."""
    if not tokens:
        return []
    array = logits.float().contiguous().numpy()
    found = native.load().log_probabilities(array, list(tokens), list(tops))
    return [
        TokenLogprobs(token_id=token, logprob=own, top=top)
        for token, (own, top) in zip(tokens, found, strict=True)
    ]
