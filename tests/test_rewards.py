"""The rewards: which of two networks each one prefers."""

from math import log

import pytest

from autoprune.envs.rewards import (
    REWARDS,
    TIE_BREAK,
    Outcome,
    accuracy_guaranteed,
    amc,
    reward_named,
    weighted_sum,
)
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import Evaluation

DENSE = 1_000_000


def outcome(accuracy: float, macs: int = DENSE // 2, floor: float = 0.8) -> Outcome:
    return Outcome(Evaluation(accuracy, loss=2 * (1 - accuracy)), macs, DENSE, floor)


@pytest.mark.parametrize("name", ["weighted_sum", "amc"])
def test_more_accurate_of_two_equally_cheap_networks_is_preferred(name):
    rewards = [
        REWARDS[name].function(outcome(accuracy))
        for accuracy in (0.1, 0.5, 0.79, 0.8, 0.99)
    ]
    assert rewards == sorted(rewards)
    assert len(set(rewards)) == 5


@pytest.mark.parametrize("name", list(REWARDS))
def test_cheaper_of_two_equally_accurate_networks_is_preferred(name):
    rewards = [
        REWARDS[name].function(outcome(0.9, macs))
        for macs in (DENSE, 700_000, 300_000, 299_999)
    ]
    assert rewards == sorted(rewards)
    assert len(set(rewards)) == 4


def test_weighted_sum_is_minus_loss_and_a_tie_break_for_macs():
    assert weighted_sum(outcome(0.75, DENSE // 4)) == pytest.approx(
        -0.5 + TIE_BREAK * 0.75
    )
    assert weighted_sum(outcome(0.75, DENSE)) == pytest.approx(-0.5)
    better = Outcome(Evaluation(0.5, loss=1.0), DENSE, DENSE, 0.8)
    cheaper = Outcome(Evaluation(0.5, loss=1.0 + TIE_BREAK), 1, DENSE, 0.8)
    assert weighted_sum(better) > weighted_sum(cheaper)


def test_amc_is_error_times_log_macs():
    assert amc(outcome(0.75, 1000)) == pytest.approx(-0.25 * log(1000))
    assert amc(outcome(1.0)) == 0


def test_accuracy_guaranteed_puts_everything_above_the_floor_before_everything_below():
    above = [
        accuracy_guaranteed(outcome(accuracy, macs))
        for accuracy in (0.8, 0.9, 1.0)
        for macs in (1, DENSE)
    ]
    below = [
        accuracy_guaranteed(outcome(accuracy, macs))
        for accuracy in (0.0, 0.5, 0.7999)
        for macs in (1, DENSE)
    ]
    assert min(above) >= 1
    assert max(below) <= 0


def test_accuracy_guaranteed_ignores_accuracy_above_and_cost_below_the_floor():
    assert (
        accuracy_guaranteed(outcome(0.81)) == accuracy_guaranteed(outcome(0.99)) == 1.5
    )
    assert (
        accuracy_guaranteed(outcome(0.6, 1))
        == accuracy_guaranteed(outcome(0.6, DENSE))
        == pytest.approx(-0.2)
    )
    assert accuracy_guaranteed(outcome(0.7)) > accuracy_guaranteed(outcome(0.6))


def test_only_accuracy_guaranteed_searches_the_cost_itself():
    assert {name for name, reward in REWARDS.items() if not reward.uses_up_budget} == {
        "accuracy_guaranteed"
    }


@pytest.mark.parametrize(
    ("name", "near"),
    [("ammc", "amc"), ("accuracy_guarantied", "accuracy_guaranteed"), ("zz", "wei")],
)
def test_unknown_reward_is_refused_with_the_nearest_known(name, near):
    with pytest.raises(
        UserError,
        match=f"unknown reward '{name}'; did you mean '{near}.*Known: weighted_sum, amc",
    ):
        reward_named(name)
