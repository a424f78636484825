"""What is a learned policy worth on another network: without learning, and as a start?

    python experiments/transfer.py --policy resnet20-dyna --model resnet56 --weights FILE --seeds 0 1 2

Zero shot, the policy's one roll-out stands beside uniform pruning; where the network is
unlike what the policy knows, the guide's measurements are among its evaluations. Then
its agent searches on from it with 100 evaluations, those of sensitivity and guide
included, as in `search_agents.py`. One row each in `experiments/results/transfer.csv`,
scored on the selection split (3,000 training images that no search sees) before
fine-tuning. Resumable row by row.

`--summary` sets every policy beside searches of its agent from scratch, which are rows
of `search_agents.py`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from autoprune.agents.finalists import Finalist, own, rank_on_selection, rolled_out
from autoprune.agents.policies import find_policy
from autoprune.agents.replay import Policy
from autoprune.agents.search import search
from autoprune.config import (
    DataConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.envs.batch import uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.pipeline.context import Workspace
from autoprune.runs import RunFolder
from experiments.script import run
from experiments.search_agents import sensitivity_cost
from experiments.tables import fill, mean_and_spread, measured, read_table

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
        return summarise(measured(TABLE, parser))
    if args.policy is None or args.weights is None:
        parser.error(
            "--policy, --weights: give the policy and the trained weights of the "
            "network"
        )
    policy = Policy.load(find_policy(args.policy), "--policy")
    network, proxy = (
        NetworkConfig(args.model, args.weights),
        ProxyConfig(workers=args.workers),
    )
    workspace = Workspace(
        Settings(network, DataConfig("cifar10"), SearchConfig(), proxy)
    )
    kinds = [("uniform", 0), ("zero shot", 0), *((WARM, seed) for seed in args.seeds)]
    cells = [
        dict(
            zip(
                KEY,
                (Path(args.policy).name, args.model, args.budget, kind, seed),
                strict=True,
            )
        )
        for kind, seed in kinds
    ]
    fill(TABLE, cells, lambda cell: measure(workspace, policy, cell, args), FIELDS)


def measure(
    workspace: Workspace, policy: Policy, cell: dict, args: argparse.Namespace
) -> dict:
    """One roll-out or search."""
    env = LayerPruningEnv(
        workspace.model, workspace.groups, workspace.proxy(), args.budget
    )
    if cell["kind"] == WARM:
        return searched(workspace, policy, env, cell, args)
    if cell["kind"] == "uniform":
        (episode,) = rolled_out(uniform_policy, env, [env.budget], "uniform")
    else:
        episode = own(policy, env, env.budget)
    return figures(rank_on_selection([episode], env)[0], env) | {
        "evaluations": env.proxy.evaluations
    }


def searched(
    workspace: Workspace,
    policy: Policy,
    env: LayerPruningEnv,
    cell: dict,
    args: argparse.Namespace,
) -> dict:
    """One search from the policy, in a run folder of its own so that it can be resumed."""
    stem = (
        "-".join(str(cell[name]) for name in KEY)
        .replace("=", "-")
        .replace("%", "")
        .replace(", ", "-")
    )
    folder = RunFolder(args.runs / stem)
    folder.root.mkdir(parents=True, exist_ok=True)
    measured_first = sensitivity_cost(workspace) + (
        len(env.groups) + 1
    ) * policy.is_out_of_distribution(env.observer)
    episodes = (
        EVALUATIONS - measured_first - 1
    )  # the last one is the policy's own allocation
    config = SearchConfig(
        args.budget,
        agent=policy.algorithm,
        episodes=episodes,
        seed=cell["seed"],
        policy=args.policy,
    )
    result = search(env, config, folder)
    return figures(result.best, env) | {
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 1),
    }


def figures(finalist: Finalist, env: LayerPruningEnv) -> dict:
    return {
        "selection_loss": round(finalist.selection.loss, 4),
        "selection_accuracy": round(finalist.selection.accuracy, 4),
        "source": finalist.allocation.source,
        "macs_ratio": round(
            finalist.macs / env.space.costs.macs(env.space.costs.dense), 5
        ),
    }


def summarise(rows: list[dict]) -> None:
    """Selection loss without learning, from the policy, and from scratch, mean ±
    standard deviation over the seeds.
    """
    losses: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        losses[row["model"], row["budget"], row["policy"]][row["kind"]].append(
            float(row["selection_loss"])
        )
    for (model, budget, policy), by_kind in losses.items():
        for row in read_table(RESULTS / f"search_{model}.csv"):
            if row["budget"] == budget and policy.endswith(f"-{row['searcher']}"):
                by_kind[f"scratch, {row['asked']}"].append(float(row["selection_loss"]))
        shown = (
            f"{kind} {mean_and_spread(found, 3)} ({len(found)})"
            for kind, found in by_kind.items()
        )
        print(f"{model} {budget} {policy}:  {'  '.join(shown)}")


if __name__ == "__main__":
    run(main)
