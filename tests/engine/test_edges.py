"""Corners where lengths, pages and budgets just meet, on the real tiny model."""

import pytest
import torch
from oracle import with_oracle
from test_engine import greedy, request, run, tokens

from qnext.engine import scheduler
from qnext.engine.engine import Engine
from qnext.engine.request import Request, SamplingParams
from qnext.errors import RequestError

LONG = [int(token) for token in torch.randint(0, 500, (330,), generator=torch.manual_seed(8))]


def score(name: str, prompt: list[int], **params) -> Request:
    return Request(
        id=name, prompt_ids=tuple(prompt), params=SamplingParams(**params), score_only=True
    )


@pytest.mark.parametrize("length", [1, 2, 64, 65, 257, 330])
@pytest.mark.parametrize("drafts", [0, 2, "auto"])
def test_texts_are_scored_whatever_their_length_and_the_drafts(tiny_model, length, drafts):
    engine = Engine(tiny_model, speculative_tokens=drafts)
    engine.add(score("x", LONG[:length]))
    [event] = run(engine)["x"]
    assert event.finish_reason == "length"
    assert not event.token_ids
    logprobs = tiny_model(torch.tensor([LONG[:length]])).logits[0].log_softmax(-1)
    wanted = [float(logprobs[t, LONG[t + 1]]) for t in range(length - 1)]
    assert [one.logprob for one in event.prompt_logprobs] == pytest.approx(wanted, abs=5e-4)
    engine.prefix.clear()
    assert engine.pool.free == engine.pool.num_pages


def test_a_text_to_score_needs_no_room_for_an_answer(tiny_model):
    engine = Engine(tiny_model, max_num_seqs=1, prefix_cache=False)
    engine.pool.take(engine.pool.num_pages - 3)
    engine.pool.num_pages = 3  # as if the memory were that small
    with pytest.raises(RequestError, match="Lower max_tokens"):
        engine.add(request("x", LONG[:100], max_tokens=100))
    engine.add(score("x", LONG[:100], max_tokens=100))
    assert len(run(engine)["x"][-1].prompt_logprobs) == 99


def test_together_texts_to_score_stay_within_the_rows_of_one_step(tiny_model, monkeypatch):
    monkeypatch.setattr(scheduler, "SCORED_ROWS", 32)
    engine = Engine(tiny_model, max_num_seqs=4)
    forward, seen = engine.runner.forward, []

    def counting(works):
        seen.append(sum(len(work.rows) for work in works))
        return forward(works)

    engine.runner.forward = counting
    for number in range(4):
        engine.add(score(f"r{number}", LONG[number : number + 40]))
    assert len(run(engine)) == 4
    assert max(seen) <= 32 + 4  # and one row each of those that have a token left


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_a_snapshot_after_a_last_lone_token_is_a_good_one(tiny_model, drafts):
    """Chunks end on pages, so a prompt of one page and a token leaves a step of one token."""
    states = []
    for setting in (0, drafts):
        engine = Engine(
            tiny_model, max_num_seqs=2, max_batch_tokens=64, speculative_tokens=setting,
            snapshot_interval=65,
        )  # fmt: skip
        # So long that its end does not take the place of what lies before.
        engine.add(request("first", LONG[:65], max_tokens=70))
        run(engine)
        snapshot = engine.prefix.match(LONG[:90]).snapshot
        assert snapshot.length == 65
        states.append(engine.runner.cache.recurrent[:, snapshot.slot])
    assert float(states[0].abs().max()) > 0.1
    torch.testing.assert_close(states[1], states[0], atol=1e-4, rtol=1e-4)
    engine.add(request("second", LONG[:90]))
    events = run(engine)["second"]
    assert events[-1].usage.cached_tokens == 65
    assert tokens(events) == greedy(tiny_model, LONG[:90], 8)


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("length", range(50, 64))
def test_drafts_that_reach_into_the_next_page_find_it_there(tiny_model, drafts, length):
    prompt = LONG[:length]
    truth = {tuple(LONG[n : n + length]): greedy(tiny_model, LONG[n : n + length], 18)
             for n in (0, 70)}  # fmt: skip
    engine = Engine(tiny_model, speculative_tokens=drafts, prefix_cache=False)
    with_oracle(engine, truth, 1.0)
    for number, prompt in enumerate(truth):
        engine.add(request(f"r{number}", list(prompt), max_tokens=18))
    events = run(engine)
    assert [tokens(events[f"r{n}"]) for n in range(2)] == list(truth.values())


def test_a_higher_class_is_not_parked_for_a_lower_one(tiny_model):
    engine = Engine(tiny_model, max_num_seqs=4)
    params = SamplingParams(temperature=0.0, max_tokens=50)
    for name, priority in (("first", 0), ("second", 0), ("low", 1)):
        engine.add(Request(id=name, prompt_ids=(1, 2, 3), params=params, priority=priority))
    engine.step()
    first, second, low = engine.scheduler.running
    second.ran = scheduler.MIN_RUN_TOKENS
    assert engine.scheduler._victim() is low
    low.request = second.request
    assert engine.scheduler._victim() is second
    assert engine.scheduler._victim() is not first


def test_the_cache_is_not_emptied_where_that_would_not_help(tiny_model):
    engine = Engine(tiny_model, max_num_seqs=2)
    engine.add(request("x", LONG[:130], max_tokens=1))
    run(engine)
    engine.add(request("y", LONG[:150], max_tokens=100))
    engine.step()
    kept = len(engine.prefix)
    assert kept > 0
    assert not engine.scheduler._have(engine.pool.num_pages)
    assert len(engine.prefix) == kept


def test_a_clock_that_stands_still_decides_nothing(tiny_model):
    engine = Engine(tiny_model, speculative_tokens="auto", clock=lambda: 0.0)
    engine.add(request("x", LONG[:20], max_tokens=20))
    assert tokens(run(engine)["x"]) == greedy(tiny_model, LONG[:20], 20)


def test_words_may_be_banned_that_cannot_be_said(tiny_model):
    engine = Engine(tiny_model, defined_ids=100)
    banned = request("x", LONG[:5], max_tokens=3)
    object.__setattr__(banned, "bad_ids", ((400,), (1, 400)))
    engine.add(banned)
    assert len(tokens(run(engine)["x"])) == 3
    beyond = request("y", LONG[:5])
    object.__setattr__(beyond, "bad_ids", ((512,),))
    with pytest.raises(RequestError, match="bad_words: id 512 is outside"):
        engine.add(beyond)


def test_a_parked_answer_does_not_score_its_prompt_again(tiny_model):
    engine = Engine(tiny_model, max_num_seqs=2)
    engine.add(request("x", LONG[:100], max_tokens=20, prompt_logprobs=0))
    events = engine.step()
    for _ in range(3):
        events += engine.step()
        [sequence] = engine.scheduler.running
        done = sequence.done
        engine.scheduler.park(sequence)
        events += engine.step()
        assert engine.scheduler.running[0].done == done + 1  # not one row more than needed
    events += run(engine)["x"]
    assert tokens(events) == greedy(tiny_model, LONG[:100], 20)
    assert sum(len(event.prompt_logprobs) for event in events) == 99


def test_being_admitted_and_parked_at_once_is_no_turn(tiny_model):
    engine = Engine(tiny_model)
    engine.add(request("x", LONG[:20]))
    [sequence] = engine.scheduler.waiting
    sequence.bypassed = 5
    engine.scheduler._admit()
    engine.scheduler.park(sequence)
    assert sequence.bypassed == 5
    engine.step()
    assert sequence.bypassed == 0
