"""Rewards by name; each joins the cost saved with the proxy score of the finished
network. Higher is better.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from autoprune.errors import check_known
from autoprune.evaluation.evaluate import Evaluation

TIE_BREAK = 0.05
"""Weight of the saved MACs in `weighted_sum`: a whole network's worth counts as much as
0.05 nats.
"""


@dataclass(frozen=True)
class Outcome:
    """A finished episode.

    Attributes:
        evaluation: Proxy accuracy and loss.
        macs: MACs of the pruned network.
        macs_dense: MACs of the dense network.
        accuracy_floor: Least acceptable proxy accuracy, for `accuracy_guaranteed`.
    """

    evaluation: Evaluation
    macs: int
    macs_dense: int
    accuracy_floor: float

    @property
    def macs_saved(self) -> float:
        """Share of the dense network's MACs that is gone, in [0, 1)."""
        return 1 - self.macs / self.macs_dense


@dataclass(frozen=True)
class Reward:
    """A reward and how it treats the budget.

    Attributes:
        function: Outcome to reward.
        uses_up_budget: Whether episodes end at the budget; otherwise the budget is a
            ceiling and cost is searched too.
    """

    function: Callable[[Outcome], float]
    uses_up_budget: bool = True


def weighted_sum(outcome: Outcome) -> float:
    """Negative cross-entropy plus a little for the MACs saved, which under a hard
    budget only breaks ties.

    Cross-entropy ranks sub-models on a few hundred images where accuracy still ties.
    """
    return -outcome.evaluation.loss + TIE_BREAK * outcome.macs_saved


def amc(outcome: Outcome) -> float:
    """AMC's error x log MACs (He et al. 2018, section 3.4), negated so that higher is
    better.
    """
    return -(1 - outcome.evaluation.accuracy) * math.log(outcome.macs)


def accuracy_guaranteed(outcome: Outcome) -> float:
    """The cheapest network whose proxy accuracy stays above a floor.

    At or above the floor: 1 + MACs saved, so at least 1. Below: minus the missing
    accuracy, so at most 0. Unlike AMC's reward of that purpose no network below the
    floor can ever beat one above it.
    """
    missing = outcome.accuracy_floor - outcome.evaluation.accuracy
    return 1 + outcome.macs_saved if missing <= 0 else -missing


REWARDS: dict[str, Reward] = {
    "weighted_sum": Reward(weighted_sum),
    "amc": Reward(amc),
    "accuracy_guaranteed": Reward(accuracy_guaranteed, uses_up_budget=False),
}


def reward_named(name: str) -> Reward:
    """A reward of `REWARDS`.

    Raises:
        UserError: If the name is unknown; the nearest known one is offered.
    """
    check_known("reward", name, REWARDS)
    return REWARDS[name]
