"""Stages fill a budget: the elastic ones give way, the fixed ones do not."""

from dataclasses import replace

import pytest
from tests.train.tiny_runs import tiny_recipe

from qnext.errors import RecipeError
from qnext.train.plan import SLACK, Budget, planned_again, steps_of


def stages():
    first, second = tiny_recipe().stages
    return (
        replace(first, tokens=64_000),
        replace(first, name="more", tokens=32_000),
        replace(second, tokens=6_400),
    )


def plan(budget, speeds=(100.0, 100.0, 50.0)):
    said: list[str] = []
    return steps_of(stages(), budget, speeds, said.append), said


def test_without_a_budget_stages_have_their_own_length() -> None:
    assert plan(None) == ([1000, 500, 100], [])


def test_elastic_stages_share_what_the_fixed_one_leaves() -> None:
    steps, said = plan(Budget(tokens=64 * 400))
    assert steps == [200, 100, 100]
    assert not said


def test_time_is_counted_at_the_speed_of_each_stage() -> None:
    # The fixed stage: 100 steps of 64 tokens at 50 a second are 128 s.
    steps, _ = plan(Budget(seconds=(128 + 192) / SLACK))
    assert steps == [200, 100, 100]


def test_too_small_a_budget_shortens_the_fixed_stages_and_says_so() -> None:
    steps, said = plan(Budget(tokens=64 * 58))
    assert steps == [4, 4, 50]
    assert "too small" in said[0]


def test_a_run_without_elastic_stages_is_scaled_as_a_whole() -> None:
    fixed = [replace(stage, elastic=False) for stage in stages()]
    assert steps_of(fixed, Budget(tokens=64 * 800), [1.0] * 3, print) == [500, 250, 50]


def test_a_budget_is_of_one_kind() -> None:
    with pytest.raises(RecipeError):
        Budget()
    with pytest.raises(RecipeError):
        Budget(seconds=1.0, tokens=1)


def test_planning_again_moves_elastic_stages_both_ways() -> None:
    _, more, fixed = stages()
    for seconds in (640, 160):
        # One step of 64 tokens a second; the fixed stage takes 128 s.
        left = (seconds + 128) / SLACK
        assert planned_again([more, fixed], [300, 100], left, (64.0, 50.0), print) == [seconds, 100]


def test_fixed_stages_are_not_stretched_and_keep_half_when_the_time_is_over() -> None:
    _, _, fixed = stages()
    assert planned_again([fixed], [100], 10_000.0, (50.0,), print) == [100]
    assert planned_again([fixed], [100], 96 / SLACK, (50.0,), print) == [75]
    assert planned_again([fixed], [100], -50.0, (50.0,), print) == [50]
