"""Which searcher finds the best allocation at equal evaluations? Every agent and baseline on one network and budget.

    python experiments/search_agents.py --model resnet20 --weights FILE --seeds 0 1 2

One row a searcher and seed in `experiments/results/search_MODEL.csv`: wall time, evaluations a second, and the scores
of the allocation that won on the selection split (3,000 training images, never seen by the search). Rows that are
there already aren't measured again, and a killed search goes on where it was. ResNet-20, 3 seeds: about 20 minutes on
2 cores.
"""

import argparse
from pathlib import Path

import torch

from agents.search import AGENTS, SearchResult, search
from autoprune.compress import Workspace
from autoprune.config import DataConfig, NetworkConfig, SearchConfig, Settings
from autoprune.runs import RunFolder
from envs.layer_pruning import LayerPruningEnv
from experiments.tables import read_table, write_table

DETERMINISTIC = ("uniform", "sensitivity")
FIELDS = (
    "model",
    "budget",
    "searcher",
    "seed",
    "episodes",
    "evaluations",
    "seconds",
    "evaluations_per_second",
    "proxy_loss",
    "selection_loss",
    "selection_accuracy",
    "policy_selection_loss",
    "source",
    "macs_ratio",
    "threads",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budget", default="macs=50%")
    parser.add_argument(
        "--searchers", nargs="+", default=["uniform", "sensitivity", "random", "ppo", "sac", "td3", "ddpg"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--runs", type=Path, default=Path("runs/search_agents"))
    args = parser.parse_args()
    unknown = set(args.searchers) - set(AGENTS)
    if unknown:
        parser.error(f"unknown searchers {sorted(unknown)}; known: {', '.join(AGENTS)}")

    table = Path(__file__).parent / "results" / f"search_{args.model}.csv"
    config = SearchConfig(budget=args.budget, episodes=args.episodes)
    settings = Settings(NetworkConfig(args.model, args.weights), DataConfig("cifar10"), config)
    workspace = Workspace(settings)
    for name in args.searchers:
        for seed in args.seeds[:1] if name in DETERMINISTIC else args.seeds:
            if not is_known(table, args.budget, name, seed):
                result = measure(workspace, name, seed, args)
                append(table, row(args, name, seed, result, workspace))


def measure(workspace: Workspace, name: str, seed: int, args: argparse.Namespace) -> SearchResult:
    """One search in a run folder of its own, so that it can be resumed and its policy replayed."""
    search_config = SearchConfig(budget=args.budget, agent=name, episodes=args.episodes, seed=seed)
    folder = RunFolder(args.runs / f"{args.model}-{name}-{seed}")
    folder.root.mkdir(parents=True, exist_ok=True)
    env = LayerPruningEnv(workspace.model, workspace.groups, workspace.proxy(), args.budget)
    result = search(env, search_config, folder)
    if result.policy is not None:
        result.policy.save(folder.policy, network=workspace.groups.fingerprint, budget=args.budget)
    return result


def row(args: argparse.Namespace, name: str, seed: int, result: SearchResult, workspace: Workspace) -> dict:
    """The figures of one search."""
    best = result.best
    policy = [finalist.selection.loss for finalist in result.finalists if finalist.allocation.source == "policy"]
    return {
        "model": args.model,
        "budget": args.budget,
        "searcher": name,
        "seed": seed,
        "episodes": len(result.episodes),
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 1),
        "evaluations_per_second": round(result.evaluations / result.seconds, 2),
        "proxy_loss": round(best.proxy.loss, 4),
        "selection_loss": round(best.selection.loss, 4),
        "selection_accuracy": round(best.selection.accuracy, 4),
        "policy_selection_loss": round(policy[0], 4) if policy else "",
        "source": best.allocation.source,
        "macs_ratio": round(best.macs / workspace.costs.macs(workspace.costs.dense), 5),
        "threads": torch.get_num_threads(),
    }


def is_known(table: Path, budget: str, name: str, seed: int) -> bool:
    """Whether the table holds that cell."""
    return any((r["budget"], r["searcher"], r["seed"]) == (budget, name, str(seed)) for r in read_table(table))


def append(table: Path, entry: dict) -> None:
    """Adds a row, atomically."""
    write_table(table, [*read_table(table), entry], FIELDS)
    print(entry, flush=True)


if __name__ == "__main__":
    main()
