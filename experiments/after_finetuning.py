r"""What is a search worth once its network is fine-tuned?

    python -m experiments.after_finetuning --model resnet20 --weights FILE \
        --budgets macs=50% macs=30% --seeds 0 1 2
    python -m experiments.after_finetuning --model resnet20 --summary

The agent's allocation against every simple answer. Every network is pruned as
`autoprune prune` does it (L1, reconstructed weights where they help; Torch-Pruning by
its own criterion, its weights as they are), recalibrated and fine-tuned alike: annealed
epochs over all 45,000 training images with distillation, the last epoch counts, the
test split is read once, after it. A seed stands for the search and for the order of
fine-tuning. The agent has as many evaluations as random search, of which measuring
sensitivity is a part.

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

from autoprune.agents.algorithms import ALGORITHMS
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
from autoprune.files import write_json
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods.channels import sliced
from autoprune.runs import RunFolder
from autoprune.training.loop import finetune
from experiments.rival_proxies import cut_by_layer, macs_of
from experiments.script import run, run_folder
from experiments.search_agents import ROUND_TO, sensitivity_cost
from experiments.tables import (
    all_cells,
    fill_table,
    mean_and_spread,
    rows_for_summary,
)

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
    """Measures what the table lacks, or sums it up."""
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
        return summarise(rows_for_summary(table, parser))
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")

    network = NetworkConfig(args.model, args.weights)
    settings = Settings(network, DataConfig("cifar10"), SearchConfig(), ProxyConfig())
    context = RunContext(settings)
    teacher = CachedTeacher(context.model)
    fill_table(
        table, cells(args), lambda cell: measure(context, teacher, cell, args), FIELDS
    )


class CachedTeacher(nn.Module):
    """A network that answers a batch once.

    All that is trained with one seed sees the same batches, and so its teacher.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._answers: dict[bytes, Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's answers, computed or remembered."""
        # A view of the bytes as they lie: nothing is copied.
        values = inputs.contiguous().numpy()
        key = hashlib.sha256(values.data).digest()
        if key not in self._answers:
            self._answers[key] = self.model(inputs)
        return self._answers[key]


def cells(args: argparse.Namespace) -> list[dict]:
    """What is to be measured, seed by seed."""
    columns = {"seed": args.seeds, "budget": args.budgets, "method": args.methods}
    return all_cells({"model": [args.model]} | columns)


def measure(
    context: RunContext, teacher: nn.Module, cell: dict, args: argparse.Namespace
) -> dict:
    """One network from the dense one to its test accuracy.

    Args:
        context: Network, images and trace.
        teacher: The dense network, for distillation.
        cell: Which network.
        args: The script's arguments.

    Returns:
        The row without its cell.
    """
    started = time.perf_counter()
    splits = context.splits
    folder = run_folder(args.runs, (cell[name] for name in KEY))
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    if cell["method"] == TORCH_PRUNING:
        pruned = prune_globally(context, Budget.parse(cell["budget"]))
        recalibrate(pruned, splits.calibration.inputs)
    else:
        allocation = find_allocation(context, cell, args.evaluations, folder)
        pruned = sliced(context, allocation.kept)
    before = accuracy(pruned, splits.selection)
    macs = macs_of(pruned, splits.example)
    config = FinetuneConfig(epochs=args.epochs)
    checkpoint = folder.finetune_checkpoint
    finetune(pruned, splits.train, config, cell["seed"], teacher, checkpoint)
    has_length = cell["method"] in ("dyna", "random")
    return {
        "evaluations": args.evaluations if has_length else "",
        "epochs": args.epochs,
        "macs_ratio": round(macs / macs_of(context.model, splits.example), 5),
        "selection_pruned": round(before, 4),
        "test_dense": round(accuracy(context.model, splits.test), 4),
        "test": round(accuracy(pruned, splits.test), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def find_allocation(
    context: RunContext, cell: dict, evaluations: int, folder: RunFolder
) -> Allocation:
    """What a search finds, or found before the script was killed.

    Args:
        context: Network, images and trace.
        cell: Method, budget and seed.
        evaluations: Of the search, measuring sensitivity included.
        folder: Where the allocation is kept.
    """
    if not folder.allocation.exists():
        budget = cell["budget"]
        episodes = evaluations
        if cell["method"] in ALGORITHMS:
            episodes -= sensitivity_cost(context)
        config = SearchConfig(
            budget, agent=cell["method"], episodes=episodes, seed=cell["seed"]
        )
        env = LayerPruningEnv.with_suited_proxy(
            context.model, context.groups, context.proxy(), budget, round_to=ROUND_TO
        )
        best = search(env, config, folder).best
        write_json(folder.allocation, best.allocation.to_json())
    return Allocation.read(folder.allocation, context.groups)


def prune_globally(context: RunContext, budget: Budget) -> nn.Module:
    """Torch-Pruning's global L2, at the most MACs that the budget allows.

    Args:
        context: Network, images and trace.
        budget: In MACs.
    """
    allowed = budget.target(context.costs)
    low = 0.0
    high = 1.0
    for _ in range(20):
        ratio = (low + high) / 2
        macs = macs_of(_prune_by_ratio(context, ratio), context.splits.example)
        if macs <= allowed:
            high = ratio
        else:
            low = ratio
    return _prune_by_ratio(context, high)


def _prune_by_ratio(context: RunContext, ratio: float) -> nn.Module:
    """A copy of the network without that share of the channels that may go."""
    model = copy.deepcopy(context.model)
    prunable = set()
    for group in cut_by_layer(context.groups):
        for member in group.members:
            if member.role == "produce":
                prunable.add(member.tensor.removesuffix(".weight"))
    ignored = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in prunable:
            ignored.append(module)
    pruner = tp.pruner.BasePruner(
        model,
        context.splits.example,
        tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        max_pruning_ratio=context.settings.search.max_sparsity,
        global_pruning=True,
        ignored_layers=ignored,
    )
    pruner.step()
    return model


def summarise(rows: list[dict]) -> None:
    """Test accuracy over the seeds, best first within a budget."""
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
