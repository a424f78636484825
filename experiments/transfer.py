"""What is a learned policy worth elsewhere? Policies trained at 50 % act at 40 % and 60 %, and on a deeper network.

    python experiments/transfer.py --weights RESNET20_FILE --to_weights RESNET56_FILE

Reads the policies that `search_agents.py` left in its run folders; none of them learns here. One row a policy and
target in `experiments/results/transfer.csv`: the cost that the allocation meets, and its scores beside uniform's on the
proxy and the selection split (both from the training set, before fine-tuning). About 2 minutes on 2 cores.
"""

import argparse
from pathlib import Path

import numpy as np

from agents.replay import Policy, replay
from autoprune.compress import Workspace
from autoprune.config import DataConfig, NetworkConfig, SearchConfig, Settings
from envs.layer_pruning import LayerPruningEnv
from experiments.tables import write_table

TRAINED_ON = "resnet20"
TARGETS = (("resnet20", "macs=40%"), ("resnet20", "macs=50%"), ("resnet20", "macs=60%"), ("resnet56", "macs=50%"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--to_weights", required=True)
    parser.add_argument("--algorithms", nargs="+", default=["ppo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/search_agents"))
    args = parser.parse_args()

    weights = {TRAINED_ON: args.weights, "resnet56": args.to_weights}
    spaces = {name: workspace(name, file) for name, file in weights.items()}
    rows = []
    for network, budget in TARGETS:
        env = make_env(spaces[network], budget)
        rows.append(uniform_row(env, network, budget))
        for name in args.algorithms:
            for seed in args.seeds:
                policy = Policy.load(args.runs / f"{TRAINED_ON}-{name}-{seed}" / "policy")
                allocation, _ = replay(policy, env)
                rows.append(
                    row(env, network, budget, f"{name} policy of {TRAINED_ON} at 50 %, seed {seed}", allocation.kept)
                )
                print(rows[-1], flush=True)
    write_table(Path(__file__).parent / "results" / "transfer.csv", rows, list(rows[0]))


def workspace(name: str, weights: str) -> Workspace:
    return Workspace(Settings(NetworkConfig(name, weights), DataConfig("cifar10"), SearchConfig()))


def make_env(space: Workspace, budget: str) -> LayerPruningEnv:
    return LayerPruningEnv(space.model, space.groups, space.proxy(), budget)


def uniform_row(env: LayerPruningEnv, network: str, budget: str) -> dict:
    env.reset()
    kept = dict(zip(env.space.costs.names, map(int, env.space.uniform(env.target)), strict=True))
    return row(env, network, budget, "uniform", kept)


def row(env: LayerPruningEnv, network: str, budget: str, allocator: str, kept: dict[str, int]) -> dict:
    """The cost and the scores of one allocation."""
    proxy, (selection,) = env.proxy(kept), env.proxy.select_all([kept])
    counts = np.array([kept[name] for name in env.space.costs.names])
    return {
        "network": network,
        "budget": budget,
        "allocator": allocator,
        "macs_ratio": round(env.space.costs.macs(counts) / env.space.costs.macs(env.space.costs.dense), 5),
        "proxy_accuracy": round(proxy.accuracy, 4),
        "proxy_loss": round(proxy.loss, 4),
        "selection_accuracy": round(selection.accuracy, 4),
        "selection_loss": round(selection.loss, 4),
    }


if __name__ == "__main__":
    main()
