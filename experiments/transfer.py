"""What is a learned policy worth on another network: without learning, and as a start?

    python experiments/transfer.py --policy FOLDER --model resnet56 --weights FILE --seeds 0 1 2

Zero shot, the policy's one roll-out stands beside uniform pruning; where the network is unlike what the policy knows,
the guide's measurements are among its evaluations. Then searches of 100 evaluations that start from it stand beside
searches of 100 and 300 from scratch. One row each in `experiments/results/transfer.csv`, scored on the selection split
(3,000 training images that no search sees) before fine-tuning. Resumable row by row.
"""

import argparse
from pathlib import Path

from agents.finalists import Finalist, judge, own, rolled_out
from agents.replay import Policy
from agents.search import search
from autoprune.config import DataConfig, NetworkConfig, ProxyConfig, SearchConfig, Settings
from autoprune.runs import RunFolder
from autoprune.workspace import Workspace
from envs.layer_pruning import LayerPruningEnv
from envs.walks import uniformly
from experiments.tables import fill

TABLE = Path(__file__).parent / "results" / "transfer.csv"
KEY = ("policy", "model", "budget", "kind", "seed")
FIELDS = (*KEY, "evaluations", "seconds", "selection_loss", "selection_accuracy", "source", "macs_ratio")
SEARCHES = {"warm, 100": (100, True), "scratch, 100": (100, False), "scratch, 300": (300, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="folder of a saved policy")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budget", default="macs=50%")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of the searches; none: zero shot only")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    network, proxy = NetworkConfig(args.model, args.weights), ProxyConfig(workers=args.workers)
    workspace = Workspace(Settings(network, DataConfig("cifar10"), SearchConfig(), proxy))
    kinds = [(kind, 0) for kind in ("uniform", "zero shot")]
    kinds += [(kind, seed) for seed in args.seeds for kind in SEARCHES]
    cells = [
        dict(zip(KEY, (args.policy.name, args.model, args.budget, kind, seed), strict=True)) for kind, seed in kinds
    ]
    fill(TABLE, cells, lambda cell: measure(workspace, cell, args), FIELDS)


def measure(workspace: Workspace, cell: dict, args: argparse.Namespace) -> dict:
    """One roll-out or search."""
    env = LayerPruningEnv(workspace.model, workspace.groups, workspace.proxy(), args.budget)
    if cell["kind"] in SEARCHES:
        return searched(env, cell, args)
    if cell["kind"] == "uniform":
        (episode,) = rolled_out(uniformly, env, [env.budget], "uniform")
    else:
        episode = own(Policy.load(args.policy), env, env.budget)
    return figures(judge([episode], env)[0], env) | {"evaluations": env.proxy.evaluations}


def searched(env: LayerPruningEnv, cell: dict, args: argparse.Namespace) -> dict:
    """One search, in a run folder of its own so that it can be resumed."""
    evaluations, is_warm = SEARCHES[cell["kind"]]
    stem = "-".join(str(cell[name]) for name in KEY).replace("=", "-").replace("%", "").replace(", ", "-")
    folder = RunFolder(args.runs / stem)
    folder.root.mkdir(parents=True, exist_ok=True)
    start = Policy.load(args.policy)
    policy = str(args.policy) if is_warm else ""
    config = SearchConfig(args.budget, agent=start.algorithm, episodes=evaluations, seed=cell["seed"], policy=policy)
    result = search(env, config, folder)
    return figures(result.best, env) | {"evaluations": result.evaluations, "seconds": round(result.seconds, 1)}


def figures(finalist: Finalist, env: LayerPruningEnv) -> dict:
    return {
        "selection_loss": round(finalist.selection.loss, 4),
        "selection_accuracy": round(finalist.selection.accuracy, 4),
        "source": finalist.allocation.source,
        "macs_ratio": round(finalist.macs / env.space.costs.macs(env.space.costs.dense), 5),
    }


if __name__ == "__main__":
    main()
