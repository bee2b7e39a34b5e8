"""Under random traffic and little memory the engine loses nothing and answers everybody right."""

import pytest
from hash_session import Known, drive_seed
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from traffic import act_add, act_cancel, act_park, act_prepare

SEEDS, STEPS = 36, 250


def test_ten_thousand_steps_of_random_traffic_break_nothing(small_limits):
    sessions = [drive_seed(seed, STEPS) for seed in range(SEEDS)]
    assert sum(session.engine.steps for session in sessions) >= 10_000
    # It was the traffic that was meant: everything that can happen did.
    assert sum(session.finished for session in sessions) > 2000
    assert sum(session.reused for session in sessions) > 200
    assert sum(session.refused for session in sessions) > 20
    assert sum(session.engine.scheduler.parkings for session in sessions) > 100
    prepared = [session.engine.background.counts for session in sessions]
    assert min(sum(one.finished for one in prepared), sum(one.interrupted for one in prepared)) > 20
    reasons = {event.finish_reason for session in sessions for event in session.log}
    assert reasons == {None, "stop", "length", "cancelled"}
    taken = [sum(s.engine.policy.taken[i] for s in sessions) for i in range(4)]
    assert min(taken) > 50


def test_the_limits_of_the_product_hold_as_well():
    for seed in range(100, 104):
        drive_seed(seed, 100)


@pytest.mark.parametrize("seed", [3, 5, 11, 17])
def test_the_same_traffic_gives_the_same_plans(small_limits, seed):
    first, second = drive_seed(seed, 150), drive_seed(seed, 150)
    assert first.engine.runner.plans == second.engine.runner.plans, "S9"
    assert first.log == second.log, "S9"


class Machine(RuleBasedStateMachine):
    """Traffic as Hypothesis likes it, which then finds the shortest that breaks something."""

    def dice(self, data):
        return lambda low, high: data.draw(st.integers(low, high))

    @initialize(data=st.data())
    def set_up(self, data):
        dice = self.dice(data)
        self.session = Known(dice, seed=dice(0, 999))

    @rule(data=st.data())
    def add(self, data):
        self.session.traffic.dice = self.dice(data)
        act_add(self.session, self.session.traffic)

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.session.step()

    @precondition(lambda self: self.session.live)
    @rule(data=st.data())
    def cancel(self, data):
        act_cancel(self.session, self.dice(data))

    @rule(data=st.data())
    def park(self, data):
        act_park(self.session, self.dice(data))

    @rule(data=st.data())
    def prepare(self, data):
        self.session.traffic.dice = self.dice(data)
        act_prepare(self.session, self.session.traffic)

    @rule()
    def idle(self):
        self.session.idle()

    @rule()
    def clear(self):
        self.session.clear()

    @rule(seconds=st.floats(0, 1e4))
    def wait(self, seconds):
        self.session.engine._clock.now += seconds

    def teardown(self):
        if hasattr(self, "session"):
            self.session.end()


def test_no_sequence_of_actions_breaks_an_invariant(small_limits):
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
