"""Sampling follows the stated distribution, and its noise belongs to the request alone."""

import math
from collections import Counter

import pytest
import torch

from qnext.engine.request import SamplingParams
from qnext.engine.sampler import SampleRow, gumbel_noise, philox, sample

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def draw(seed: int, logits: torch.Tensor = LOGITS, **params) -> int:
    row = SampleRow(params=SamplingParams(**params), seed=seed, index=0, prompt_ids=())
    return sample(logits[None], [row], defined_ids=logits.shape[0])[0]


def noise(seed: int, index: int, ids: torch.Tensor) -> torch.Tensor:
    return gumbel_noise(seeds=[seed], indices=[index], ids=ids[None])[0]


def test_philox_gives_the_published_answer():
    # Random123's known-answer test for ten rounds, counter and key zero.
    zero = torch.zeros(1).long()
    word = philox(counter=(zero, zero), key=(zero, zero))
    assert int(word) == 0x6627E8D5


def test_noise_is_a_function_of_seed_index_and_token_only():
    ids, every = torch.tensor([7, 3, 9]), torch.arange(10)
    whole = noise(5, 2, every)
    assert torch.equal(noise(5, 2, ids), whole[ids])
    for seed, index in ((6, 2), (5, 3), (5 + (1 << 40), 2)):
        assert not torch.equal(whole, noise(seed, index, every))
    together = gumbel_noise(seeds=[1, 5], indices=[9, 2], ids=every.expand(2, 10))
    assert torch.equal(together[1], whole)


def test_noise_is_gumbel_and_finite():
    found = noise(1, 0, torch.arange(200_000)).double()
    assert bool(found.isfinite().all())
    assert float(found.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(found.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    count = 6_000
    found = Counter(draw(seed, temperature=temperature) for seed in range(count))
    wanted = (LOGITS / temperature).softmax(-1)
    chi2 = sum((found[i] - count * p) ** 2 / (count * p) for i, p in enumerate(wanted.tolist()))
    assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.75}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.99}, {0, 1}),
    ],
)
def test_filters_keep_exactly_the_stated_tokens(params, allowed):
    # softmax: 0.563 0.207 0.126 0.076 0.028
    assert {draw(seed, temperature=1.0, **params) for seed in range(800)} == allowed


def test_temperature_zero_takes_the_first_of_equals():
    assert draw(0, torch.tensor([1.0, 3.0, 3.0, 0.0]), temperature=0.0) == 1


def penalised(counts: dict[int, int], prompt: tuple[int, ...] = (), **params) -> int:
    row = SampleRow(
        params=SamplingParams(temperature=0.0, **params),
        seed=0,
        index=3,
        prompt_ids=prompt,
        counts=Counter(counts),
    )
    return sample(LOGITS[None], [row], defined_ids=5)[0]


def test_penalties_move_the_choice():
    assert penalised({0: 1}) == 0
    assert penalised({0: 1}, presence_penalty=1.1) == 1
    assert penalised({0: 1}, frequency_penalty=0.6) == 0
    assert penalised({0: 2}, frequency_penalty=0.6) == 1
    assert penalised({0: 1}, repetition_penalty=2.1) == 1
    assert penalised({}, prompt=(0,), repetition_penalty=2.1) == 1
    assert penalised({}, prompt=(0,), presence_penalty=2.0) == 0
    assert penalised({}, logit_bias={4: 3.5}) == 4


def test_repetition_penalty_makes_negative_logits_smaller():
    logits = torch.tensor([-1.0, -1.5])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    row = SampleRow(params=params, seed=0, index=0, prompt_ids=(0,))
    assert sample(logits[None], [row], defined_ids=2)[0] == 1


def test_sampling_leaves_the_logits_as_they_were():
    logits = LOGITS.clone()[None]
    params = SamplingParams(logit_bias={0: 5.0}, repetition_penalty=3.0)
    sample(logits, [SampleRow(params=params, seed=0, index=0, prompt_ids=(1,))], defined_ids=4)
    assert torch.equal(logits[0], LOGITS)
