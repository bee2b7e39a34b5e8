"""What the engine says follows the distribution it should, with drafts and without.

The distribution of three tokens is enumerated from the logits by a second implementation of the
filters, in plain floats, and compared with how often the engine says each three under many seeds
(Pearson's chi-square at p = 0.001; the seeds are fixed, so the outcome is too).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hash_chain import Chain, HashRunner, Head, hash_engine
from oracle import with_oracle
from test_engine import greedy, run, tokens

from qnext.engine.engine import Engine
from qnext.engine.request import Request, SamplingParams
from qnext.engine.sizes import Settings

LENGTH = 3
"""Tokens of an answer: with fewer no draft would be verified."""
SEEDS = 2500
PROMPT = (3, 1, 4, 1)
FIVE = Head(5, seed=3)


def one_in_a_thousand(freedom: int) -> float:
    """Chi-square that is exceeded with probability 0.001 (Wilson and Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.09 * math.sqrt(part)) ** 3


def next_token(
    logits: Sequence[float], params: SamplingParams, said: Sequence[int]
) -> dict[int, float]:
    """Probability of each next token by the definition of the parameters."""
    counts = Counter(said)
    scores = {
        token: (score - (token in counts) * params.presence_penalty
                - counts[token] * params.frequency_penalty) / params.temperature
        for token, score in enumerate(logits)
    }  # fmt: skip
    ranked = sorted(scores, key=lambda token: (-scores[token], token))
    weights = {token: math.exp(scores[token] - scores[ranked[0]]) for token in ranked}
    kept = [token for token in ranked if weights[token] >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    whole, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before < params.top_p:
            nucleus.append(token)
        before += weights[token] / whole
    rest = sum(weights[token] for token in nucleus)
    return {token: weights[token] / rest for token in nucleus}


def law(
    logits_after: Callable[[tuple[int, ...]], Sequence[float]], params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """Probability of every answer of ``LENGTH`` tokens."""
    found = {(): 1.0}
    for _ in range(LENGTH):
        found = {
            (*said, token): chance * p
            for said, chance in found.items()
            for token, p in next_token(logits_after(said), params, said).items()
        }
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def chi_square(answers: Counter, wanted: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """The statistic, infinite if something was said that cannot be, and what it may not exceed.

    Answers that are expected fewer than five times count as one.
    """
    if not set(answers) <= set(wanted):
        return math.inf, 0.0
    count, rare, rare_seen, statistic, cells = answers.total(), 0.0, 0, 0.0, 0
    for answer, chance in wanted.items():
        expected = count * chance
        if expected < 5:
            rare, rare_seen = rare + expected, rare_seen + answers[answer]
        else:
            statistic, cells = statistic + (answers[answer] - expected) ** 2 / expected, cells + 1
    if rare >= 1:
        statistic, cells = statistic + (rare_seen - rare) ** 2 / rare, cells + 1
    return statistic, one_in_a_thousand(cells - 1)


# -- a vocabulary of five ------------------------------------------------------------------------


class Coupled(HashRunner):
    """Drafts from a distribution of its own, which resembles the right one."""

    def _guess(self, works):
        sequences = {s.slot: s for s in self.engine.scheduler.running}
        hidden = []
        for work in works:
            sequence = sequences[work.slot]
            hidden.append(
                Chain([*sequence.tokens(0, sequence.length), *sequence.drafts]).hidden[-1]
            )
        other = [hash((5, row)) for row in range(len(hidden))]
        return 0.7 * self.head.logits(hidden) + 0.5 * self.head.logits(other)


def say_of_five(params: dict, *, drafts: int) -> Counter:
    """How often the engine said what over the model made of hashes."""
    settings = Settings(
        num_slots=32, num_snapshots=4, page_size=4, max_batch_tokens=300, max_model_len=20,
        vocab_size=5, defined_ids=5, speculative_tokens=drafts,
    )  # fmt: skip
    engine = hash_engine(FIVE, settings, num_pages=200, rightness=0, seed=1, clock=lambda: 0.0)
    engine.runner.__class__ = Coupled
    engine.runner.looks = False
    add_all(engine, params)
    said = Counter(tuple(tokens(events)) for events in run(engine).values())
    assert said.total() == SEEDS
    tried, taken = engine.policy.tried[0], engine.policy.taken[0]
    assert (tried > SEEDS / 2) == (taken > SEEDS / 2) == (drafts > 0)
    return said


def add_all(engine: Engine, params: dict) -> None:
    """The same request under many seeds."""
    for seed in range(SEEDS):
        settings = SamplingParams(seed=seed, max_tokens=LENGTH, **params)
        engine.add(Request(id=f"r{seed}", prompt_ids=PROMPT, params=settings))


def five_after(said: tuple[int, ...]) -> list[float]:
    return FIVE.logits(Chain((*PROMPT, *said)).hidden[-1:])[0].tolist()


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
        {"top_k": 4, "min_p": 0.15, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    ],
    ids=lambda params: "-".join(params) or "plain",
)
def test_every_answer_of_three_of_five_tokens_is_as_likely_as_it_should_be(params, drafts):
    said = say_of_five(params, drafts=drafts)
    statistic, limit = chi_square(said, law(five_after, SamplingParams(**params)))
    assert statistic < limit


def test_noise_that_is_used_twice_is_noticed(monkeypatch):
    row = Engine._row

    def stuck(self, sequence, drafts):
        found = row(self, sequence, drafts)
        found.index = 0
        return found

    monkeypatch.setattr(Engine, "_row", stuck)
    said = say_of_five({"top_k": 4}, drafts=0)
    statistic, limit = chi_square(said, law(five_after, SamplingParams(top_k=4)))
    assert statistic > 2 * limit


def test_drafts_that_are_believed_are_noticed(monkeypatch):
    accept = Engine._accept

    def gullible(self, sequence, sampled):
        return accept(self, sequence, [*sequence.drafts, sampled[-1]])

    monkeypatch.setattr(Engine, "_accept", gullible)
    said = say_of_five({"top_k": 4}, drafts=2)
    statistic, limit = chi_square(said, law(five_after, SamplingParams(top_k=4)))
    assert statistic > 2 * limit


# -- the tiny model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_prompt(tiny_model):
    """Logits of the tiny model after a prompt and what was said."""
    known: dict[tuple[int, ...], list[float]] = {}

    def logits(said: tuple[int, ...]) -> list[float]:
        if said not in known:
            known[said] = tiny_model(torch.tensor([[*PROMPT, *said]])).logits[0, -1].tolist()
        return known[said]

    return logits


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_tiny_model_says_everything_as_often_as_it_should(tiny_model, after_prompt, drafts):
    params = {"temperature": 0.5, "top_k": 5, "top_p": 0.95}
    engine = Engine(tiny_model, max_num_seqs=64, speculative_tokens=drafts, memory_bytes=64 << 20)
    with_oracle(engine, {PROMPT: greedy(tiny_model, list(PROMPT), LENGTH)}, 1.0)
    add_all(engine, params)
    said = Counter(tuple(tokens(events)) for events in run(engine).values())
    assert said.total() == SEEDS
    assert (engine.policy.taken[0] > SEEDS / 20) == (drafts > 0)
    statistic, limit = chi_square(said, law(after_prompt, SamplingParams(**params)))
    assert statistic < limit
