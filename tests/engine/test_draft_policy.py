"""What "auto" drafts: never slower than nothing, close to the best, and finding out costs little.

Everything runs in made-up worlds, in which a plain step takes one second.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from qnext.engine.speculative import (
    ATTEMPTS,
    LONGEST_REST,
    PROBE_STEPS,
    RARELY_S,
    SHARE,
    DraftPolicy,
)


@dataclass
class World:
    """A draft is accepted with chance ``rate``; verifying or making one takes ``price``."""

    rate: float
    price: float
    sequences: int = 1
    noise: float = 0.0
    answer: int = 1 << 30
    """Tokens after which other requests come, with ``prompt`` rows to read."""
    prompt: int = 0
    ruled: bool = False
    speed: Callable[[int], float] = lambda step: 1.0
    clock: float = 0.0
    plain: float = 0.0
    """What the same tokens would have taken without drafts."""
    steps: int = 0
    quiet: int = 0
    """Steps that the policy was not asked about."""
    chosen: list[int] = field(default_factory=list)

    def run(self, policy: DraftPolicy, steps: int) -> float:
        """Throughput against that of never drafting."""
        dice = random.Random(1)
        number, drafts, made, behind = 0, 0, 0.0, self.prompt
        before = self.plain, self.clock
        for _ in range(steps):
            scale = self.speed(self.steps)
            self.steps += 1
            accepted = 0
            for s in range(self.sequences):
                own = 0
                while own < drafts and dice.random() < self.rate:
                    own += 1
                policy.note(f"{s}.{number}", drafts, own)
                accepted += own
            taken = 1 + accepted / self.sequences
            verify = scale * (1.0 + self.price * drafts) * (1.0 + self.noise * dice.random())
            if not policy.quiet:
                policy.verified(self.sequences, drafts, verify, ruled=self.ruled)
            self.plain += taken * scale * (1.0 + self.noise / 2)
            made += taken
            if made >= self.answer:
                for s in range(self.sequences):
                    policy.forget(f"{s}.{number}", int(made))
                policy.mixed()
                number, made, behind = number + 1, 0.0, self.prompt
            if policy.quiet and self.sequences in policy.quiet_sizes[self.ruled]:
                policy.quiet -= 1
                self.quiet += 1
                drafts, behind = 0, 0
            else:
                drafts = policy.held(self.sequences, ruled=self.ruled)
                if drafts == 0:
                    policy.rest_quietly(self.sequences, ruled=self.ruled)
            if drafts is None or (drafts and behind > 16):
                ids = [f"{s}.{number}" for s in range(self.sequences)]
                drafts = policy.choose(ids, behind=behind * self.sequences, ruled=self.ruled)
            draft = scale * self.price * drafts * (1.0 + self.noise * dice.random())
            if drafts and behind > drafts + 1:
                draft += scale * 0.02 * behind
                policy.caught_up(self.sequences, behind * self.sequences, draft, ruled=self.ruled)
            elif drafts:
                policy.drafted(self.sequences, drafts, draft, ruled=self.ruled)
            behind = 0 if drafts else min(behind + 1, 256)
            self.clock += verify + draft
            self.chosen.append(drafts)
        return (self.plain - before[0]) / (self.clock - before[1])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("price", [0.02, 0.1, 0.3, 0.8])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"noise": 0.3},
        {"sequences": 16},
        {"answer": 8, "prompt": 40},
        {"answer": 30, "prompt": 60, "noise": 0.3, "sequences": 4},
        {"speed": lambda step: 1.0 + step // 700 % 2, "noise": 0.001},
    ],
)
def test_auto_is_never_slower_than_off(rate, price, more):
    assert World(rate, price, **more).run(DraftPolicy("auto"), 4000) >= 0.985


@pytest.mark.parametrize("sequences", [1, 16])
def test_under_rules_nothing_is_tried_where_python_alone_would_take_the_gain(sequences):
    """Of steps of a fifth of a millisecond for each sequence; of longer ones it is, and pays."""
    for step_s, drafts in ((2e-4 * sequences, False), (2e-2 * sequences, True)):
        world = World(0.9, 0.02, sequences, ruled=True, speed=lambda step, s=step_s: s)
        speed = world.run(DraftPolicy("auto"), 3000)
        assert speed > 1.5 if drafts else speed == pytest.approx(1.0)
        assert any(world.chosen[:100]) == any(world.chosen) == drafts
    free = World(0.9, 0.02, sequences, speed=lambda step: 2e-4 * sequences)
    assert free.run(DraftPolicy("auto"), 3000) > 1.5


@pytest.mark.parametrize("rate", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("sequences", [1, 4])
def test_auto_is_close_to_the_best_fixed_number(rate, sequences):
    price = 0.08
    best = max(sum(rate**i for i in range(k + 1)) / (1 + 2 * price * k) for k in range(5))
    assert World(rate, price, sequences).run(DraftPolicy("auto"), 6000) >= 0.93 * best


def test_probes_cost_a_small_share_of_the_time():
    """Drafts that are never accepted, but would pay if they were: looked at again and again."""
    world, policy = World(0.0, 0.1), DraftPolicy("auto")
    world.run(policy, 2000)
    probes, clock, drafted = policy.probe_s, world.clock, sum(world.chosen)
    world.run(policy, 20_000)
    assert sum(world.chosen) - drafted >= 3 * PROBE_STEPS
    # The time beyond plain decoding's is what was noted as the price of probes.
    assert 0 < policy.probe_s - probes <= 1.2 * SHARE * (world.clock - clock)
    assert world.clock - world.plain == pytest.approx(policy.probe_s, rel=0.1)


def test_there_are_no_probes_where_full_acceptance_would_not_pay():
    world, policy = World(1.0, 0.6), DraftPolicy("auto")
    world.run(policy, 10_000)
    assert sum(drafts > 0 for drafts in world.chosen) == PROBE_STEPS <= PROBE_STEPS * ATTEMPTS
    assert policy.rests


def test_a_rest_is_quiet_for_nearly_all_of_it():
    """Where drafting does not pay, steps are those of an engine without it: one number is asked."""
    world, policy = World(0.5, 0.3, speed=lambda step: 1e-4), DraftPolicy("auto")
    world.run(policy, 1000)
    quiet = world.quiet
    world.run(policy, 10_000)
    assert world.quiet - quiet >= 9_600


def test_probes_that_find_nothing_become_rarer_up_to_a_time():
    """A step takes a tenth of a millisecond, so seconds are many steps."""
    world, policy = World(0.0, 0.1, speed=lambda step: 1e-4), DraftPolicy("auto")
    world.run(policy, 250_000)
    probes = [i for i in range(1, 250_000) if world.chosen[i] and not world.chosen[i - 1]]
    gaps = [after - before for before, after in pairwise(probes)]
    assert min(gaps[4:7]) > 4 * max(gaps[:2])
    longest = RARELY_S / 1e-4
    assert longest < gaps[-1] < 1.05 * longest
    assert longest < gaps[-2] < 1.05 * longest


@pytest.mark.parametrize("step_s", [1e-4, 1e-2, 1.0])
def test_drafting_that_begins_to_pay_is_found(step_s):
    """Texts change: what has long been refused is accepted. The first probe after that may be
    some seconds away; as it goes well, others follow as soon as there is credit."""
    world, policy = World(0.0, 0.1, speed=lambda step: step_s), DraftPolicy("auto")
    world.run(policy, 20_000)
    world.rate = 0.95
    steps = 0
    while sum(drafts > 0 for drafts in world.chosen[-200:]) < 150:
        world.run(policy, 100)
        steps += 100
        assert steps < 1.1 * RARELY_S / step_s + 6000
    assert world.run(policy, 4000) > 1.5


def test_a_rest_goes_on_where_it_was_after_steps_of_other_sizes():
    policy = DraftPolicy("auto")
    one, many = (World(0.5, 0.3, n, speed=lambda step: 1e-4) for n in (1, 16))
    for world in (one, many):
        world.run(policy, 4000)
    before = one.quiet + many.quiet
    for _ in range(200):
        one.run(policy, 10)
        many.run(policy, 10)
    # One of ten is asked about: the first after a change of size.
    assert one.quiet + many.quiet - before >= 0.85 * 4000


def test_drafting_that_paid_long_ago_elsewhere_keeps_no_rest_from_being_quiet():
    """Nothing is quiet while both sizes come in turn: rows are kept for the one that drafts."""
    policy = DraftPolicy("auto")
    many = World(0.9, 0.02, sequences=16, speed=lambda step: 1e-4)
    one = World(0.0, 0.3, speed=lambda step: 1e-4)
    many.run(policy, 2000)
    one.run(policy, 1000)
    quiet = one.quiet
    for _ in range(20):
        many.run(policy, 50)
        one.run(policy, 50)
    assert one.quiet == quiet
    one.run(policy, 4000)
    assert policy._paces[4, False].chosen
    assert one.quiet - quiet >= 3000


def test_the_rest_of_one_request_is_short():
    """Another request may draft well: it is not kept waiting."""
    policy = DraftPolicy("auto")
    World(0.9, 0.2, answer=100).run(policy, 3000)
    bad = World(0.0, 0.2)
    bad.run(policy, 4000)
    rests = [len(rest) for rest in "".join(str(min(d, 1)) for d in bad.chosen).split("1")]
    assert max(rests) >= LONGEST_REST
    assert policy._paces[0, False].left + policy.quiet <= LONGEST_REST


def test_a_new_request_begins_with_what_others_taught():
    policy = DraftPolicy("auto")
    World(0.9, 0.05, answer=200).run(policy, 2000)
    fresh = World(0.9, 0.05)
    fresh.run(policy, 20)
    assert min(fresh.chosen) >= 1  # from the first step on


def test_a_request_that_drafts_badly_rests_alone():
    policy = DraftPolicy("auto")
    World(0.9, 0.2, answer=100).run(policy, 3000)
    bad = World(0.0, 0.2)
    bad.run(policy, 400)
    assert bad.chosen[0] > 0
    assert sum(bad.chosen[-100:]) == 0
    policy.forget("0.0", 400)
    good = World(0.9, 0.2)
    good.run(policy, 20)
    assert good.chosen[0] > 0


def test_other_batch_sizes_begin_with_what_their_neighbours_taught():
    policy = DraftPolicy("auto")
    World(0.5, 0.5, sequences=16).run(policy, 500)
    for sequences in (8, 4, 2, 1):
        world = World(0.5, 0.5, sequences)
        world.run(policy, 100)
        assert sum(world.chosen) == 0


def test_steps_with_a_grammar_are_weighed_on_their_own():
    """Drafts are dear there and cheap elsewhere; both are told apart at the same batch size."""
    policy = DraftPolicy("auto")
    cheap, dear = World(0.7, 0.05), World(0.7, 0.9, ruled=True)
    for _ in range(20):
        cheap.run(policy, 100)
        dear.run(policy, 100)
    assert sum(drafts > 0 for drafts in cheap.chosen[-1000:]) > 900
    assert sum(drafts > 0 for drafts in dear.chosen[-1000:]) == 0


def test_at_break_even_it_does_not_waver():
    world = World(0.3, 0.14, noise=0.1)
    world.run(DraftPolicy("auto"), 8000)
    turns = sum(
        bool(a) != bool(b) for a, b in zip(world.chosen[:-1], world.chosen[1:], strict=True)
    )
    assert turns <= 8000 / 100


def test_it_follows_a_machine_that_changes_its_speed():
    """Costs are shares of plain steps nearby, so a slower machine is no reason to stop."""
    world = World(0.7, 0.1, speed=lambda step: 1.0 + step // 700 % 2, noise=0.001)
    assert world.run(DraftPolicy("auto"), 6000) > 1.2


def test_outcomes_are_counted_by_position():
    policy = DraftPolicy(4)
    policy.note("x", 4, 4)
    policy.note("x", 4, 1)
    policy.note("y", 2, 0)
    policy.note("y", 0, 0)
    assert policy.tried == [3, 2, 1, 1]
    assert policy.taken == [2, 1, 1, 1]


def test_a_fixed_number_is_what_is_chosen():
    policy = DraftPolicy(3)
    assert policy.held(4) == policy.choose(["x"] * 4) == 3
    assert not policy.rests
