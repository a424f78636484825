r"""Which searcher finds the best allocation at equal evaluations?

    python -m experiments.search_agents --model resnet20 --weights FILE \
        --budgets macs=50% macs=30% --seeds 0 1 2 3 4

Every agent and baseline on one network and budget. One row a searcher, budget, seed and
number of evaluations in `experiments/results/search_MODEL.csv`: wall time, and the
scores of the allocation that won on the selection split (3,000 training images, never
seen by the search). An agent measures its groups' sensitivity first, on 64 of an
evaluation's 224 images a group, and walks that many episodes fewer. The rows of fewer
evaluations are searches of their own whose scores come from the longest one's log as
far as they agree. Rows that are there already aren't measured again, and a killed
search goes on where it was. Dyna's 300 take a core with bf16 50 s on ResNet-20, two
minutes on ResNet-56 and the VGG, four on MobileNet-V2.

`--summary` prints mean and standard deviation over the seeds instead.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.recorder import LANES
from autoprune.agents.search import AGENTS, SearchResult, search
from autoprune.agents.searchers import DETERMINISTIC
from autoprune.config import (
    DataConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.proxy import SENSITIVITY_IMAGES
from autoprune.files import write_text
from autoprune.pipeline.context import RunContext
from experiments.script import run, run_folder
from experiments.tables import fill_table, mean_and_spread, rows_for_summary

RESULTS = Path(__file__).parent / "results"
LENGTH_DEPENDENT = ("sensitivity", "td3", "ddpg")
"""Searchers that begin otherwise where fewer evaluations are asked for."""
ROUND_TO = 2
"""What kept counts are multiples of: in all rows the same, on any machine."""
KEY = ("model", "budget", "searcher", "seed", "asked")
FIELDS = (
    *KEY,
    "episodes",
    "evaluations",
    "seconds",
    "proxy_loss",
    "selection_loss",
    "selection_accuracy",
    "policy_selection_loss",
    "source",
    "macs_ratio",
    "workers",
)


def main() -> None:
    """Measures what the table lacks, or sums it up."""
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
        return summarise(rows_for_summary(table, parser))
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")

    network = NetworkConfig(args.model, args.weights)
    proxy = ProxyConfig(workers=args.workers)
    settings = Settings(network, DataConfig("cifar10"), SearchConfig(), proxy)
    context = RunContext(settings)
    fill_table(table, cells(args), lambda cell: measure(context, cell, args), FIELDS)


def cells(args: argparse.Namespace) -> list[dict]:
    """What is to be measured, the longest search of each first.

    Seed by seed, so that a table that isn't finished compares equal seeds.
    """
    chosen = []
    for seed in args.seeds:
        for budget in args.budgets:
            for name in args.searchers:
                # Without chance all seeds are the same.
                its_seed = 0 if name in DETERMINISTIC else seed
                for asked in sorted(args.evaluations, reverse=True):
                    values = (args.model, budget, name, its_seed, asked)
                    chosen.append(dict(zip(KEY, values, strict=True)))
    return chosen


def measure(context: RunContext, cell: dict, args: argparse.Namespace) -> dict:
    """One search in a run folder, so that it can be resumed and its policy replayed.

    Args:
        context: Network, images and trace.
        cell: Which search.
        args: The script's arguments.

    Returns:
        The row without its cell.
    """
    name = cell["searcher"]
    budget = cell["budget"]
    asked = cell["asked"]
    episodes = asked
    if name in ALGORITHMS:
        episodes -= sensitivity_cost(context)
    stem = (args.model, budget, name, cell["seed"])
    folder = run_folder(args.runs, (*stem, asked))
    if not folder.root.exists():
        folder.root.mkdir(parents=True)
        longest = run_folder(args.runs, (*stem, max(args.evaluations)))
        if longest.log.exists() and name not in LENGTH_DEPENDENT:
            # Both walk the same episodes, but for the last batch, which may be smaller.
            n_alike = episodes // LANES * LANES
            lines = longest.log.read_text().splitlines(keepends=True)
            write_text(folder.log, "".join(lines[:n_alike]))
    config = SearchConfig(
        budget,
        agent=name,
        episodes=episodes,
        seed=cell["seed"],
        finalists=args.finalists,
    )
    env = LayerPruningEnv.with_suited_proxy(
        context.model, context.groups, context.proxy(), budget, round_to=ROUND_TO
    )
    result = search(env, config, folder)
    if result.policy is not None:
        result.policy.save(
            folder.policy, network=context.groups.fingerprint, budget=budget
        )
    return figures(result, context, env)


def sensitivity_cost(context: RunContext) -> int:
    """What measuring the sensitivity of all groups costs, in evaluations."""
    n_images = len(context.groups) * SENSITIVITY_IMAGES
    return -(-n_images // context.settings.proxy.images)


def figures(result: SearchResult, context: RunContext, env: LayerPruningEnv) -> dict:
    """The figures of one search.

    Args:
        result: What it found.
        context: Network, images and trace.
        env: Where it searched.
    """
    best = result.best
    policy_loss: float | str = ""
    for finalist in result.finalists:
        if finalist.allocation.source == "policy":
            policy_loss = round(finalist.selection.loss, 4)
            break
    return {
        "episodes": len(result.episodes),
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 1),
        "proxy_loss": round(best.proxy.loss, 4),
        "selection_loss": round(best.selection.loss, 4),
        "selection_accuracy": round(best.selection.accuracy, 4),
        "policy_selection_loss": policy_loss,
        "source": best.allocation.source,
        "macs_ratio": round(best.macs / context.costs.macs(context.costs.dense), 5),
        "workers": env.proxy.n_workers,
    }


def summarise(rows: list[dict]) -> None:
    """Selection loss and accuracy over the seeds, best first within a cell."""
    by_cell = defaultdict(list)
    for row in rows:
        by_cell[row["budget"], int(row["asked"]), row["searcher"]].append(row)
    lines = []
    for (budget, asked, name), group in by_cell.items():
        losses = [float(row["selection_loss"]) for row in group]
        accuracy = np.mean([float(row["selection_accuracy"]) for row in group])
        text = f"{mean_and_spread(losses, 3)}  {accuracy:.2%}  seeds {len(group)}"
        line = f"{budget} {asked:4d} {name:12s} {text}"
        lines.append((budget, asked, np.mean(losses), line))
    print("\n".join(line for *_, line in sorted(lines)))


if __name__ == "__main__":
    run(main)
