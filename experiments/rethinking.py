"""Is it the weights or the widths?

    python -m experiments.rethinking --seeds 0 1 2
    python -m experiments.rethinking --summary

Pruned networks fine-tuned, and trained from scratch (Liu et al. 2019, ICLR). A ResNet-8
is trained on 5,000 CIFAR-10 images, pruned to half of its MACs (the same share of every
group, by L1), and the small network then is

- `fine_tuned`: trained on from its weights, for a quarter of the dense network's
  epochs, as the paper did;
- `fine_tuned_long`: the same for as many epochs as the dense network had (Wang et al.
  2023 ask for that);
- `scratch_e`: trained from new values, drawn for the small widths, for as many epochs
  as the dense network had;
- `scratch_b`: the same for as many MACs as the dense network's training took, at most
  twice the epochs;

each with a small and a large learning rate, annealed to zero. A row a network in
`experiments/results/rethinking.csv`; the test images are read once, after the last
epoch. Rows that are there aren't measured again.
"""

import argparse
import copy
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.costs.budget import Budget
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.data.datasets import Splits, load
from autoprune.data.networks import CifarResNet, kaiming
from autoprune.evaluation.evaluate import accuracy, recalibrate
from autoprune.evaluation.importance import importance
from autoprune.structure.slicing import prune, top_channels
from autoprune.tracing.trace import trace
from autoprune.training.loop import finetune
from experiments.script import run
from experiments.tables import (
    all_cells,
    fill_table,
    mean_and_spread,
    rows_for_summary,
)

TABLE = Path(__file__).parent / "results" / "rethinking.csv"
KEY = ("arm", "lr", "seed")
FIELDS = (*KEY, "epochs", "macs_ratio", "test_dense", "test")
ARMS = ("fine_tuned", "fine_tuned_long", "scratch_e", "scratch_b")
BUDGET = "macs=50%"
DENSE_LR = 0.1
"""Learning rate of the dense network's training."""


def main() -> None:
    """Measures what the table lacks, or sums it up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.01, 0.1])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--runs", type=Path, default=Path("runs/rethinking"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summarise(rows_for_summary(TABLE, parser))
    splits = load(DataConfig("cifar10", max_train_images=5000))
    args.runs.mkdir(parents=True, exist_ok=True)
    dense = cache(lambda seed: dense_network(splits, args.epochs, seed, args.runs))
    fill_table(
        TABLE,
        all_cells({"seed": args.seeds, "arm": ARMS, "lr": args.lrs}),
        lambda cell: measure(dense(cell["seed"]), splits, cell, args),
        FIELDS,
    )


def dense_network(splits: Splits, epochs: int, seed: int, runs: Path) -> nn.Module:
    """The network that is to be pruned, trained.

    Args:
        splits: The images.
        epochs: Length of the training.
        seed: Of weights and training.
        runs: Where its checkpoint is kept.
    """
    torch.manual_seed(seed)
    return finetune(
        CifarResNet(8),
        splits.train,
        training(epochs, DENSE_LR),
        seed,
        checkpoint=runs / f"dense-{seed}.pt",
    )


def training(epochs: int, lr: float) -> FinetuneConfig:
    """The recipe of all trainings.

    Args:
        epochs: Its length.
        lr: Its learning rate.
    """
    return FinetuneConfig(epochs, 64, lr, distillation=0.0)


def measure(
    dense: nn.Module, splits: Splits, cell: dict, args: argparse.Namespace
) -> dict:
    """One small network to its test accuracy.

    Args:
        dense: The dense network, trained.
        splits: The images.
        cell: Arm, learning rate and seed.
        args: The script's arguments.

    Returns:
        The row without its cell.
    """
    pruned, share = prune_to_half(dense, splits)
    epochs = epochs_of(cell["arm"], args.epochs, share)
    if cell["arm"].startswith("scratch"):
        pruned = reinitialise(pruned, cell["seed"])
    checkpoint = args.runs / f"{cell['arm']}-{cell['lr']}-{cell['seed']}.pt"
    finetune(
        pruned,
        splits.train,
        training(epochs, cell["lr"]),
        cell["seed"],
        checkpoint=checkpoint,
    )
    scores = {
        "test_dense": round(accuracy(dense, splits.test), 4),
        "test": round(accuracy(pruned, splits.test), 4),
    }
    return {"epochs": epochs, "macs_ratio": round(share, 5)} | scores


def prune_to_half(dense: nn.Module, splits: Splits) -> tuple[nn.Module, float]:
    """The network with half of its MACs, and the exact share.

    Args:
        dense: The dense network.
        splits: The images.
    """
    groups = trace(dense, splits.example)
    costs = CostTable(groups)
    counts = SearchSpace(costs).uniform(Budget.parse(BUDGET).target(costs))
    kept = dict(zip(costs.names, counts.tolist(), strict=True))
    scores = importance("l1", dense, groups, splits.train)
    pruned = prune(dense, groups, top_channels(scores, kept))
    recalibrate(pruned, splits.calibration.inputs)
    return pruned, costs.macs(counts) / costs.macs(costs.dense)


def epochs_of(arm: str, dense: int, share: float) -> int:
    """Epochs of an arm.

    Scratch-B: as many multiply-accumulates as the dense training took, so the epochs
    grow by 1 / share; the paper stops at twice as many.

    Args:
        arm: One of `ARMS`.
        dense: Epochs of the dense network.
        share: The small network's share of its MACs.
    """
    return {
        "fine_tuned": max(1, round(dense / 4)),
        "fine_tuned_long": dense,
        "scratch_e": dense,
        "scratch_b": round(dense * min(2.0, 1 / share)),
    }[arm]


def reinitialise(model: nn.Module, seed: int) -> nn.Module:
    """A copy with new values and fresh statistics.

    They are drawn for its widths as the dense network's were for the dense widths.

    Args:
        model: The network.
        seed: Of the values.
    """
    anew = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1000)
        for module in anew.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        return anew.apply(kaiming)


def summarise(rows: list[dict]) -> None:
    """Test accuracy, mean ± standard deviation over the seeds, and what it says."""
    tests: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        tests[row["arm"], row["lr"]][row["seed"]] = 100 * float(row["test"])
    dense = {row["seed"]: 100 * float(row["test_dense"]) for row in rows}
    print(f"dense {mean_and_spread(list(dense.values()))}")
    for (arm, lr), scores in sorted(tests.items(), key=lambda item: -_mean(item[1])):
        print(
            f"{arm:16s} lr {lr:5s} {mean_and_spread(list(scores.values()))}  seeds "
            f"{len(scores)}"
        )
    best = {}
    for arm in ARMS:
        by_lr = [scores for (its_arm, _), scores in tests.items() if its_arm == arm]
        best[arm] = max(by_lr, key=_mean)
    for arm, rival in (
        ("fine_tuned", "scratch_e"),
        ("fine_tuned", "scratch_b"),
        ("fine_tuned_long", "scratch_b"),
    ):
        gains = [best[arm][seed] - best[rival][seed] for seed in best[arm]]
        print(
            f"{arm} - {rival}, each at its better learning rate: "
            f"{mean_and_spread(gains)} points"
        )


def _mean(scores: dict[str, float]) -> float:
    return float(np.mean(list(scores.values())))


if __name__ == "__main__":
    run(main)
