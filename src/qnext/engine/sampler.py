"""Logits -> token ids: penalties, filters, and noise that belongs to the request alone.

Sampling adds Gumbel noise to the filtered log-probabilities and takes the largest. The noise is a
function of (seed, output index, token id) and of nothing else, so a seeded request gives the same
tokens in any batch and in any order of steps; temperature 0 is the same rule without noise. A
draft is sampled with the very noise of the position it is for, and is accepted only when it equals
what the model itself samples there: sharing noise is right for that rule and for no other.
Order: mask -> bias -> bans -> penalties -> temperature -> min_p -> top_k -> top_p -> noise ->
largest. Of equal scores the lower id wins. Where bans leave nothing of what a mask allows, they
give way: a grammar that goes on with one token only goes on with that.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qnext.engine import ties
from qnext.engine.request import SamplingParams, TokenLogprobs
from qnext.ops.elementwise import elementwise_invariant

Rivals = tuple[int, ...]
"""Tokens that might have been chosen instead, had rounding been different; mostly none."""

FEW = 8
"""Up to so many rows, an operation for each row alone costs less than one for all."""

WIDEST = 256
"""Rows with at most this top_k are filtered together."""


@dataclass(kw_only=True, slots=True)
class SampleRow:
    """Everything the sampler has to know about the request behind one row of logits."""

    params: SamplingParams
    seed: int
    index: int
    """Number of tokens already generated: the counter of the noise."""
    prompt_ids: Sequence[int] = ()
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated."""
    recent: Sequence[int] = ()
    """The tokens before this one, as far as bad words reach back."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that may not be chosen before ``min_tokens``."""
    bad_words: Sequence[tuple[int, ...]] = ()
    """Token sequences that may not be completed."""
    mask: np.ndarray | None = None
    """The tokens that may be chosen: uint32 words, token t is bit t % 32 of word t // 32, tokens
    beyond the last word may not. At least one is allowed. None allows every token."""

    @property
    def is_adjusted(self) -> bool:
        """Whether anything but temperature and filters touches the logits."""
        p = self.params
        return bool(
            self.mask is not None
            or p.logit_bias
            or self.bad_words
            or p.repetition_penalty != 1.0
            or ((p.presence_penalty or p.frequency_penalty) and self.counts)
            or (self.index < p.min_tokens and self.stop_ids)
        )


def sample(logits: Tensor, rows: Sequence[SampleRow], *, defined_ids: int) -> list[int]:
    """Choose one token per row of logits [R, V].

    ``defined_ids`` is the number of ids the tokenizer knows; the padded rest of the vocabulary is
    never chosen.
    """
    return choose(logits, rows, defined_ids=defined_ids, tie_bound=None)[0]


def choose(
    logits: Tensor, rows: Sequence[SampleRow], *, defined_ids: int, tie_bound: float | None
) -> tuple[list[int], list[Rivals]]:
    """What ``sample`` returns, and for every row the tokens that another rounding might choose.

    ``tie_bound`` says how far rounding reaches (see ``ties``); None looks for no rivals.
    """
    scores = logits[:, :defined_ids].float()
    adjusted = [r for r, row in enumerate(rows) if row.is_adjusted]
    if adjusted:
        scores = scores.clone()
        for r in adjusted:
            _adjust(scores[r], rows[r])
    chosen = [0] * len(rows)
    rivals: list[Rivals] = [()] * len(rows)
    greedy = [r for r, row in enumerate(rows) if row.params.temperature == 0.0]
    if greedy:
        part = scores if len(greedy) == len(rows) else scores[greedy]
        for r, token, others in zip(greedy, *_largest(part, tie_bound), strict=True):
            chosen[r], rivals[r] = token, others
    narrow = [r for r, row in enumerate(rows) if _is_narrow(row, scores.shape[1])]
    if narrow:
        found = _sample_narrow(scores, rows, narrow, tie_bound)
        for r, token, others in zip(narrow, *found, strict=True):
            chosen[r], rivals[r] = token, others
    done = {*greedy, *narrow}
    for r, row in enumerate(rows):
        if r not in done:
            chosen[r], rivals[r] = _sample_one(scores[r], row, tie_bound)
    return chosen, rivals


def _largest(scores: Tensor, tie_bound: float | None) -> tuple[list[int], list[Rivals]]:
    """The lowest of the ids with the largest score [R, V], and what comes close to it."""
    if scores.device.type == "cpu" and len(scores) <= FEW:
        found = [_largest_of(scores_V, tie_bound) for scores_V in scores.numpy()]
        return [token for token, _ in found], [others for _, others in found]
    # Finding the two largest costs less than finding the first of the largest.
    values, ids = scores.topk(min(2, scores.shape[1]), dim=-1)
    chosen = ids[:, 0].tolist()
    rivals: list[Rivals] = [()] * len(chosen)
    if scores.shape[1] == 1:
        return chosen, rivals
    margins = values[:, 0] - values[:, 1]
    for r, equal in enumerate((margins == 0.0).tolist()):
        if equal:
            # topk may return equals in any order; argmax over a comparison returns the first.
            chosen[r] = int((scores[r] == values[r, 0]).to(torch.uint8).argmax())
    if tie_bound is not None:
        slack = ties.tolerance(values[:, 0], tie_bound)
        for r, close in enumerate((margins <= slack).tolist()):
            if close:
                near = (scores[r] >= values[r, 0] - slack[r]).nonzero()[:, 0].tolist()
                rivals[r] = tuple(token for token in near if token != chosen[r])
    return chosen, rivals


def _largest_of(scores_V: np.ndarray, tie_bound: float | None) -> tuple[int, Rivals]:
    """``_largest`` of one row."""
    chosen = int(scores_V.argmax())
    if tie_bound is None or len(scores_V) == 1:
        return chosen, ()
    top = float(scores_V[chosen])
    before, after = scores_V[:chosen], scores_V[chosen + 1 :]
    second = max(float(part.max()) for part in (before, after) if len(part))
    slack = ties.tolerance_of(top, tie_bound)
    if not top - second <= slack:
        return chosen, ()
    near = np.flatnonzero(scores_V >= np.float32(top - slack)).tolist()
    return chosen, tuple(token for token in near if token != chosen)


def logprobs_of(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Under the unmodified logits [R, V]: one token of each row and the best ``tops[r]``."""
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    most = max(tops)
    values, ids = logprobs.topk(most) if most else (None, None)
    found = []
    for r, token in enumerate(tokens):
        top: tuple[tuple[int, float], ...] = ()
        if tops[r] and values is not None and ids is not None:
            pairs = zip(ids[r, : tops[r]].tolist(), values[r, : tops[r]].tolist(), strict=True)
            top = tuple(pairs)
        found.append(TokenLogprobs(token_id=token, logprob=own[r], top=top))
    return found


def allowed(mask: np.ndarray, width: int) -> np.ndarray:
    """The bits of a mask as bool [width]."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:width]
    return np.pad(bits, (0, width - len(bits))).view(np.bool_)


def _adjust(scores_V: Tensor, row: SampleRow) -> None:
    """Mask, bias, bans and penalties, in place."""
    params, width = row.params, scores_V.shape[0]
    if row.mask is not None:
        forbidden_V = torch.from_numpy(~allowed(row.mask, width)).to(scores_V.device)
        scores_V.masked_fill_(forbidden_V, float("-inf"))
    for token, bias in params.logit_bias.items():
        if token < width:
            scores_V[token] += bias
    banned = [token for token in _banned(row) if token < width]
    if banned:
        before = scores_V[banned]
        scores_V[banned] = float("-inf")
        if row.mask is not None and not bool((scores_V > float("-inf")).any()):
            scores_V[banned] = before
    if params.repetition_penalty != 1.0:
        seen = sorted({*row.prompt_ids, *row.counts})
        seen = torch.tensor(seen, dtype=torch.long, device=scores_V.device)
        seen = seen[seen < scores_V.shape[0]]
        values = scores_V[seen]
        scale = params.repetition_penalty
        scores_V[seen] = torch.where(values > 0, values / scale, values * scale)
    if row.counts and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(row.counts), device=scores_V.device)
        counts = torch.tensor(list(row.counts.values()), device=scores_V.device).float()
        scores_V[tokens] -= params.presence_penalty + params.frequency_penalty * counts


def _banned(row: SampleRow) -> list[int]:
    """Tokens that would complete a bad word, or end the answer too early."""
    found = list(row.stop_ids) if row.index < row.params.min_tokens else []
    for *before, last in row.bad_words:
        recent = row.recent[len(row.recent) - len(before) :] if before else ()
        if list(recent) == before:
            found.append(last)
    return found


def _is_narrow(row: SampleRow, width: int) -> bool:
    p = row.params
    return p.temperature > 0.0 and 0 < p.top_k <= min(WIDEST, width - 1)


def _sample_narrow(
    scores: Tensor, rows: Sequence[SampleRow], narrow: Sequence[int], tie_bound: float | None
) -> tuple[list[int], list[Rivals]]:
    """All rows with a small top_k at once, on their largest scores only."""
    some = [rows[r] for r in narrow]
    device = scores.device
    k_R1 = torch.tensor([[row.params.top_k] for row in some], device=device)
    # Always the same width: sums over it must not depend on what others in the batch ask for.
    most = min(WIDEST, scores.shape[1] - 1)
    values, ids = scores[list(narrow)].topk(most + 1, dim=-1)
    # Into the order (score descending, id ascending), whatever order topk gave equal scores.
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    lowest_R1 = values.gather(1, k_R1 - 1)
    tied = ((lowest_R1 == values.gather(1, k_R1)) & lowest_R1.isfinite())[:, 0].tolist()
    temperature_R1 = torch.tensor([[row.params.temperature] for row in some], device=device)
    top_R1, values = values[:, :1], values / temperature_R1
    noise = gumbel_noise(
        seeds=[row.seed for row in some], indices=[row.index for row in some], ids=ids
    )
    wide = values, values + noise, ids
    values, noise, ids = values[:, :most], noise[:, :most], ids[:, :most]
    keep = torch.arange(most, device=device) < k_R1
    values = values.masked_fill(~keep, float("-inf"))
    keep &= values.isfinite()
    probabilities = values.softmax(-1)
    min_p_R1 = torch.tensor([[row.params.min_p] for row in some], device=device)
    # min_p looks at the whole distribution, but relative to its largest: the sum cancels.
    keep &= probabilities >= min_p_R1 * probabilities[:, :1]
    top_p_R1 = torch.tensor([[row.params.top_p] for row in some], device=device)
    probabilities = values.masked_fill(~keep, float("-inf")).softmax(-1)
    keep &= (top_p_R1 >= 1.0) | (probabilities.cumsum(-1) - probabilities < top_p_R1)
    keep[:, 0] = True
    best = (values + noise).masked_fill(~keep, float("-inf")).argmax(-1, keepdim=True)
    chosen = ids.gather(1, best)[:, 0].tolist()
    for i, is_tied in enumerate(tied):
        if is_tied:
            # Several tokens share the last place: the rule of the lower id needs the whole row.
            chosen[i], _ = _sample_one(scores[narrow[i]], some[i], None)
    if tie_bound is None:
        return chosen, [()] * len(chosen)
    values, scores, ids = wide
    slack_R1 = ties.tolerance(top_R1, tie_bound) / temperature_R1
    may, must = ties.passing(
        values, slack_R1=slack_R1, top_k_R1=k_R1, top_p_R1=top_p_R1, min_p_R1=min_p_R1
    )
    could = ties.contenders(scores, may=may, must=must, slack_R1=slack_R1)
    return chosen, ties.rivals(could, ids, chosen)


def _sample_one(scores_V: Tensor, row: SampleRow, tie_bound: float | None) -> tuple[int, Rivals]:
    """One row by the definition: sort everything, filter, add noise."""
    params = row.params
    scores, ids = (scores_V / params.temperature).sort(descending=True, stable=True)
    keep = scores.isfinite()
    may = must = keep.clone()
    slack_11 = torch.zeros(1, 1, device=scores.device)
    if tie_bound is not None:
        slack_11 = (ties.tolerance(scores_V.amax(), tie_bound) / params.temperature).view(1, 1)
        if params.min_p > 0.0 or params.top_k > 0 or params.top_p < 1.0:
            limits = torch.tensor([params.top_k, params.top_p, params.min_p], device=scores.device)
            k_11, p_11, min_11 = limits.view(3, 1, 1)
            passing = ties.passing(
                scores[None], slack_R1=slack_11, top_k_R1=k_11, top_p_R1=p_11, min_p_R1=min_11
            )
            may, must = passing[0][0], passing[1][0]
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
    some = keep if tie_bound is None else keep | may
    ids, scores, keep, may, must = (one[some] for one in (ids, scores, keep, may, must))
    noise = gumbel_noise(seeds=[row.seed], indices=[row.index], ids=ids[None])[0]
    scores = scores + noise
    chosen = int(ids[scores.masked_fill(~keep, float("-inf")).argmax()])
    if tie_bound is None:
        return chosen, ()
    could = ties.contenders(scores[None], may=may[None], must=must[None], slack_R1=slack_11)
    return chosen, ties.rivals(could, ids[None], [chosen])[0]


_MASK = 0xFFFFFFFF


def gumbel_noise(*, seeds: Sequence[int], indices: Sequence[int], ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [R, n], for token ids [R, n]; row r at output ``indices[r]``.

    Counter-based (Philox 4x32 with ten rounds; Salmon et al. 2011): no state, any order.
    """
    device = ids.device
    index_R1 = torch.tensor([[index & _MASK] for index in indices], device=device)
    low_R1 = torch.tensor([[seed & _MASK] for seed in seeds], device=device)
    high_R1 = torch.tensor([[(seed >> 32) & _MASK] for seed in seeds], device=device)
    bits = philox(counter=(ids & _MASK, index_R1.expand_as(ids)), key=(low_R1, high_R1))
    # 24 bits, shifted by half a step, so that the uniform never is exactly 0 or 1.
    uniform = ((bits >> 8).double() + 0.5) / (1 << 24)
    # Padded, so that a token's noise has the same bits in a batch of any size.
    inner = elementwise_invariant(function=torch.log, x=uniform)
    return -elementwise_invariant(function=torch.log, x=-inner).float()


def philox(*, counter: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """First 32-bit word of Philox 4x32-10 for counters (c0, c1, 0, 0), int64 in and out."""
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
