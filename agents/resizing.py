"""Finalists moved to another budget, where the first turned out to be wrong."""

from dataclasses import replace

import numpy as np

from autoprune.agents.finalists import Finalist, rank_on_selection
from autoprune.agents.recorder import Episode
from autoprune.costs.budget import SingleBudget
from autoprune.costs.metrics import counts_in_order
from autoprune.envs.batch import fixed_policy
from autoprune.envs.layer_pruning import LayerPruningEnv

RESIZED = ", resized"
"""What is added to who made an allocation."""


def resize(
    finalists: list[Finalist], env: LayerPruningEnv, budget: SingleBudget
) -> list[Finalist]:
    """Shifts all sparsities of each finalist alike until a budget is met.

    Args:
        finalists: Those of a search.
        env: An environment of the budget's metric.
        budget: The budget.

    Returns:
        The finalists with new scores on the selection split, highest reward first.

    Raises:
        UserError: If the budget can't be reached.
    """
    costs = env.space.costs
    rows = []
    for finalist in finalists:
        rows.append(counts_in_order(finalist.allocation.kept, costs.names, costs.dense))
    batch = env.start_episodes([budget] * len(finalists))
    sparsities = env.space.shift_to_targets(
        1 - np.array(rows) / costs.dense, batch.state.targets
    )
    # Rounded by a walk, so that counts are allowed ones and the budget is used up.
    counts = batch.rollout(fixed_policy(sparsities)).state.kept
    episodes = []
    for finalist, row in zip(finalists, counts, strict=True):
        source = finalist.allocation.source.removesuffix(RESIZED) + RESIZED
        allocation = replace(
            finalist.allocation,
            kept=env.counts(row),
            budget=str(budget),
            source=source,
        )
        macs = costs.macs(row)
        episodes.append(Episode(0, allocation, finalist.reward, finalist.proxy, macs))
    return rank_on_selection(episodes, env)
