"""What is a search worth once its network is fine-tuned? The agent's allocation against
every simple answer.

    python experiments/after_finetuning.py --model resnet20 --weights FILE --budgets macs=50% macs=30% --seeds 0 1 2
    python experiments/after_finetuning.py --model resnet20 --summary

Every network is pruned as `autoprune prune` does it (L1, reconstructed weights where
they help; Torch-Pruning by its own criterion, its weights as they are), recalibrated
and fine-tuned alike: annealed epochs over all 45,000 training images with distillation,
the last epoch counts, the test split is read once, after it. A seed stands for the
search and for the order of fine-tuning. The agent has as many evaluations as random
search, of which measuring sensitivity is a part.

- `dyna`, `random`, `sensitivity`, `uniform`: see `autoprune run --agent`.
- `torch_pruning_l2`: Torch-Pruning's global pruning by group L2 norm, its ratio
  bisected until the MACs are the most that the budget allows. It is kept from layers
  that share their channels with others: with shortcuts padded by zeros the network that
  it would leave can't run.

A row a network in `experiments/results/after_finetuning_MODEL.csv`. Rows that are there
aren't measured again, and a killed script goes on after the last epoch. ResNet-20: six
to eight minutes a network on one core, ResNet-56 twenty.
"""

import argparse
import copy
import hashlib
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn

from autoprune.agents.replay import ALGORITHMS
from autoprune.agents.search import search
from autoprune.config import (
    DataConfig,
    FinetuneConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import Budget
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.evaluate import accuracy, recalibrate
from autoprune.pipeline.context import Workspace
from autoprune.pipeline.methods.base import sliced
from autoprune.runs import RunFolder, write_json
from autoprune.training.loop import finetune
from experiments.rival_proxies import cut_by_layer, macs_of
from experiments.script import run
from experiments.search_agents import sensitivity_cost
from experiments.tables import fill, mean_and_spread, measured

RESULTS = Path(__file__).parent / "results"
KEY = ("model", "budget", "method", "seed")
FIELDS = (
    *KEY,
    "evaluations",
    "epochs",
    "macs_ratio",
    "selection_pruned",
    "test_dense",
    "test",
    "seconds",
)
TORCH_PRUNING = "torch_pruning_l2"
METHODS = ("dyna", "random", "sensitivity", "uniform", TORCH_PRUNING)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--budgets", nargs="+", default=["macs=50%"])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/after_finetuning"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    table = RESULTS / f"after_finetuning_{args.model}.csv"
    if args.summary:
        return summarise(measured(table, parser))
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")

    network = NetworkConfig(args.model, args.weights)
    workspace = Workspace(
        Settings(network, DataConfig("cifar10"), SearchConfig(), ProxyConfig())
    )
    teacher = Remembering(workspace.model)
    fill(
        table, cells(args), lambda cell: measure(workspace, teacher, cell, args), FIELDS
    )


class Remembering(nn.Module):
    """A network that answers a batch once: all that is trained with one seed sees the
    same batches, and so its teacher.

    On ResNet-56 the teacher is 28 % of a training step.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self._answers = model, dict[bytes, Tensor]()

    def forward(self, inputs: Tensor) -> Tensor:
        """What the network says, or said."""
        key = hashlib.sha256(inputs.contiguous().numpy()).digest()
        if key not in self._answers:
            self._answers[key] = self.model(inputs)
        return self._answers[key]


def cells(args: argparse.Namespace) -> list[dict]:
    """What is to be measured, seed by seed."""
    return [
        dict(zip(KEY, (args.model, budget, method, seed), strict=True))
        for seed in args.seeds
        for budget in args.budgets
        for method in args.methods
    ]


def measure(
    workspace: Workspace, teacher: nn.Module, cell: dict, args: argparse.Namespace
) -> dict:
    """One network from the dense one to its test accuracy."""
    stem = "-".join(str(cell[name]) for name in KEY).replace("=", "-").replace("%", "")
    folder, started, splits = (
        RunFolder(args.runs / stem),
        time.perf_counter(),
        workspace.splits,
    )
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    if cell["method"] == TORCH_PRUNING:
        pruned = pruned_globally(workspace, Budget.parse(cell["budget"]))
        recalibrate(pruned, splits.calibration.inputs)
    else:
        allocation = allocated(workspace, cell, args.evaluations, folder)
        pruned = sliced(workspace, allocation.kept)
    before, macs = accuracy(pruned, splits.selection), macs_of(pruned, splits.example)
    config, checkpoint = FinetuneConfig(epochs=args.epochs), folder.finetune_checkpoint
    finetune(pruned, splits.train, config, cell["seed"], teacher, checkpoint)
    return {
        "evaluations": args.evaluations if cell["method"] in ("dyna", "random") else "",
        "epochs": args.epochs,
        "macs_ratio": round(macs / macs_of(workspace.model, splits.example), 5),
        "selection_pruned": round(before, 4),
        "test_dense": round(accuracy(workspace.model, splits.test), 4),
        "test": round(accuracy(pruned, splits.test), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def allocated(
    workspace: Workspace, cell: dict, evaluations: int, folder: RunFolder
) -> Allocation:
    """What a search finds, or found before the script was killed."""
    if not folder.allocation.exists():
        spent = sensitivity_cost(workspace) if cell["method"] in ALGORITHMS else 0
        config = SearchConfig(
            cell["budget"],
            agent=cell["method"],
            episodes=evaluations - spent,
            seed=cell["seed"],
        )
        env = LayerPruningEnv(
            workspace.model, workspace.groups, workspace.proxy(), cell["budget"]
        )
        write_json(
            folder.allocation, search(env, config, folder).best.allocation.to_json()
        )
    return Allocation.read(folder.allocation, workspace.groups)


def pruned_globally(workspace: Workspace, budget: Budget) -> nn.Module:
    """Torch-Pruning's global L2, at the most MACs that the budget allows."""
    allowed, low, high = budget.target(workspace.costs), 0.0, 1.0
    for _ in range(20):
        ratio = (low + high) / 2
        fits = macs_of(_by_ratio(workspace, ratio), workspace.splits.example) <= allowed
        low, high = (low, ratio) if fits else (ratio, high)
    return _by_ratio(workspace, high)


def _by_ratio(workspace: Workspace, ratio: float) -> nn.Module:
    model, prunable = copy.deepcopy(workspace.model), cut_by_layer(workspace.groups)
    own = {
        m.tensor.removesuffix(".weight")
        for group in prunable
        for m in group.members
        if m.role == "produce"
    }
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    options = {
        "pruning_ratio": ratio,
        "max_pruning_ratio": workspace.settings.search.max_sparsity,
        "global_pruning": True,
        "ignored_layers": [layer for name, layer in layers.items() if name not in own],
    }
    example = workspace.splits.example
    tp.pruner.BasePruner(
        model, example, tp.importance.GroupMagnitudeImportance(p=2), **options
    ).step()
    return model


def summarise(rows: list[dict]) -> None:
    """Test accuracy, mean ± standard deviation over the seeds, best first within a
    budget.
    """
    by_cell: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        by_cell[row["budget"], row["method"]].append(100 * float(row["test"]))
    ranked: list[tuple[str, float, str]] = []
    for (budget, method), tests in by_cell.items():
        line = f"{budget}  {method:18s} {mean_and_spread(tests)}  seeds {len(tests)}"
        ranked.append((budget, -float(np.mean(tests)), line))
    print("\n".join(line for *_, line in sorted(ranked)))


if __name__ == "__main__":
    run(main)
