"""The native sampler chooses what the plain one chooses, for every combination of parameters."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from qnext import native
from qnext.engine import native_sampler, sampler
from qnext.engine.request import SamplingParams
from qnext.engine.sampler import SampleRow

pytestmark = pytest.mark.skipif(native.unfit() is not None, reason="no native kernels")

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 64, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 700},
    {"top_k": 2**70},
    {"top_p": 0.6},
    {"top_p": 0.97},
    {"min_p": 0.05},
    {"min_p": 0.1, "top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 1.0},
]
ADJUSTMENTS = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": -0.4},
    {"logit_bias": {3: 4.0, 11: -100.0}},
    {"bad": True},
    {"min_tokens": 50},
    {"min_tokens": 2**70},
    {
        "repetition_penalty": 0.8, "frequency_penalty": 0.3, "logit_bias": {5: 2.0},
        "bad": True, "min_tokens": 50,
    },
]  # fmt: skip


def rows_for(width: int, count: int, rng: random.Random, temperatures) -> list[SampleRow]:
    rows = []
    for number in range(count):
        options = {**rng.choice(FILTERS), **rng.choice(ADJUSTMENTS)}
        bad = options.pop("bad", False)
        output = [rng.randrange(max(width - 9, 1)) for _ in range(rng.randrange(12))]
        rows.append(
            SampleRow(
                params=SamplingParams(
                    temperature=rng.choice(temperatures), max_tokens=None, **options
                ),
                seed=rng.getrandbits(64),
                index=len(output),
                prompt_ids=[rng.randrange(width) for _ in range(9)],
                counts=Counter(output),
                recent=output,
                stop_ids=(0, width - 1),
                bad_words=[(2,), (*output[-2:], number % width)] if bad else [],
            )
        )
    return rows


@pytest.mark.parametrize(("width", "defined"), [(1, 1), (5, 4), (63, 63), (130, 130), (1000, 991)])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_same_tokens_as_the_plain_sampler(width, defined, spread):
    rng = random.Random(width + int(spread))
    generator = torch.Generator().manual_seed(width)
    rows = rows_for(width, 160, rng, [0.0, 0.3, 0.7, 1.0, 1.7])
    logits = torch.randn(len(rows), width, generator=generator) * spread
    for bound in (None, 1e-6, 0.02):
        wanted, rivals = sampler.choose(logits, rows, defined_ids=defined, tie_bound=bound)
        found, close = native_sampler.choose(logits, rows, defined_ids=defined, tie_bound=bound)
        assert found == wanted
        # A candidate right on the edge of the slack may fall to either side.
        differ = sum(bool(others) != near for others, near in zip(rivals, close, strict=True))
        assert differ <= (0 if bound is None else 2), bound


def test_equal_scores_fall_to_the_lower_id():
    rng = random.Random(3)
    rows = rows_for(97, 200, rng, [0.0, 0.5, 1.0])
    # Few distinct values, so that places are shared everywhere, also at the edge of top_k.
    logits = torch.randint(0, 4, (len(rows), 97), generator=torch.Generator().manual_seed(0))
    wanted, _ = sampler.choose(logits.float(), rows, defined_ids=97, tie_bound=None)
    found, _ = native_sampler.choose(logits.float(), rows, defined_ids=97, tie_bound=None)
    assert found == wanted


def test_masks_forbid_before_everything_else():
    width, rng = 203, random.Random(5)
    rows = rows_for(width, 120, rng, [0.0, 0.8])
    logits = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(1)) * 3
    allowed = torch.rand(len(rows), width, generator=torch.Generator().manual_seed(2)) < 0.3
    allowed[:, 17] = True
    for row, bits in zip(rows, allowed.numpy(), strict=True):
        row.mask = np.packbits(np.pad(bits, (0, -width % 32)), bitorder="little").view(np.uint32)
    rows[3].mask = None
    # Nothing but banned tokens is allowed here: the bans give way.
    rows[4].mask = np.zeros(7, np.uint32)
    rows[4].mask[0] = 1 << 2
    rows[4].bad_words = [(2,)]
    wanted, _ = sampler.choose(logits, rows, defined_ids=width, tie_bound=None)
    found, _ = native_sampler.choose(logits, rows, defined_ids=width, tie_bound=None)
    assert found == wanted
    assert found[4] == 2


def test_noise_has_the_same_bits():
    seeds, indices = [0, 5, (1 << 64) - 1, 1 << 40], [0, 3, 900, 1 << 31]
    ids = torch.tensor([0, 1, 151_935])
    for seed, index in itertools.product(seeds, indices):
        wanted = sampler.gumbel_noise(seeds=[seed], indices=[index], ids=ids[None])[0].tolist()
        found = [native.load().gumbel_noise(seed, index, i) for i in ids.tolist()]
        assert found == wanted


def test_unfiltered_sampling_looks_at_every_token():
    """Flat scores: no token can be ruled out by its score, each wins about as often."""
    width, draws = 500, 4000
    params = SamplingParams(temperature=1.0)
    rows = [SampleRow(params=params, seed=s, index=0) for s in range(draws)]
    logits = torch.zeros(draws, width)
    found = native_sampler.sample(logits, rows, defined_ids=width)
    assert found == sampler.sample(logits, rows, defined_ids=width)
    chi2 = sum((n - draws / width) ** 2 for n in Counter(found).values()) * width / draws
    chi2 += (width - len(set(found))) * draws / width
    assert chi2 < 614  # 499 degrees of freedom, p = 0.0003


def test_log_probabilities():
    logits = torch.randn(40, 777, generator=torch.Generator().manual_seed(4)) * 5
    logits[0, :5] = logits[0].max()
    tokens, tops = [r * 7 % 777 for r in range(40)], [r % 21 for r in range(40)]
    wanted = sampler.logprobs_of(logits, tokens, tops)
    found = native_sampler.logprobs_of(logits, tokens, tops)
    for one, other in zip(found, wanted, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert len(one.top) == len(other.top)
        values = [value for _, value in other.top]
        assert [value for _, value in one.top] == pytest.approx(values, abs=1e-5)
    assert [i for i, _ in found[20].top] == [i for i, _ in wanted[20].top]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_choices_do_not_depend_on_threads_or_instruction_set(threads):
    module = native.load()
    before = module.threads(), module.isa()
    rows = rows_for(600, 60, random.Random(8), [0.0, 0.6, 1.0])
    logits = torch.randn(60, 600, generator=torch.Generator().manual_seed(6)) * 4
    wanted = native_sampler.choose(logits, rows, defined_ids=600, tie_bound=1e-5)
    try:
        module.set_threads(threads)
        for isa in ("scalar", before[1]):
            module.set_isa(isa)
            assert native_sampler.choose(logits, rows, defined_ids=600, tie_bound=1e-5) == wanted
    finally:
        module.set_threads(before[0])
        module.set_isa(before[1])


def test_shapes_are_checked():
    module = native.load()
    with pytest.raises(ValueError, match="R choosers"):
        module.choose(np.zeros((2, 8), np.float32), [], None, 8, -1.0)
    with pytest.raises(ValueError, match="no such token"):
        module.log_probabilities(np.zeros((1, 8), np.float32), [8], [0])


def test_the_best_scores_are_those_of_a_sort(kernels):
    """Largest first, of equals the lower id, numbers that are none left out."""
    generator = torch.Generator().manual_seed(3)
    for width in (1, 63, 64, 65, 1000, 6144):
        logits_V = (torch.randn(width, generator=generator) * 3).round() / 4
        logits_V[5::11] = float("nan")
        scores = logits_V.tolist()
        right = sorted(
            (t for t in range(width) if scores[t] == scores[t]), key=lambda t: (-scores[t], t)
        )
        for most in (0, 1, 32, width, width + 1):
            ids, values = kernels.best_scores(logits_V.numpy(), width, most)
            assert ids == right[:most]
            assert values == [scores[t] for t in ids]
    with pytest.raises(ValueError, match="best_scores"):
        kernels.best_scores(logits_V.numpy(), 6145, 1)
