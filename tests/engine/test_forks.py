"""Several answers to one prompt: it is run once, and each answer is what it would be alone."""

import pytest
import torch
from hash_session import drive_seed
from oracle import with_oracle
from test_engine import run, tokens

from qnext.engine.engine import Engine
from qnext.engine.request import Event, Request, SamplingParams
from qnext.engine.scheduler import Scheduler

LONG = [int(token) for token in torch.randint(0, 500, (200,), generator=torch.manual_seed(5))]
SETTINGS = {"temperature": 0.9, "top_k": 30, "seed": 11, "max_tokens": 14, "logprobs": 2}


def choices(n: int, prompt: list[int], *, group: str = "g", **changes) -> list[Request]:
    params = SamplingParams(**{**SETTINGS, "n": n, **changes})
    return [
        Request(id=f"{group}{c}", prompt_ids=tuple(prompt), params=params, choice=c, group=group)
        for c in range(n)
    ]


def alone(model, requests: list[Request]) -> dict[str, list]:
    """What each is given in an engine of its own, as ungrouped request, without cache or drafts."""
    answers = {}
    for one in requests:
        engine = Engine(model, max_num_seqs=1, prefix_cache=False)
        engine.add(
            Request(id=one.id, prompt_ids=one.prompt_ids, params=one.params, choice=one.choice)
        )
        answers[one.id] = said(run(engine)[one.id])
    return answers


def said(events: list[Event]) -> list:
    """Tokens and log-probabilities to the last bit, and the reason."""
    return [
        tokens(events),
        [one for event in events for one in event.logprobs],
        [one for event in events for one in event.prompt_logprobs],
        events[-1].finish_reason,
    ]


def rows_run(engine: Engine) -> list[int]:
    """Counts the rows of every forward from now on."""
    forward, rows = engine.runner.forward, []

    def counting(works):
        rows.append(sum(len(work.ids) for work in works))
        return forward(works)

    engine.runner.forward = counting
    return rows


def all_free(engine: Engine) -> None:
    engine.prefix.clear()
    assert engine.pool.free == engine.pool.num_pages
    assert engine.runner.cache.slots_free == engine.scheduler.num_slots


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("drafts", [0, 3, "auto"])
def test_each_choice_says_what_it_says_alone_to_the_last_bit(exact_model, length, drafts):
    requests = choices(4, LONG[:length])
    wanted = alone(exact_model, requests)
    engine = Engine(exact_model, speculative_tokens=drafts, prefix_cache=False)
    with_oracle(engine, {tuple(LONG[:length]): wanted["g0"][0]}, 0.8)
    rows = rows_run(engine)
    for one in requests:
        engine.add(one)
    events = run(engine)
    assert {name: said(found) for name, found in events.items()} == wanted
    assert len({tuple(answer[0]) for answer in wanted.values()}) == 4
    # The prompt once; from then on a row per token, and the drafts.
    assert rows[0] == length
    assert sum(rows) <= length + 4 * 13 * 5
    if drafts == 0:
        assert sum(rows) == length + 4 * 13
    all_free(engine)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("drafts", [0, 2])
def test_fewer_slots_than_choices(exact_model, slots, cached, drafts):
    requests = choices(5, LONG[:100])
    engine = Engine(exact_model, max_num_seqs=slots, speculative_tokens=drafts, prefix_cache=cached)
    rows = rows_run(engine)
    for one in requests:
        engine.add(one)
    events = run(engine)
    assert {name: said(found) for name, found in events.items()} == alone(exact_model, requests)
    # The first tokens of all come with the prompt, whoever has a slot.
    assert all(len(found) >= 2 for found in events.values())
    if cached and not drafts:
        assert sum(rows) == 100 + 5 * 13
    all_free(engine)


def test_choices_share_full_pages_and_copy_the_last(exact_model):
    engine = Engine(exact_model, prefix_cache=False)
    for one in choices(3, LONG[:130]):
        engine.add(one)
    engine.step()
    first, *others = engine.scheduler.running
    assert len(others) == 2
    for other in others:
        assert other.pages[:2] == first.pages[:2]
        assert not set(other.pages[2:]) & set(first.pages[2:])
        assert other.slot != first.slot
        assert other.done == first.done == 130
    assert [engine.pool.holders(page) for page in first.pages[:3]] == [3, 3, 1]
    run(engine)
    all_free(engine)


@pytest.mark.parametrize("moment", [0, 1, 2, 4])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_cancelling_one_leaves_the_others_alone(exact_model, moment, gone):
    requests = choices(3, LONG[:100])
    engine = Engine(
        exact_model, max_num_seqs=2, max_batch_tokens=65, speculative_tokens=2
    )  # the prompt takes two steps
    for one in requests:
        engine.add(one)
    events: dict[str, list[Event]] = {}
    for _ in range(moment):
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    engine.cancel(f"g{gone}")
    for name, more in run(engine).items():
        events.setdefault(name, []).extend(more)
    wanted = alone(exact_model, requests)
    for number in range(3):
        found = events[f"g{number}"]
        if number == gone:
            assert found[-1].finish_reason == "cancelled"
            assert tokens(found) == wanted[f"g{number}"][0][: len(tokens(found))]
        else:
            assert said(found) == wanted[f"g{number}"]
    all_free(engine)


def test_choices_that_end_with_their_first_token_need_no_slot(exact_model):
    requests = choices(6, LONG[:70], max_tokens=1)
    engine = Engine(exact_model, max_num_seqs=1)
    for one in requests:
        engine.add(one)
    events = engine.step()
    assert sorted(event.request_id for event in events) == [one.id for one in requests]
    assert {e.request_id: said([e]) for e in events} == alone(exact_model, requests)
    assert not engine.has_work
    all_free(engine)


def test_stop_tokens_end_each_choice_by_itself(exact_model):
    plain = alone(exact_model, choices(3, LONG[:70]))
    stop = (plain["g0"][0][0], plain["g1"][0][3], plain["g2"][0][5])
    requests = choices(3, LONG[:70], stop_token_ids=stop)
    engine = Engine(exact_model, speculative_tokens=3)
    for one in requests:
        engine.add(one)
    found = {name: said(events) for name, events in run(engine).items()}
    assert found == alone(exact_model, requests)
    assert len({len(answer[0]) for answer in found.values()}) > 1
    all_free(engine)


def test_prompt_logprobs_are_computed_once_and_told_to_all(exact_model):
    requests = choices(3, LONG[:90], prompt_logprobs=1)
    engine = Engine(exact_model, max_batch_tokens=40)
    rows = rows_run(engine)
    for one in requests:
        engine.add(one)
    found = {name: said(events) for name, events in run(engine).items()}
    assert found == alone(exact_model, requests)
    assert all(len(answer[2]) == 89 for answer in found.values())
    assert sum(rows) == 90 + 3 * 13


@pytest.mark.parametrize("drafts", [0, 3])
def test_choices_come_back_from_parking_as_they_were(exact_model, drafts):
    """Pages for little more than one of them."""
    requests = choices(4, LONG[:100], max_tokens=60, ignore_eos=True)
    engine = Engine(exact_model, max_num_seqs=3, max_batch_tokens=64, speculative_tokens=drafts)
    spare = engine.pool.num_pages - 4
    engine.pool.take(spare)
    engine.pool.num_pages -= spare
    for one in requests:
        engine.add(one)
    found = {name: said(events) for name, events in run(engine).items()}
    assert engine.scheduler.parkings > 0
    assert found == alone(exact_model, requests)
    all_free(engine)


def test_parking_the_one_that_runs_the_prompt_starts_it_again_for_all(exact_model):
    requests = choices(3, LONG[:150])
    engine = Engine(exact_model, max_num_seqs=3, max_batch_tokens=64)
    for one in requests:
        engine.add(one)
    assert not engine.step()
    [sequence] = engine.scheduler.running
    engine.scheduler.park(sequence)
    found = {name: said(events) for name, events in run(engine).items()}
    assert found == alone(exact_model, requests)


def test_a_full_batch_lets_them_wait_in_their_turn(exact_model):
    others = [choices(1, LONG[n : n + 30], group=f"o{n}")[0] for n in range(4)]
    requests = choices(3, LONG[:100], group="g")
    engine = Engine(exact_model, max_num_seqs=2)
    for one in (*others[:2], *requests[:2], others[2], requests[2], others[3]):
        engine.add(one)
    ended = {}
    for name, events in run(engine).items():
        ended[name] = said(events)
    assert ended == alone(exact_model, [*others, *requests])
    all_free(engine)


def test_usage_tells_the_cached_part_of_the_prompt_once_for_all(exact_model):
    engine = Engine(exact_model)
    for one in choices(1, LONG[:80], group="plant"):
        engine.add(one)
    run(engine)
    for one in choices(3, LONG[:120]):
        engine.add(one)
    last = [events[-1].usage for events in run(engine).values()]
    assert [usage.cached_tokens for usage in last] == [79, 79, 79]
    assert [usage.prompt_tokens for usage in last] == [120, 120, 120]


def test_prompts_that_differ_are_no_family_whatever_the_group(exact_model):
    requests = [*choices(1, LONG[:50]), *choices(2, LONG[1:51])[1:]]
    engine = Engine(exact_model)
    for one in requests:
        engine.add(one)
    found = {name: said(events) for name, events in run(engine).items()}
    assert found == alone(exact_model, requests)


def test_random_traffic_forks_and_waits(small_limits, monkeypatch):
    """The state machine's traffic has families: both ways to go on happen in it."""
    outcomes = []
    fork = Scheduler.fork
    monkeypatch.setattr(
        Scheduler, "fork", lambda self, *args: outcomes.append(fork(self, *args)) or outcomes[-1]
    )
    for seed in range(20):
        drive_seed(seed, 120)
    assert outcomes.count(True) > 15
    assert outcomes.count(False) > 20
