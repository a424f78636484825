"""A Pareto front as plain data, beside uniform pruning at the same budgets."""

from autoprune.agents.finalists import Finalist
from autoprune.envs.layer_pruning import LayerPruningEnv


def front_to_json(
    points: list[Finalist], uniform: list[Finalist], env: LayerPruningEnv
) -> dict:
    """The front of a range of budgets, for `pareto.json`.

    Args:
        points: The front, cheapest first.
        uniform: Uniform pruning at the budgets that were compared.
        env: Their environment.

    Returns:
        `metric` and `dense`, the budgeted cost and its value for the dense network;
        `front` and `uniform`, a list of points each: an allocation, as its own file
        would hold it, with its costs and scores.
    """
    dense = env.space.cost(env.space.costs.dense)
    return {
        "metric": env.space.metric,
        "dense": int(dense),
        "front": [_point(finalist, env) for finalist in points],
        "uniform": [_point(finalist, env) for finalist in uniform],
    }


def _point(finalist: Finalist, env: LayerPruningEnv) -> dict:
    """One point: where it comes from, its costs, its scores, the allocation."""
    costs = env.space.costs
    allocation = finalist.allocation.to_json()
    # Taken out here, since they come first and the rest of the allocation last.
    budget = allocation.pop("budget")
    source = allocation.pop("source")
    scores = {
        key: value
        for key, value in finalist.to_json().items()
        if key.startswith(("proxy_", "selection_"))
    }
    return {
        "budget": budget,
        "source": source,
        "cost": int(finalist.cost),
        "share": float(finalist.cost / env.space.cost(costs.dense)),
        "macs": int(finalist.macs),
        "macs_ratio": float(finalist.macs / costs.macs(costs.dense)),
        **scores,
        **allocation,
    }
