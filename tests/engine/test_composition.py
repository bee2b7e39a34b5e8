"""Every feature with every other: tokens and log-probabilities are those of the plain run.

In path-independent mode they are equal bit by bit. The rows are a covering array: any two settings
meet in one of them (any three with ``-m slow``). A failing row is printed and can be run alone.
"""

import random
from dataclasses import replace

import pytest
import torch
from covering import covering_array
from oracle import with_oracle

from qnext.engine.engine import Engine
from qnext.engine.request import Request, SamplingParams
from qnext.model.model import CausalLM
from qnext.ops import OpSpec, invariant, select

FACTORS = {
    "prefix": ("cold", "exact", "partial", "branch"),
    "chunk": (1, 7, 64, 97, None),
    "drafts": (0, 1, 2, 3, 4, "auto"),
    "batch": (1, 3, 16),
    "park": (None, 5, 16),
    "sampling": ("greedy", "seeded", "penalised"),
    "stop": (None, "token"),
    "logprobs": (None, 0, 3),
    "choices": (1, 3),
    "rollback": ("snapshots", "replay"),
    "cache": (True, False),
}
PAIRS = covering_array(FACTORS)
PROMPT = [int(token) for token in torch.randint(0, 500, (150,), generator=torch.manual_seed(9))]
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 77},
    "penalised": {
        "temperature": 1.0, "top_k": 0, "min_p": 0.01, "seed": 5, "repetition_penalty": 1.2,
        "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {3: 1.5},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def exact_model(tiny_model):
    """The tiny model with path-independent ops."""
    model = CausalLM(tiny_model.config, ops=select(OpSpec(), prefer=invariant()))
    model.load_state_dict(tiny_model.state_dict())
    return model.eval().requires_grad_(False)


def params(row, **more) -> SamplingParams:
    return SamplingParams(
        max_tokens=20, logprobs=row["logprobs"], **SETTINGS[row["sampling"]], **more
    )


def drain(engine: Engine, names, park) -> dict[str, tuple]:
    """(ids, log-probabilities, finish reason, completion tokens) of every request."""
    ids, logprobs, ends, steps = {n: [] for n in names}, {n: [] for n in names}, {}, 0
    generator = random.Random(1)
    while engine.has_work:
        steps += 1
        # A few times only: without a cache a parked prompt starts over.
        if park and steps % park == 0 and steps <= 6 * park and engine.scheduler.running:
            engine.scheduler.park(generator.choice(engine.scheduler.running))
        for event in engine.step():
            if event.request_id not in ids:
                continue
            ids[event.request_id] += event.token_ids
            logprobs[event.request_id] += event.logprobs
            if event.finish_reason:
                ends[event.request_id] = (event.finish_reason, event.usage.completion_tokens)
        assert steps < 5000
    return {n: (ids[n], logprobs[n], ends[n]) for n in names}


def requests(row, stops) -> list[Request]:
    return [
        Request(
            id=f"choice {choice}", prompt_ids=tuple(PROMPT), choice=choice,
            params=params(row, stop_token_ids=stops.get(choice, ())),
        )
        for choice in range(row["choices"])
    ]  # fmt: skip


def plain_run(model, row):
    """Each request alone, nothing switched on."""
    found, stops = {}, {}
    for request in requests(row, {}):
        engine = Engine(model, prefix_cache=False)
        engine.add(request)
        found |= drain(engine, [request.id], None)
    if row["stop"]:
        # A token that does come up ends the answer: which one is known only now.
        for choice in range(row["choices"]):
            ids = found[f"choice {choice}"][0]
            stops[choice] = (ids[9],)
        for request in requests(row, stops):
            engine = Engine(model, prefix_cache=False)
            engine.add(request)
            found |= drain(engine, [request.id], None)
    return found, stops


def composed_run(model, row, truth, stops):
    engine = Engine(
        model, max_num_seqs=16, max_batch_tokens=256, max_chunk_tokens=row["chunk"],
        speculative_tokens=row["drafts"], prefix_cache=row["cache"], rollback=row["rollback"],
    )  # fmt: skip
    generator = random.Random(2)
    if row["prefix"] != "cold":
        lengths = {"exact": [149], "partial": [100], "branch": [150]}[row["prefix"]]
        for number, length in enumerate(lengths * 2 if row["prefix"] == "branch" else lengths):
            tail = [number + 1] * 5 if row["prefix"] == "branch" else []
            shared = PROMPT[: length - 20] if tail else PROMPT[:length]
            warm = SamplingParams(temperature=0.0, max_tokens=2)
            engine.add(Request(id=f"warm {number}", prompt_ids=(*shared, *tail), params=warm))
            drain(engine, [f"warm {number}"], None)
    if row["drafts"]:
        with_oracle(engine, truth, 0.75)
    mine = requests(row, stops)
    for request in mine:
        engine.add(request)
    for number in range(row["batch"] - 1):
        other = tuple(generator.randrange(500) for _ in range(generator.randrange(1, 60)))
        truth.setdefault(other, [])
        some = SamplingParams(temperature=1.0, max_tokens=generator.randrange(1, 25))
        engine.add(Request(id=f"other {number}", prompt_ids=other, params=some))
    found = drain(engine, [request.id for request in mine], row["park"])
    engine.prefix.clear()
    assert engine.pool.free == engine.pool.num_pages
    return found


def check(model, row):
    plain, stops = plain_run(model, row)
    truth = {tuple(PROMPT): plain["choice 0"][0]}
    assert composed_run(model, row, truth, stops) == plain, row


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_any_two_features_together_change_no_bit(exact_model, number):
    check(exact_model, PAIRS[number])


@pytest.mark.slow
def test_any_three_features_together_change_no_bit(exact_model):
    for row in covering_array(FACTORS, strength=3):
        check(exact_model, row)


def test_the_array_covers_every_pair():
    for one, other in [(a, b) for a in FACTORS for b in FACTORS if a < b]:
        found = {(row[one], row[other]) for row in PAIRS}
        assert len(found) == len(FACTORS[one]) * len(FACTORS[other])


def test_the_array_would_notice_a_lost_bit(exact_model, tiny_model):
    """A positive control: with ordinary ops some row differs, so equality is not for free."""
    row = {**PAIRS[0], "chunk": 7, "logprobs": 3, "sampling": "greedy", "stop": None,
           "choices": 1, "prefix": "cold", "drafts": 2, "batch": 3}  # fmt: skip
    plain, stops = plain_run(tiny_model, row)
    composed = composed_run(tiny_model, row, {tuple(PROMPT): plain["choice 0"][0]}, stops)
    assert composed["choice 0"][0] == plain["choice 0"][0]
    assert composed != plain


def test_a_model_without_independent_rows_is_refused(tiny_model):
    from qnext.errors import BackendError

    with pytest.raises(BackendError, match="gives other bits when a prompt is split"):
        Engine(tiny_model, batch_invariant=True)


def test_the_promise_is_checked_and_kept(exact_model):
    engine = Engine(exact_model, batch_invariant=True, speculative_tokens=2)
    request = Request(id="x", prompt_ids=(1, 2, 3), params=SamplingParams(temperature=0.0))
    engine.add(replace(request, id="y"))
    assert drain(engine, ["y"], None)["y"][0]
