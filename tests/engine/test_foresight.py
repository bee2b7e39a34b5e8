"""Requests that wait together share what their prompts begin with."""

import random

import pytest
from hash_chain import Answer, Head, hash_engine
from test_engine import greedy, request, run, tokens

from qnext.engine.engine import Engine
from qnext.engine.foresight import MAX_POINTS, Foresight, common, deepest_common, points
from qnext.engine.request import Request, SamplingParams
from qnext.engine.sizes import Settings

HEAD = Head(16)


def prefix_of(first, second) -> int:
    """How many tokens two prompts have in common, counted one by one."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def draw(dice: random.Random, many: list[tuple[int, ...]]) -> tuple[int, ...]:
    """A prompt that often begins like another one."""
    start = dice.choice(many)[: dice.randrange(40)] if many and dice.random() < 0.8 else ()
    return (*start, *(dice.randrange(3) for _ in range(dice.randrange(1, 30))))


# -- the tree --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_says_what_comparing_with_everybody_says(seed):
    dice, tree, waiting = random.Random(seed), Foresight(), []
    for _ in range(300):
        if waiting and dice.random() < 0.45:
            tree.remove(waiting.pop(dice.randrange(len(waiting))))
        else:
            waiting.append(draw(dice, waiting))
            tree.add(waiting[-1])
        ids = draw(dice, waiting)
        wanted = {}
        for other in waiting:
            length = min(prefix_of(ids, other), len(other) - 1)
            wanted[length] = wanted.get(length, 0) + 1
        assert tree.partings(ids) == wanted
        shared = sum(other[: len(ids)] == ids and len(other) > len(ids) for other in waiting)
        assert tree.sharing(ids) == shared
    for ids in waiting:
        tree.remove(ids)
    assert tree.partings((0, 1, 2)) == {}


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 39, 40, 41, 200, 1000])
def test_where_two_prompts_part(length):
    first = [i % 7 for i in range(1000)]
    second = [*first[:length], *[9] * (1000 - length)]
    for start in {0, length // 2, length}:
        assert common(first, second, start, 1000) == length
        assert common(first, second, start, length // 2 + start) <= length
    assert common(tuple(first), second[:length], 0, 1000) == length


def test_the_deepest_state_that_two_prompts_agree_up_to():
    first, second = (1, 2, 3, 4, 5), (1, 2, 3, 9, 9, 9)
    assert deepest_common(first, second, [1, 2, 3, 4]) == 3
    assert deepest_common(first, second, [4, 5]) == 0
    assert deepest_common(first, first, [3, 5]) == 3, "the last token has to run"


def test_states_are_saved_where_they_spare_enough():
    def found(partings, start=0, planned=(), least=64):
        return points(partings, start=start, planned=planned, least=least)

    assert found({0: 9, 200: 1}) == [200]
    assert found({0: 9, 63: 1}) == []
    assert found({17: 3}) == []
    assert found({17: 4}) == [17]
    assert found({10: 400}) == [], "quicker run than started from"
    assert found({17: 3, 425: 1}) == [17, 425], "those further on begin there too"
    assert found({425: 1}, start=400) == []
    assert found({425: 1}, planned=[424]) == []
    many = {100 * i: 1 for i in range(1, 10)}
    assert len(found(many)) == MAX_POINTS
    assert found(many) == [100, 200, 300, 400], "those that most go through"


# -- in the engine ---------------------------------------------------------------------------------


def tail(seed: int, count: int = 6) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(15) for _ in range(count))


BEGINNING = tail(99, 140)


class Session:
    """An engine over the model made of hashes: every answer is compared with the right one."""

    def __init__(self, **changes) -> None:
        settings = {
            "num_slots": 4, "num_snapshots": 12, "page_size": 8, "max_batch_tokens": 64,
            "max_model_len": 400, "vocab_size": 16, "defined_ids": 16,
        } | changes  # fmt: skip
        self.engine = hash_engine(
            HEAD, Settings(**settings), num_pages=400, rightness=0.5, seed=0, clock=lambda: 0.0
        )
        self.said: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.order: list[str] = []

    def add(self, name: str, ids, *, priority: int = 0, **params) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=4, seed=0, **params)
        one = Request(id=name, prompt_ids=tuple(ids), params=params, priority=priority)
        self.engine.add(one)
        self.engine.runner.answers[name] = Answer(HEAD, one, max_model_len=400, defined_ids=16)

    def step(self) -> None:
        for event in self.engine.step():
            if event.request_id not in self.said:
                self.order.append(event.request_id)
            self.said.setdefault(event.request_id, []).extend(event.token_ids)
            self.cached[event.request_id] = event.usage.cached_tokens

    def finish(self) -> dict[str, int]:
        """Run to the end; tokens that were reused, by request."""
        while self.engine.has_work:
            self.step()
        for name, said in self.said.items():
            answer = self.engine.runner.answers[name]
            assert said == answer.grow(len(said)), name
        return self.cached


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_of_those_who_come_together_one_runs_what_they_share(slots):
    session = Session(num_slots=slots)
    for n in range(10):
        session.add(f"r{n}", [*BEGINNING, *tail(n)])
    assert list(session.finish().values()) == [0, *[140] * 9]


def test_a_queue_knows_where_each_conversation_goes_on():
    """Every prompt goes on from the middle of the one before it."""
    session = Session(num_slots=2, num_snapshots=30)
    prompts = [[*BEGINNING, *tail(0, 30)]]
    for n in range(1, 5):
        prompts.append([*prompts[-1][: 140 + 10 * n], *tail(n, 40)])
    for n, ids in enumerate(prompts):
        session.add(f"r{n}", ids)
        session.add(f"other{n}", tail(50 + n, 90))
    cached = session.finish()
    assert cached["r0"] == 0
    assert all(cached[f"r{n}"] >= 140 for n in range(1, 5))
    assert all(cached[f"other{n}"] == 0 for n in range(5))


def test_one_who_comes_while_the_prompt_is_run_still_shares_what_lies_ahead():
    session = Session()
    session.add("first", [*BEGINNING, *tail(0, 60)])
    session.step()
    assert session.engine.scheduler.running[0].done == 64
    session.add("second", [*BEGINNING, *tail(1)])
    session.step()
    assert [one.request.id for one in session.engine.scheduler.waiting] == ["second"]
    cached = session.finish()
    assert cached == {"first": 0, "second": 140}


def test_one_who_comes_too_late_teaches_the_next():
    session = Session()
    session.add("first", [*BEGINNING, *tail(0, 160)])
    for _ in range(4):
        session.step()
    assert 140 < session.engine.scheduler.running[0].done < 300
    session.add("second", [*BEGINNING, *tail(1)])
    session.finish()
    session.add("third", [*BEGINNING, *tail(2)])
    assert session.finish() == {"first": 0, "second": 0, "third": 140}


def test_a_short_beginning_counts_if_many_have_it():
    session = Session(num_slots=1)
    for n in range(6):
        session.add(f"r{n}", [*BEGINNING[:17], *tail(n, 30)])
    session.add("alone", [*BEGINNING[:9], *tail(80, 30)])
    cached = session.finish()
    assert [cached[f"r{n}"] for n in range(6)] == [0, *[17] * 5]
    assert cached["alone"] == 0


def test_a_short_beginning_is_learned_from_those_that_went_before():
    session = Session(num_slots=1)
    for n in range(7):
        session.add(f"r{n}", [*BEGINNING[:17], n, *tail(n, 30)])
        session.finish()
    # Known as a place where prompts part after two; worth a state after four.
    assert [session.cached[f"r{n}"] for n in range(7)] == [0, 0, 0, 0, 0, 17, 17]


def test_the_same_prompt_twice_at_once_runs_once():
    session = Session()
    for n in range(3):
        session.add(f"r{n}", BEGINNING)
    assert list(session.finish().values()) == [0, 139, 139]


def test_nobody_waits_for_a_request_of_a_lower_class():
    session = Session(num_slots=4)
    session.add("patient", [*BEGINNING, *tail(0, 200)], priority=5)
    session.step()
    session.add("urgent", [*BEGINNING, *tail(1)], priority=0)
    session.finish()
    assert session.order == ["urgent", "patient"]


def test_who_waits_goes_on_alone_when_the_other_is_cancelled():
    session = Session()
    session.add("first", [*BEGINNING, *tail(0, 60)])
    session.add("second", [*BEGINNING, *tail(1)])
    session.step()
    assert [one.request.id for one in session.engine.scheduler.waiting] == ["second"]
    session.engine.cancel("first")
    cached = session.finish()
    assert len(session.said["second"]) == 4
    assert cached["second"] == 0


def test_without_a_prefix_cache_nobody_waits():
    session = Session(num_snapshots=0)
    for n in range(4):
        session.add(f"r{n}", [*BEGINNING, *tail(n)])
    session.step()
    assert not session.engine.scheduler.waiting
    assert set(session.finish().values()) == {0}


def test_log_probabilities_of_a_prompt_are_not_waited_for():
    session = Session()
    session.add("first", [*BEGINNING, *tail(0)])
    session.add("scored", [*BEGINNING, *tail(1)], prompt_logprobs=0)
    session.step()
    assert not session.engine.scheduler.waiting
    assert session.finish()["scored"] == 0


def test_what_somebody_waits_for_stays_however_long_it_takes():
    """Many others run in between, and there is room for few states."""
    session = Session(num_slots=1, num_snapshots=4)
    session.add("first", [*BEGINNING, *tail(0)])
    for n in range(30):
        session.add(f"other{n}", tail(100 + n, 160))
    session.add("second", [*BEGINNING, *tail(1)])
    cached = session.finish()
    assert cached["second"] == 140
    assert len([name for name, count in cached.items() if count]) == 1
    assert not any(one.awaited for one in session.engine.prefix)


def test_who_is_cancelled_is_not_awaited_any_more():
    session = Session(num_slots=1)
    session.add("first", [*BEGINNING, *tail(0)])
    session.add("second", [*BEGINNING, *tail(1)])
    for _ in range(4):
        session.step()
    [promised] = [one for one in session.engine.prefix if one.why == "queue"]
    assert promised.awaited == 1
    worth = session.engine.prefix.worth(promised)
    session.engine.cancel("second")
    session.step()
    assert promised.awaited == 0
    assert session.engine.prefix.worth(promised) < worth
    session.finish()


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_answers_are_those_of_a_cold_start(tiny_model, drafts):
    engine = Engine(tiny_model, speculative_tokens=drafts, max_batch_tokens=96)
    dice = random.Random(5)
    common_part = [dice.randrange(500) for _ in range(150)]
    asked = {}
    for n, shared in enumerate([150, 150, 110, 150, 70]):
        asked[f"r{n}"] = common_part[:shared] + [dice.randrange(500) for _ in range(9)]
        engine.add(request(f"r{n}", asked[f"r{n}"]))
    events = run(engine)
    cached = [events[name][-1].usage.cached_tokens for name in asked]
    assert cached == [0, 150, 110, 150, 70]
    for name, ids in asked.items():
        assert tokens(events[name]) == greedy(tiny_model, ids, 8)
