"""Prompts run in advance are found, cost requests nothing, and leave nothing behind."""

import pytest
from test_engine import greedy, request, run, tokens
from test_prefix_reuse import LONG, one, small

from qnext.engine.background import CHUNK_TOKENS, MAX_PENDING
from qnext.engine.engine import Engine


def prepare(engine: Engine, ids: list[int]) -> int:
    """Prepare and run to the end; tokens run."""
    assert engine.background.add(ids)
    return rest(engine)


def rest(engine: Engine) -> int:
    total = 0
    while count := engine.idle_step():
        assert count <= CHUNK_TOKENS
        total += count
    assert engine.background.running is None
    return total


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_prepared_beginning_is_not_run_again(tiny_model, drafts):
    engine = Engine(tiny_model, speculative_tokens=drafts)
    assert prepare(engine, LONG[:151]) == 150
    prompt = [*LONG[:150], *LONG[20:60]]
    events = one(engine, "x", prompt)
    assert events[-1].usage.cached_tokens == 150
    assert tokens(events) == greedy(tiny_model, prompt, 8)


def test_it_goes_on_from_what_is_known(tiny_model):
    engine = Engine(tiny_model)
    one(engine, "first", LONG[:100])
    assert prepare(engine, LONG[:151]) == 51
    assert not engine.background.add(LONG[:151])  # there already
    assert not engine.background.add(LONG[:160])  # hardly more


@pytest.mark.parametrize("drafts", [0, 2])
def test_it_makes_way_for_a_request_and_helps_it(tiny_model, drafts):
    engine = Engine(tiny_model, speculative_tokens=drafts)
    assert engine.background.add(LONG[:181])
    engine.idle_step()
    prompt = [*LONG[:100], *LONG[20:60]]
    engine.add(request("x", prompt))
    assert engine.idle_step() == 0
    assert engine.background.running is None
    events = run(engine)["x"]
    assert events[-1].usage.cached_tokens == CHUNK_TOKENS
    assert tokens(events) == greedy(tiny_model, prompt, 8)
    parked = {s.length for s in engine.prefix if s.why == "parked"}
    assert rest(engine) < 181 - CHUNK_TOKENS
    counts = engine.background.counts
    assert (counts.finished, counts.interrupted, counts.dropped) == (1, 1, 0)
    left = {s.length for s in engine.prefix if s.why == "parked"}
    assert (parked, left) == ({CHUNK_TOKENS}, set())  # of no use beside the end
    assert one(engine, "y", LONG[:190])[-1].usage.cached_tokens == 180


def test_many_interruptions_leave_one_snapshot(tiny_model):
    engine = Engine(tiny_model)
    assert engine.background.add(LONG[:199])
    for number in range(3):
        engine.idle_step()
        one(engine, f"r{number}", [7, 7, 7, number], max_tokens=1)
        assert sum(s.why == "parked" for s in engine.prefix) == 1
    rest(engine)
    assert engine.background.counts.interrupted == 3
    assert engine.background.counts.tokens == 198


def test_a_request_that_runs_through_it_makes_it_needless(tiny_model):
    engine = Engine(tiny_model)
    assert engine.background.add(LONG[:101])
    one(engine, "x", LONG[:150])
    assert len(engine.background) == 0
    assert engine.background.counts.dropped == 1
    assert not engine.background.add(LONG[:101])  # said too late


def test_few_are_kept_and_none_that_cannot_run(tiny_model):
    engine = Engine(tiny_model, max_model_len=128)
    assert not engine.background.add(LONG[:150])
    for number in range(MAX_PENDING + 2):
        assert engine.background.add([number, *LONG[:50]])
    assert len(engine.background) == MAX_PENDING
    assert engine.background.counts.dropped == 3
    assert rest(engine) == MAX_PENDING * 50


def test_without_a_prefix_cache_nothing_is_prepared(tiny_model):
    engine = Engine(tiny_model, prefix_cache=False)
    assert not engine.background.add(LONG)
    assert engine.idle_step() == 0


def test_with_little_memory_requests_come_first(tiny_model):
    engine = small(tiny_model)
    assert engine.background.add(LONG)
    engine.idle_step()
    several = {f"r{n}": LONG[10 * n : 10 * n + 60] for n in range(4)}
    for name, prompt in several.items():
        engine.add(request(name, prompt, max_tokens=100, ignore_eos=True))
    events = run(engine)
    for name, prompt in several.items():
        assert tokens(events[name]) == greedy(tiny_model, prompt, 100), name
    rest(engine)
    engine.background.clear()
    engine.prefix.clear()
    assert engine.pool.free == engine.pool.num_pages
    assert engine.runner.cache.slots_free == engine.scheduler.num_slots
