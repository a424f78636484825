r"""What is a learned policy worth on another network?

    python -m experiments.transfer --policy resnet20-dyna --model resnet56 \
        --weights FILE --seeds 0 1 2

Zero shot, the policy's one roll-out stands beside uniform pruning; where the network is
unlike what the policy knows, the measurements of the greedy allocator that helps are
among its evaluations. Then its agent searches on from it with 100 evaluations, those of
sensitivity and allocator included, as in `search_agents.py`. One row each in
`experiments/results/transfer.csv`, scored on the selection split (3,000 training images
that no search sees) before fine-tuning. Resumable row by row.

`--summary` sets every policy beside searches of its agent from scratch, which are rows
of `search_agents.py`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from autoprune.agents.finalists import (
    Finalist,
    rank_on_selection,
    roll_out,
    roll_out_policy,
)
from autoprune.agents.policy_files import find_policy
from autoprune.agents.replay import Policy
from autoprune.agents.search import search
from autoprune.config import (
    DataConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.costs.budget import Budget
from autoprune.envs.batch import uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.pipeline.context import RunContext
from autoprune.runs import RunFolder
from experiments.script import run
from experiments.search_agents import ROUND_TO, sensitivity_cost
from experiments.tables import (
    fill_table,
    mean_and_spread,
    read_table,
    rows_for_summary,
)

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "transfer.csv"
KEY = ("policy", "model", "budget", "kind", "seed")
FIELDS = (
    *KEY,
    "evaluations",
    "seconds",
    "selection_loss",
    "selection_accuracy",
    "source",
    "macs_ratio",
)
EVALUATIONS = 100
WARM = f"warm, {EVALUATIONS}"


def main() -> None:
    """Measures what the table lacks, or sums it up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policy", help="a shipped policy, a run, or a policy's folder"
    )
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights")
    parser.add_argument("--budget", default="macs=50%")
    parser.add_argument(
        "--seeds",
        nargs="*",
        type=int,
        default=[0, 1, 2],
        help="of the searches; none: zero shot only",
    )
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summarise(rows_for_summary(TABLE, parser))
    if args.policy is None or args.weights is None:
        parser.error(
            "--policy, --weights: give the policy and the trained weights of the "
            "network"
        )
    policy = Policy.load(find_policy(args.policy), "policy")
    network = NetworkConfig(args.model, args.weights)
    proxy = ProxyConfig(workers=args.workers)
    settings = Settings(network, DataConfig("cifar10"), SearchConfig(), proxy)
    context = RunContext(settings)
    kinds = [("uniform", 0), ("zero shot", 0), *((WARM, seed) for seed in args.seeds)]
    cells = []
    for kind, seed in kinds:
        values = (Path(args.policy).name, args.model, args.budget, kind, seed)
        cells.append(dict(zip(KEY, values, strict=True)))
    fill_table(TABLE, cells, lambda cell: measure(context, policy, cell, args), FIELDS)


def measure(
    context: RunContext, policy: Policy, cell: dict, args: argparse.Namespace
) -> dict:
    """One roll-out or search.

    Args:
        context: Network, images and trace.
        policy: The policy.
        cell: Which row.
        args: The script's arguments.

    Returns:
        The row without its cell.
    """
    env = LayerPruningEnv.with_suited_proxy(
        context.model,
        context.groups,
        context.proxy(),
        args.budget,
        round_to=ROUND_TO,
    )
    if cell["kind"] == WARM:
        return search_on(context, policy, env, cell, args)
    if cell["kind"] == "uniform":
        budget = env.budget
        assert isinstance(budget, Budget), "policies are compared at one budget"
        (episode,) = roll_out(uniform_policy, env, [budget], "uniform")
    else:
        episode = roll_out_policy(policy, env, env.budget)
    row = figures(rank_on_selection([episode], env)[0], env)
    return row | {"evaluations": env.proxy.evaluations}


def search_on(
    context: RunContext,
    policy: Policy,
    env: LayerPruningEnv,
    cell: dict,
    args: argparse.Namespace,
) -> dict:
    """One search from the policy, in a run folder so that it can be resumed.

    Args:
        context: Network, images and trace.
        policy: The policy to start from.
        env: Where its agent searches.
        cell: Which row.
        args: The script's arguments.

    Returns:
        The row without its cell.
    """
    stem = "-".join(str(cell[name]) for name in KEY)
    stem = stem.replace("=", "-").replace("%", "").replace(", ", "-")
    folder = RunFolder(args.runs / stem)
    folder.root.mkdir(parents=True, exist_ok=True)
    n_measured = sensitivity_cost(context)
    if policy.is_out_of_distribution(env.observer):
        # The greedy allocator halves all groups, and makes each one whole again.
        n_measured += len(env.groups) + 1
    # The last evaluation is that of the policy's own allocation.
    config = SearchConfig(
        args.budget,
        agent=policy.algorithm,
        episodes=EVALUATIONS - n_measured - 1,
        seed=cell["seed"],
        policy=args.policy,
    )
    result = search(env, config, folder)
    return figures(result.best, env) | {
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 1),
    }


def figures(finalist: Finalist, env: LayerPruningEnv) -> dict:
    """The scores of an allocation.

    Args:
        finalist: The allocation, scored.
        env: Its environment.
    """
    costs = env.space.costs
    return {
        "selection_loss": round(finalist.selection.loss, 4),
        "selection_accuracy": round(finalist.selection.accuracy, 4),
        "source": finalist.allocation.source,
        "macs_ratio": round(finalist.macs / costs.macs(costs.dense), 5),
    }


def summarise(rows: list[dict]) -> None:
    """Selection loss without learning, from the policy, and from scratch."""
    losses: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        key = (row["model"], row["budget"], row["policy"])
        by_kind = losses.setdefault(key, defaultdict(list))
        by_kind[row["kind"]].append(float(row["selection_loss"]))
    for (model, budget, policy), by_kind in losses.items():
        for row in read_table(RESULTS / f"search_{model}.csv"):
            if row["budget"] == budget and policy.endswith(f"-{row['searcher']}"):
                by_kind[f"scratch, {row['asked']}"].append(float(row["selection_loss"]))
        parts = []
        for kind, values in by_kind.items():
            parts.append(f"{kind} {mean_and_spread(values, 3)} ({len(values)})")
        print(f"{model} {budget} {policy}:  {'  '.join(parts)}")


if __name__ == "__main__":
    run(main)
