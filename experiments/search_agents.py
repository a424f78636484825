"""Which searcher finds the best allocation at equal evaluations? Every agent and
baseline on one network and budget.

    python experiments/search_agents.py --model resnet20 --weights FILE --budgets macs=50% macs=30% --seeds 0 1 2 3 4

One row a searcher, budget, seed and number of evaluations in
`experiments/results/search_MODEL.csv`: wall time, and the scores of the allocation that
won on the selection split (3,000 training images, never seen by the search). An agent
measures its groups' sensitivity first, on 64 of an evaluation's 224 images a group, and
walks that many episodes fewer. The rows of fewer evaluations are searches of their own
whose scores come from the longest one's log as far as they agree. Rows that are there
already aren't measured again, and a killed search goes on where it was. Dyna's 300 take
a core with bf16 50 s on ResNet-20, two minutes on ResNet-56 and the VGG, four on
MobileNet-V2.

`--summary` prints mean and standard deviation over the seeds instead.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from autoprune.agents.baselines import AT_ONCE
from autoprune.agents.recorder import LANES
from autoprune.agents.replay import ALGORITHMS
from autoprune.agents.search import AGENTS, SearchResult, search
from autoprune.config import (
    DataConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.proxy import SENSITIVITY_IMAGES
from autoprune.pipeline.context import Workspace
from autoprune.runs import RunFolder, write_text
from experiments.script import run
from experiments.tables import fill, mean_and_spread, measured

RESULTS = Path(__file__).parent / "results"
OF_THEIR_LENGTH = ("sensitivity", "td3", "ddpg")
"""Searchers that begin otherwise where fewer evaluations are asked for."""
KEY = ("model", "budget", "searcher", "seed", "asked")
FIELDS = (
    *KEY,
    *(
        "episodes",
        "evaluations",
        "seconds",
        "proxy_loss",
        "selection_loss",
        "selection_accuracy",
    ),
    *("policy_selection_loss", "source", "macs_ratio", "workers"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--budgets", nargs="+", default=["macs=50%"])
    parser.add_argument(
        "--searchers", nargs="+", choices=AGENTS, default=AGENTS, metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[300, 100])
    parser.add_argument("--finalists", type=int, default=5)
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="candidates scored at once (default: one a core)",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/search_agents"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    table = RESULTS / f"search_{args.model}.csv"
    if args.summary:
        return summarise(measured(table, parser))
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")

    network, proxy = (
        NetworkConfig(args.model, args.weights),
        ProxyConfig(workers=args.workers),
    )
    workspace = Workspace(
        Settings(network, DataConfig("cifar10"), SearchConfig(), proxy)
    )
    fill(table, cells(args), lambda cell: measure(workspace, cell, args), FIELDS)


def cells(args: argparse.Namespace) -> list[dict]:
    """What is to be measured: seed by seed, so that a table that isn't finished
    compares equal seeds.
    """
    return [
        dict(
            zip(
                KEY,
                (args.model, budget, name, 0 if name in AT_ONCE else seed, asked),
                strict=True,
            )
        )
        for seed in args.seeds
        for budget in args.budgets
        for name in args.searchers
        for asked in sorted(args.evaluations, reverse=True)
    ]


def measure(workspace: Workspace, cell: dict, args: argparse.Namespace) -> dict:
    """One search in a run folder of its own, so that it can be resumed and its policy
    replayed.
    """
    name, budget, asked = cell["searcher"], cell["budget"], cell["asked"]
    episodes = asked - sensitivity_cost(workspace) if name in ALGORITHMS else asked
    stem = f"{args.model}-{budget}-{name}-{cell['seed']}".replace("=", "-").replace(
        "%", ""
    )
    folder = RunFolder(args.runs / f"{stem}-{asked}")
    if not folder.root.exists():
        folder.root.mkdir(parents=True)
        longest = RunFolder(args.runs / f"{stem}-{max(args.evaluations)}")
        if longest.log.exists() and name not in OF_THEIR_LENGTH:
            alike = episodes // LANES * LANES  # the last batch may be a smaller one
            write_text(
                folder.log,
                "".join(longest.log.read_text().splitlines(keepends=True)[:alike]),
            )
    config = SearchConfig(
        budget,
        agent=name,
        episodes=episodes,
        seed=cell["seed"],
        finalists=args.finalists,
    )
    env = LayerPruningEnv(workspace.model, workspace.groups, workspace.proxy(), budget)
    result = search(env, config, folder)
    if result.policy is not None:
        result.policy.save(
            folder.policy, network=workspace.groups.fingerprint, budget=budget
        )
    return figures(result, workspace, env)


def sensitivity_cost(workspace: Workspace) -> int:
    """What measuring the sensitivity of all groups costs, in evaluations."""
    return -(
        -len(workspace.groups) * SENSITIVITY_IMAGES // workspace.settings.proxy.images
    )


def figures(result: SearchResult, workspace: Workspace, env: LayerPruningEnv) -> dict:
    """The figures of one search."""
    best = result.best
    policy = [
        finalist.selection.loss
        for finalist in result.finalists
        if finalist.allocation.source == "policy"
    ]
    return {
        "episodes": len(result.episodes),
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 1),
        "proxy_loss": round(best.proxy.loss, 4),
        "selection_loss": round(best.selection.loss, 4),
        "selection_accuracy": round(best.selection.accuracy, 4),
        "policy_selection_loss": round(policy[0], 4) if policy else "",
        "source": best.allocation.source,
        "macs_ratio": round(best.macs / workspace.costs.macs(workspace.costs.dense), 5),
        "workers": env.proxy.n_workers,
    }


def summarise(rows: list[dict]) -> None:
    """Selection loss and accuracy, mean ± standard deviation over the seeds, best first
    within a cell.
    """
    by_cell = defaultdict(list)
    for row in rows:
        by_cell[row["budget"], int(row["asked"]), row["searcher"]].append(row)
    lines = []
    for (budget, asked, name), group in by_cell.items():
        losses, accuracies = (
            np.array([float(r[k]) for r in group])
            for k in ("selection_loss", "selection_accuracy")
        )
        text = (
            f"{mean_and_spread(losses, 3)}  {accuracies.mean():.2%}  seeds {len(group)}"
        )
        lines.append(
            (budget, asked, losses.mean(), f"{budget} {asked:4d} {name:12s} {text}")
        )
    print("\n".join(line for *_, line in sorted(lines)))


if __name__ == "__main__":
    run(main)
