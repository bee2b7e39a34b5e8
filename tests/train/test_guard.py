"""The guard's verdicts, and that it decides the same after a resume."""

import json
import math

import pytest
import torch
from torch import nn

from qnext.train.guard import FirstBad, GuardState, bad_place, bad_weight
from qnext.train.recipe import Guard


def feed(state: GuardState, values: list[tuple[float, float]]) -> list[str]:
    begin = feed.step  # type: ignore[attr-defined]
    feed.step += len(values)  # type: ignore[attr-defined]
    return [
        state.judge(begin + i, (0, begin + i), loss, norm) for i, (loss, norm) in enumerate(values)
    ]


@pytest.fixture
def calm() -> GuardState:
    """After forty steps with a little noise."""
    feed.step = 1  # type: ignore[attr-defined]
    state = GuardState(Guard())
    quiet = [(3.0 + 0.01 * (i % 5), 1.0 + 0.1 * (i % 3)) for i in range(40)]
    assert set(feed(state, quiet)) == {"fine"}
    return state


def test_one_spike_is_applied_and_remembered(calm: GuardState) -> None:
    assert feed(calm, [(4.0, 1.0), (3.0, 1.0)]) == ["suspicious", "fine"]
    assert calm.flagged == [(41, 0, 41)]


def test_a_gradient_far_above_the_usual_is_suspicious_too(calm: GuardState) -> None:
    assert feed(calm, [(3.0, 12.0)]) == ["suspicious"]


def test_two_in_a_row_go_back_and_leave_both_batches_out(calm: GuardState) -> None:
    assert feed(calm, [(4.0, 1.0), (4.0, 1.0)]) == ["suspicious", "roll back"]
    assert calm.skipped == {(0, 41), (0, 42)}


def test_three_within_fifty_go_back(calm: GuardState) -> None:
    values = [(4.0, 1.0), (3.0, 1.0)] * 2 + [(4.0, 1.0)]
    assert feed(calm, values)[-1] == "roll back"
    assert calm.skipped == {(0, 41), (0, 43), (0, 45)}


def test_old_suspicions_are_forgotten(calm: GuardState) -> None:
    quiet = [(3.0, 1.0)] * 30
    values = [(4.0, 1.0), *quiet, (4.0, 1.0), *quiet, (4.0, 1.0)]
    assert "roll back" not in feed(calm, values)


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (3.0, math.inf), (math.inf, math.nan)])
def test_what_is_not_finite_is_never_applied(calm: GuardState, bad) -> None:
    windows = list(calm.losses), list(calm.norms)
    assert feed(calm, [bad]) == ["skip"]
    assert (calm.losses, calm.norms) == windows
    assert feed(calm, [bad]) == ["roll back"]


def test_nothing_is_suspicious_before_the_warm_up() -> None:
    feed.step = 1  # type: ignore[attr-defined]
    state = GuardState(Guard())
    assert set(feed(state, [(3.0, 1.0), (30.0, 40.0)] * 15)) == {"fine"}
    assert feed(state, [(math.nan, 1.0)]) == ["skip"]


def test_the_third_roll_back_within_a_thousand_steps_ends_the_run(calm: GuardState) -> None:
    verdicts = []
    for _ in range(3):
        verdicts += feed(calm, [(9.0, 1.0)] * 2)
        calm = calm.went_back(GuardState(Guard(), losses=[3.0] * 40, norms=[1.0] * 40))
    assert verdicts[1::2] == ["roll back", "roll back", "stop"]


def test_the_state_survives_json(calm: GuardState) -> None:
    feed(calm, [(4.0, 1.0), (4.0, 1.0), (4.0, 1.0)])
    back = GuardState.from_dict(Guard(), json.loads(json.dumps(calm.as_dict())))
    assert back == calm


def test_the_first_bad_module_in_forward_order_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
        with FirstBad(model) as found:
            model(torch.ones(1, 2))
    assert found.name == "output of 1"
    assert bad_weight(model) == "1.weight"
    assert not model[1]._forward_hooks


def test_the_expert_with_the_bad_gradient_is_named() -> None:
    grad = torch.zeros(5, 3, 2)
    grad[3, 0, 1] = float("nan")
    assert bad_place("mlp.experts.down_proj", grad) == "gradient of mlp.experts.down_proj[3]"
    assert bad_place("norm.weight", grad[3, 0]) == "gradient of norm.weight"
