"""A Pareto front as plain data, beside uniform pruning at the same budgets."""

from autoprune.agents.finalists import Finalist
from autoprune.envs.layer_pruning import LayerPruningEnv


def pareto(
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
    lines = {"front": points, "uniform": uniform}
    return {"metric": env.space.metric, "dense": int(dense)} | {
        name: [_point(finalist, env) for finalist in line]
        for name, line in lines.items()
    }


def _point(finalist: Finalist, env: LayerPruningEnv) -> dict:
    costs, allocation = env.space.costs, finalist.allocation.to_json()
    scores = {
        key: value
        for key, value in finalist.to_json().items()
        if key.startswith(("proxy_", "selection_"))
    }
    return {
        "budget": allocation.pop("budget"),
        "source": allocation.pop("source"),
        "cost": int(finalist.cost),
        "share": float(finalist.cost / env.space.cost(costs.dense)),
        "macs": int(finalist.macs),
        "macs_ratio": float(finalist.macs / costs.macs(costs.dense)),
        **scores,
        **allocation,
    }
