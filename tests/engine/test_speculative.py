"""Drafting changes time and nothing else."""

import random

import pytest
import torch
from oracle import with_oracle
from test_engine import greedy, prompts, request, run, tokens

from qnext.engine.engine import Engine
from qnext.errors import RequestError


@pytest.mark.parametrize("rollback", ["snapshots", "replay"])
@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("rightness", [0.0, 0.5, 0.9, 1.0])
def test_greedy_output_is_that_of_plain_decoding(tiny_model, rollback, drafts, rightness):
    truth = {tuple(p): greedy(tiny_model, p, 20) for p in prompts(4, seed=11)}
    engine = Engine(
        tiny_model, max_num_seqs=3, max_batch_tokens=40, speculative_tokens=drafts,
        rollback=rollback, prefix_cache=False,
    )  # fmt: skip
    with_oracle(engine, truth, rightness)
    for number, prompt in enumerate(truth):
        engine.add(request(f"r{number}", list(prompt), max_tokens=20))
    events = run(engine)
    for number, wanted in enumerate(truth.values()):
        assert tokens(events[f"r{number}"]) == wanted
        usage = events[f"r{number}"][-1].usage
        assert usage.completion_tokens == 20
        assert usage.accepted_tokens <= usage.drafted_tokens
        if rightness == 1.0:
            assert usage.accepted_tokens == usage.drafted_tokens > 0
            assert len(events[f"r{number}"]) <= 20 // (drafts + 1) + 3
        if rightness == 0.0:
            assert usage.accepted_tokens == 0 < usage.drafted_tokens


def test_the_real_head_drafts_and_changes_nothing(tiny_model):
    prompt = prompts(1, seed=12)[0]
    engine = Engine(tiny_model, speculative_tokens=3)
    engine.add(request("x", prompt, max_tokens=24))
    events = run(engine)["x"]
    assert tokens(events) == greedy(tiny_model, prompt, 24)
    assert events[-1].usage.drafted_tokens > 0


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_accepted_drafts_may_cross_a_page_at_any_place(tiny_model, drafts):
    # The bias makes every token, and so every draft, the same one.
    settings = {"logit_bias": {7: 100.0}, "max_tokens": 70}
    engine = Engine(tiny_model, max_num_seqs=6, speculative_tokens=drafts, prefix_cache=False)
    for length in range(1, 7):
        engine.add(request(f"r{length}", [3] * length, **settings))
    for events in run(engine).values():
        assert tokens(events) == [7] * 70
        usage = events[-1].usage
        assert usage.accepted_tokens == usage.drafted_tokens > 0


@pytest.mark.parametrize("drafts", [1, 2, 4, "auto"])
def test_seeded_samples_do_not_depend_on_drafting(tiny_model, drafts):
    settings = {
        "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7, "max_tokens": 30,
        "frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1,
    }  # fmt: skip
    prompt = prompts(1, seed=13)[0]
    plain = Engine(tiny_model)
    plain.add(request("x", prompt, **settings))
    wanted = tokens(run(plain)["x"])
    engine = Engine(tiny_model, speculative_tokens=drafts)
    with_oracle(engine, {tuple(prompt): wanted}, 0.8)
    engine.add(request("x", prompt, **settings))
    events = run(engine)["x"]
    assert tokens(events) == wanted
    assert events[-1].usage.accepted_tokens > 0


def test_a_stop_inside_accepted_drafts_ends_the_answer_there(tiny_model):
    prompt = prompts(1, seed=14)[0]
    wanted = greedy(tiny_model, prompt, 20)
    for place in range(1, 12):
        stop = wanted[place]
        first = wanted.index(stop)
        engine = with_oracle(Engine(tiny_model, speculative_tokens=4), {tuple(prompt): wanted}, 1.0)
        engine.add(request("x", prompt, max_tokens=20, stop_token_ids=(stop,)))
        events = run(engine)["x"]
        assert tokens(events) == wanted[: first + 1]
        assert events[-1].finish_reason == "stop"
        assert events[-1].usage.completion_tokens == first + 1


def test_logprobs_are_the_same_with_drafts(tiny_model):
    prompt = prompts(1, seed=15)[0]
    truth = {tuple(prompt): greedy(tiny_model, prompt, 10)}
    found = []
    for drafts in (0, 3):
        engine = Engine(tiny_model, speculative_tokens=drafts)
        with_oracle(engine, truth, 0.7)
        engine.add(request("x", prompt, max_tokens=10, logprobs=2))
        found.append([item for event in run(engine)["x"] for item in event.logprobs])
    assert [one.token_id for one in found[0]] == [one.token_id for one in found[1]]
    for plain, drafted in zip(*found, strict=True):
        assert drafted.logprob == pytest.approx(plain.logprob, abs=1e-4)


def test_the_mtp_rows_are_those_of_a_fill_from_nothing(tiny_model):
    """Whatever was accepted, the MTP layer has read the true pairs of hidden row and token."""
    prompt = prompts(1, seed=16)[0]
    wanted = greedy(tiny_model, prompt, 25)
    engine = Engine(tiny_model, speculative_tokens=3, prefix_cache=False, max_batch_tokens=20)
    with_oracle(engine, {tuple(prompt): wanted}, 0.6)
    engine.add(request("x", prompt, max_tokens=25))
    while not engine.scheduler.running or len(engine.scheduler.running[0].output_ids) < 14:
        engine.step()
    [sequence] = engine.scheduler.running
    length = sequence.mtp_len
    assert length == sequence.length  # every known token has been read
    ids = torch.tensor([sequence.tokens(0, length)])
    pages = engine.runner.cache.kv[sequence.pages, -1].transpose(0, 1).flatten(1, 2)[:, :length]
    fresh = Engine(tiny_model, speculative_tokens=1, prefix_cache=False)
    fresh.add(request("y", ids[0].tolist(), max_tokens=9))
    fresh.step()
    [other] = fresh.scheduler.running
    true = fresh.runner.cache.kv[other.pages, -1].transpose(0, 1).flatten(1, 2)[:, :length]
    gap = (pages[:, 1:] - true[:, 1:]).abs().amax((0, 2, 3))
    assert float(gap.max()) < 2e-4, gap
    shifted = (pages[:, 1:-1] - true[:, 2:]).abs().amax((0, 2, 3))
    assert float(shifted.min()) > 0.01  # a row off by one would show


def test_mixed_batches_keep_everyone_right(tiny_model):
    generator = random.Random(17)
    truth = {tuple(p): greedy(tiny_model, p, 30) for p in prompts(12, seed=18)}
    engine = Engine(tiny_model, max_num_seqs=4, max_batch_tokens=24, speculative_tokens="auto")
    with_oracle(engine, truth, 0.7)
    wanted, events = {}, {}
    for number, (prompt, following) in enumerate(truth.items()):
        count = generator.randrange(1, 30)
        engine.add(request(f"r{number}", list(prompt), max_tokens=count))
        wanted[f"r{number}"] = following[:count]
        for _ in range(generator.randrange(4)):
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
    for name, more in run(engine).items():
        events.setdefault(name, []).extend(more)
    assert {name: tokens(found) for name, found in events.items()} == wanted


def test_settings_are_checked(tiny_model):
    for wrong in (5, -1, "on"):
        with pytest.raises(RequestError, match=r"speculative_tokens: expected 0 ... 4 or 'auto'"):
            Engine(tiny_model, speculative_tokens=wrong)
