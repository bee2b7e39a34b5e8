"""A mask of allowed tokens comes before everything else, in every way to choose."""

import numpy as np
import pytest
import torch

from qnext.engine.request import SamplingParams
from qnext.engine.sampler import SampleRow, allowed, choose, sample

V = 700
WAYS = {
    "greedy": {"temperature": 0.0},
    "narrow": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "wide": {"temperature": 1.3},
    "min_p": {"temperature": 1.0, "min_p": 0.001},
    "penalised": {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
}


def mask_of(*ids: int, words: int = (V + 31) // 32) -> np.ndarray:
    mask = np.zeros(words, dtype=np.uint32)
    for token in ids:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def row(ids, seed: int = 1, **params) -> SampleRow:
    mask = None if ids is None else mask_of(*ids)
    some = SampleRow(params=SamplingParams(**params), seed=seed, index=3, mask=mask)
    some.counts.update([1, 2, 3, 31])
    return some


def test_bits_are_little_endian_in_words_of_32():
    mask = mask_of(0, 31, 32, 95, words=3)
    assert np.flatnonzero(allowed(mask, 96)).tolist() == [0, 31, 32, 95]
    assert np.flatnonzero(allowed(mask, 40)).tolist() == [0, 31, 32]
    assert np.flatnonzero(allowed(mask, 200)).tolist() == [0, 31, 32, 95]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ids", [[5], [0, 699], [3, 31, 32, 64, 698], list(range(100, 400))])
def test_only_what_is_allowed_is_chosen_and_as_if_nothing_else_existed(way, ids):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(2)) * 2
    left = torch.full((V,), float("-inf"))
    left[ids] = logits[ids]
    for seed in range(20):
        one = row(ids, seed, **WAYS[way])
        [token] = sample(logits[None], [one], defined_ids=V)
        assert token in ids
        assert [token] == sample(left[None], [row(None, seed, **WAYS[way])], defined_ids=V)


def test_rows_with_and_without_a_mask_share_a_batch():
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(3))
    kept = logits.clone()
    for way in WAYS.values():
        rows = [row([7, 8, 9] if i % 2 else None, seed=i, **way) for i in range(6)]
        together = choose(logits, rows, defined_ids=V, tie_bound=1e-4)[0]
        alone = [sample(logits[i : i + 1], [rows[i]], defined_ids=V)[0] for i in range(6)]
        assert together == alone
        assert all(token in (7, 8, 9) for token in together[1::2])
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("way", WAYS)
def test_bans_give_way_where_a_mask_leaves_nothing_else(way):
    logits = torch.zeros(1, V)
    banned = SampleRow(
        params=SamplingParams(min_tokens=9, max_tokens=20, **WAYS[way]), seed=0, index=3,
        stop_ids=(4, 5), bad_words=[(6,)], mask=mask_of(4, 6),
    )  # fmt: skip
    assert sample(logits, [banned], defined_ids=V)[0] in (4, 6)
    banned.mask = mask_of(4, 6, 11)
    assert sample(logits, [banned], defined_ids=V) == [11]
