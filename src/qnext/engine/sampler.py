"""Logits -> token ids: penalties, filters, and noise that belongs to the request alone.

Sampling adds Gumbel noise to the filtered log-probabilities and takes the largest. The noise is a
function of (seed, output index, token id) and of nothing else, so a seeded request gives the same
tokens in any batch and in any order of steps; temperature 0 is the same rule without noise.
Order: bias -> minimum length -> penalties -> temperature -> min_p -> top_k -> top_p -> noise.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qnext.engine.request import SamplingParams, TokenLogprobs


@dataclass(kw_only=True, slots=True)
class SampleRow:
    """Everything the sampler has to know about the request behind one row of logits."""

    params: SamplingParams
    seed: int
    index: int
    """Number of tokens already generated: the counter of the noise."""
    prompt_ids: Sequence[int]
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that may not be chosen before ``min_tokens``."""


def sample(
    logits: Tensor, rows: Sequence[SampleRow], *, defined_ids: int
) -> list[tuple[int, TokenLogprobs | None]]:
    """Choose one token per row of logits [R, V].

    ``defined_ids`` is the number of ids the tokenizer knows; the padded rest of the vocabulary is
    never chosen. Returns (token id, log-probabilities if asked for) per row.
    """
    logits = logits.float()
    results = []
    for r, row in enumerate(rows):
        raw_V = logits[r]
        token = _choose(raw_V, row, defined_ids)
        results.append((token, _logprobs(raw_V, token, row.params.logprobs)))
    return results


def _choose(raw_V: Tensor, row: SampleRow, defined_ids: int) -> int:
    params = row.params
    scores_V = _adjusted(raw_V, row, defined_ids)
    if params.temperature == 0.0:
        return int(scores_V.argmax())
    ids, scores = _filtered(scores_V / params.temperature, params)
    noise = gumbel_noise(seed=row.seed, index=row.index, ids=ids)
    return int(ids[(scores + noise).argmax()])


def _adjusted(raw_V: Tensor, row: SampleRow, defined_ids: int) -> Tensor:
    """Bias, bans and penalties applied to a copy of the logits."""
    params, scores_V = row.params, raw_V.clone()
    for token, bias in params.logit_bias.items():
        scores_V[token] += bias
    scores_V[defined_ids:] = float("-inf")
    if row.index < params.min_tokens and row.stop_ids:
        scores_V[list(row.stop_ids)] = float("-inf")
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.counts}), device=raw_V.device)
        values = scores_V[seen]
        scale = params.repetition_penalty
        scores_V[seen] = torch.where(values > 0, values / scale, values * scale)
    if row.counts and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(row.counts), device=raw_V.device)
        counts = torch.tensor(list(row.counts.values()), device=raw_V.device, dtype=torch.float32)
        scores_V[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    return scores_V


def _filtered(scores_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The surviving token ids and their scores, likeliest first; ties go to the lower id."""
    scores, ids = scores_V.sort(descending=True, stable=True)
    keep = torch.isfinite(scores)
    if params.min_p > 0.0:
        probabilities = scores.softmax(-1)
        keep &= probabilities >= params.min_p * probabilities[0]
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        probabilities = scores.masked_fill(~keep, float("-inf")).softmax(-1)
        # A token stays if the likelier ones before it do not reach top_p yet.
        keep &= probabilities.cumsum(-1) - probabilities < params.top_p
    keep[0] = True
    return ids[keep], scores[keep]


def _logprobs(raw_V: Tensor, token: int, top: int | None) -> TokenLogprobs | None:
    if top is None:
        return None
    logprobs_V = raw_V.log_softmax(-1)
    values, ids = logprobs_V.topk(top)
    return TokenLogprobs(
        token_id=token,
        logprob=float(logprobs_V[token]),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )


_MASK = 0xFFFFFFFF


def gumbel_noise(*, seed: int, index: int, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [n], for token ids [n] at one output position.

    Counter-based (Philox 4x32 with ten rounds; Salmon et al. 2011): no state, any order.
    """
    bits = philox(
        counter=(ids.long() & _MASK, torch.full_like(ids, index).long() & _MASK),
        key=(seed & _MASK, (seed >> 32) & _MASK),
    )
    # 24 bits, shifted by half a step, so that the uniform never is exactly 0 or 1.
    uniform = ((bits >> 8).double() + 0.5) / (1 << 24)
    return -torch.log(-torch.log(uniform)).float()


def philox(*, counter: tuple[Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """First 32-bit word of Philox 4x32-10 for counters (c0, c1, 0, 0), as int64."""
    c0, c1 = counter
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but their 64 bits are right, and the mask drops the sign.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0
