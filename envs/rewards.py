"""Rewards by name: the proxy score of a finished network and the cost it saves, joined.

Higher is better.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from autoprune.errors import check_known
from autoprune.evaluation.evaluate import Evaluation

TIE_BREAK = 0.05
"""Weight of the saved MACs in `weighted_sum`: saving all of a network's MACs counts as
much as 0.05 nats.
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
        function: From an outcome to its reward; higher is better.
        uses_up_budget: Whether episodes end at the budget; otherwise the budget is a
            ceiling, and the cost is searched too.
    """

    function: Callable[[Outcome], float]
    uses_up_budget: bool = True


def weighted_sum(outcome: Outcome) -> float:
    """Negative cross-entropy plus a little for the MACs saved.

    Cross-entropy ranks sub-models on a few hundred images where accuracy still ties.
    Under a budget that is used up the MACs only break ties.
    """
    return -outcome.evaluation.loss + TIE_BREAK * outcome.macs_saved


def amc(outcome: Outcome) -> float:
    """AMC's error times log MACs, negated so that higher is better.

    He et al. 2018, section 3.4.
    """
    return -(1 - outcome.evaluation.accuracy) * math.log(outcome.macs)


def accuracy_guaranteed(outcome: Outcome) -> float:
    """Prefers the cheapest network whose proxy accuracy stays above a floor.

    At or above the floor: 1 + MACs saved, so at least 1. Below: minus the missing
    accuracy, so at most 0. Unlike under AMC's reward of that purpose, no network below
    the floor can ever beat one above it.
    """
    missing = outcome.accuracy_floor - outcome.evaluation.accuracy
    if missing <= 0:
        return 1 + outcome.macs_saved
    return -missing


REWARDS: dict[str, Reward] = {
    "weighted_sum": Reward(weighted_sum),
    "amc": Reward(amc),
    "accuracy_guaranteed": Reward(accuracy_guaranteed, uses_up_budget=False),
}
"""Every reward by the name that `reward=` and `--reward` take.

To add one: write a function from `Outcome` to a number of which higher is better, and
enter it here. Say `uses_up_budget=False` if it weighs the cost itself, so that an
episode may end anywhere below its budget. Environment and command line then know it; a
line in the table of rewards in the environment's documentation tells users.
"""


def reward_named(name: str) -> Reward:
    """A reward of `REWARDS`.

    Raises:
        UserError: If the name is unknown; the nearest known one is offered.
    """
    check_known("reward", name, REWARDS)
    return REWARDS[name]
