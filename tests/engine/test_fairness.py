"""Nobody waits for ever, whatever stream of more urgent requests there is."""

import pytest
from hash_chain import Answer, Head, hash_engine

from qnext.engine import sequence as sequence_module
from qnext.engine.request import Request, SamplingParams
from qnext.engine.scheduler import MAX_BYPASS
from qnext.engine.sequence import CLASS_OVERTAKINGS, MAX_OVERTAKINGS
from qnext.engine.sizes import Settings

HEAD = Head(16)
SLOTS = 2


def engine_of(**changes):
    settings = {
        "num_slots": SLOTS, "num_snapshots": 2, "page_size": 4, "max_batch_tokens": 12,
        "max_model_len": 80, "vocab_size": 16, "defined_ids": 16,
    } | changes  # fmt: skip
    return hash_engine(HEAD, Settings(**settings), num_pages=60, rightness=0.5, seed=0,
                       clock=lambda: 0.0)  # fmt: skip


def add(engine, name: str, *, priority: int, prompt: int = 6, answer: int = 3) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=answer, seed=0)
    ids = tuple((sum(name.encode()) + i) % 15 for i in range(prompt))
    request = Request(id=name, prompt_ids=ids, params=params, priority=priority)
    engine.add(request)
    engine.runner.answers[name] = Answer(HEAD, request, max_model_len=80, defined_ids=16)


def flood(engine, until: str, *, priority, steps: int, prompt: int = 6) -> int | None:
    """Keep more urgent requests waiting until ``until`` ends; how many were started before."""
    number = 0
    for _ in range(steps):
        while len(engine.scheduler.waiting) < 4:
            number += 1
            add(engine, f"urgent{number}", priority=priority(number), prompt=prompt)
        for event in engine.step():
            if event.request_id == until and event.finish_reason:
                return number - 4
    return None


STREAMS = {
    "one class above": lambda number: 0,
    "far above": lambda number: -1000,
    "ever more urgent": lambda number: -number,
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_request_runs_however_many_more_urgent_ones_come(stream, slots):
    engine = engine_of(num_slots=slots)
    add(engine, "patient", priority=1, answer=10)
    started = flood(engine, "patient", priority=STREAMS[stream], steps=3000)
    assert started is not None, "it starves"
    # Those before it, those started with the last of them, and those that ran beside it.
    assert started <= MAX_OVERTAKINGS + MAX_BYPASS + slots + 12 * slots
    if stream == "one class above":
        assert started <= 2 * CLASS_OVERTAKINGS + 14 * slots


def test_without_aging_it_would_starve(monkeypatch):
    monkeypatch.setattr(sequence_module, "MAX_OVERTAKINGS", 1 << 60)
    monkeypatch.setattr(sequence_module, "CLASS_OVERTAKINGS", 1 << 60)
    engine = engine_of()
    add(engine, "patient", priority=1)
    assert flood(engine, "patient", priority=STREAMS["far above"], steps=1000) is None


def test_a_prompt_that_runs_is_not_held_up_by_more_urgent_prompts_either():
    """Rows of a step go by class too: with a slot and no rows it would starve as well."""
    engine = engine_of(num_slots=4, max_batch_tokens=8)
    add(engine, "patient", priority=5, prompt=40)
    engine.step()
    assert engine.scheduler.running
    assert flood(engine, "patient", priority=STREAMS["far above"], steps=1000, prompt=30)


def test_an_urgent_request_still_comes_first():
    engine = engine_of(num_slots=1)
    add(engine, "running", priority=0)
    engine.step()
    for name, priority in (("later", 1), ("normal", 0), ("urgent", -1)):
        add(engine, name, priority=priority)
    ended = []
    while engine.has_work:
        ended += [event.request_id for event in engine.step() if event.finish_reason]
    assert ended == ["running", "urgent", "normal", "later"]


def test_a_request_that_does_not_fit_is_looked_up_once(monkeypatch):
    engine = engine_of(num_slots=3)
    held = engine.pool.take(50)
    add(engine, "small", priority=0, prompt=10, answer=20)
    engine.step()
    add(engine, "large", priority=0, prompt=60)
    looked = []
    match = type(engine.prefix).match

    def counting(self, ids):
        looked.append(len(ids))
        return match(self, ids)

    monkeypatch.setattr(type(engine.prefix), "match", counting)
    for _ in range(10):
        engine.step()
    assert engine.scheduler.waiting
    assert looked == [60]
    engine.pool.give_back(held)
    while engine.has_work:
        engine.step()
