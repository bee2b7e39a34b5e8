"""Every request says what was reused of its prompt, and why not more."""

import pytest
import torch
from test_disk_tier import Ticking, exact_model  # noqa: F401
from test_engine import request, run

from qnext.engine.engine import Engine
from qnext.engine.explain import CacheLog, Found, Used, explain

LONG = [int(token) for token in torch.randint(0, 500, (300,), generator=torch.manual_seed(6))]


def ask(engine, name, prompt, *, places=(), **params):
    one = request(name, list(prompt), **{"max_tokens": 3, **params})
    object.__setattr__(one, "places", tuple(places))
    engine.add(one)
    events = run(engine)[name]
    report = events[-1].usage.cache
    assert report is not None
    # One record, told in three places.
    assert events[-1].usage.cached_tokens == report.cached
    assert engine.scheduler.log.find(name) == report
    assert report.cached + report.matched_not_reused + report.unmatched == len(prompt)
    return report


def test_a_new_prompt_matches_nothing(tiny_model):
    report = ask(Engine(tiny_model), "x", LONG[:100])
    assert (report.cached, report.matched_not_reused, report.unmatched) == (0, 0, 100)
    assert report.reason is None
    assert report.snapshot is None
    first = report.first_unmatched
    assert (first.index, first.expected, first.got) == (0, None, LONG[0])


def test_where_prompts_part_is_named_with_both_tokens_and_the_message(tiny_model):
    engine = Engine(tiny_model)
    ask(engine, "first", LONG[:140])
    other = (LONG[90] + 1) % 500
    report = ask(
        engine, "second", [*LONG[:90], other, 7],
        places=[(0, "system"), (40, "user 1"), (91, "assistant 1")],
    )  # fmt: skip
    assert (report.cached, report.matched_not_reused, report.unmatched) == (0, 90, 2)
    assert report.reason == "no_snapshot"
    first = report.first_unmatched
    assert (first.index, first.expected, first.got) == (90, LONG[90], other)
    assert first.where == "user 1"
    # The place where they parted was noted: the third finds a state there.
    report = ask(engine, "third", [*LONG[:90], 3, 4])
    assert (report.cached, report.snapshot.why, report.snapshot.tier) == (90, "branch", "memory")
    assert report.snapshot.at == 90
    assert report.reason is None


def test_the_last_token_is_always_run(tiny_model):
    engine = Engine(tiny_model)
    for _ in range(3):
        report = ask(engine, "x", LONG[:100], max_tokens=1)
    assert (report.cached, report.matched_not_reused, report.reason) == (99, 1, "last_token")
    assert report.first_unmatched is None


def test_what_had_to_go_is_remembered(tiny_model):
    clock = Ticking()
    engine = Engine(tiny_model, clock=clock)
    ask(engine, "first", LONG[:100])
    while len(engine.prefix):
        engine.prefix.evict(next(iter(engine.prefix)))
    clock.now += 60
    report = ask(engine, "again", LONG[:120])
    assert (report.cached, report.reason) == (0, "evicted")
    assert report.matched_not_reused >= 100
    assert "the stable snapshot at 99, 60 s before" in report.detail
    # A state in its place again: nothing is missing any more.
    assert ask(engine, "third", LONG[:130]).cached == 119


def test_log_probabilities_of_the_prompt_forbid_reuse(tiny_model):
    engine = Engine(tiny_model)
    ask(engine, "first", LONG[:100])
    report = ask(engine, "x", LONG[:120], prompt_logprobs=1)
    assert (report.reason, report.detail) == ("disabled", "prompt_logprobs")
    assert (report.cached, report.matched_not_reused) == (0, 100)


def test_without_a_prefix_cache_that_is_the_reason(tiny_model):
    engine = Engine(tiny_model, prefix_cache=False)
    report = ask(engine, "x", LONG[:100])
    assert (report.reason, report.detail) == ("disabled", "prefix_cache")


@pytest.fixture
def on_disk(exact_model, tmp_path):  # noqa: F811
    """A folder that knows 200 tokens, and the way to an engine that uses it."""
    engines = []

    def start():
        engines.append(Engine(exact_model, cache_dir=tmp_path, clock=Ticking()))
        return engines[-1]

    first = start()
    ask(first, "plant", LONG[:201], max_tokens=1)
    first.close()
    yield start
    for engine in engines:
        engine.close()


def test_a_state_from_disk_is_called_so(on_disk):
    engine = on_disk()
    report = ask(engine, "x", LONG[:220])
    assert (report.cached, report.snapshot.tier, report.snapshot.why) == (200, "disk", "stable")
    assert ask(engine, "y", [*LONG[:201], 1, 2]).snapshot.tier == "memory"


def test_a_disk_that_is_too_slow_is_the_reason(on_disk):
    engine = on_disk()
    engine.tier.load_time.note(1, 1000.0)
    report = ask(engine, "x", LONG[:220])
    assert (report.cached, report.matched_not_reused) == (0, 200)
    assert report.reason == "disk_slower"


def test_damage_is_the_reason(on_disk, tmp_path):
    engine = on_disk()
    for path in tmp_path.rglob("*.st"):
        path.write_bytes(path.read_bytes()[:-1])
    report = ask(engine, "x", LONG[:220])
    assert (report.cached, report.matched_not_reused) == (0, 200)
    assert report.reason == "disk_corrupt"


def test_no_room_for_what_is_on_disk_is_the_reason(on_disk):
    engine = on_disk()
    slots, engine.prefix._slots = engine.prefix._slots, []
    report = ask(engine, "x", LONG[:220])
    assert (report.cached, report.reason) == (0, "budget")
    engine.prefix._slots = slots


def test_sums_are_those_of_the_records(tiny_model):
    engine = Engine(tiny_model)
    reports = [
        ask(engine, str(n), prompt)
        for n, prompt in enumerate([LONG[:90], LONG[:120], [*LONG[:80], 1], LONG[:120]])
    ]
    counts = engine.scheduler.log.counts()
    assert counts["requests"] == 4
    assert counts["prompt_tokens"] == sum(one.prompt_tokens for one in reports)
    assert counts["cached_tokens"] == sum(one.cached for one in reports)
    assert counts["unmatched_tokens"] == sum(one.unmatched for one in reports)
    lost = {name: n for name, n in counts.items() if name.startswith("lost_tokens:")}
    assert sum(lost.values()) == sum(one.matched_not_reused for one in reports)
    assert lost["lost_tokens:no_snapshot"] == 1 + 80


def test_answers_to_one_prompt_share_a_record_that_is_counted_once(tiny_model):
    engine = Engine(tiny_model)
    for choice in range(3):
        one = request(f"c{choice}", LONG[:100], max_tokens=3)
        object.__setattr__(one, "group", "g")
        object.__setattr__(one, "choice", choice)
        engine.add(one)
    events = run(engine)
    assert {e[-1].usage.cache.prompt_tokens for e in events.values()} == {100}
    assert engine.scheduler.log.counts()["requests"] == 1
    assert engine.scheduler.log.find("c2") is not None


def test_a_log_keeps_the_last(tiny_model):
    log = CacheLog()
    report = explain((1, 2, 3), found=Found(known=0), used=None)
    for number in range(300):
        log.add(str(number), report)
    assert [name for name, _ in log.last(2)] == ["299", "298"]
    assert log.find("1") is None
    assert log.counts()["requests"] == 300


def test_a_record_adds_up_even_where_the_cache_knows_less_than_it_gave():
    used = Used(at=2, why="end", age_s=1.0, tier="memory")
    report = explain((1, 2, 3), found=Found(known=0), used=used)
    assert (report.cached, report.matched_not_reused, report.unmatched) == (2, 0, 1)
    assert report.as_dict()["snapshot"]["tier"] == "memory"
