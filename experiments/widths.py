r"""What do widths that suit the engine cost in accuracy, and gain in time?

    python -m experiments.widths --model resnet56 --searcher uniform
    python -m experiments.widths --model resnet56 --weights FILE --seeds 0 1 2 \
        --budgets macs=50% macs=40%
    python -m experiments.widths --model resnet56 --summary

One network, kept counts in multiples of 1, 2, 4, 8, of the engine's tile, and in those
that `--round_to auto` takes where two, three or four levels are enough for a group.

- Time: the pruned network beside the dense one, in turns, in ONNX Runtime on one thread
  at batch 1 and 32; the median of the ratios.
- Accuracy: what Dyna finds at equal MACs, pruned, recalibrated and fine-tuned alike:
  annealed epochs on some training images, with distillation. The last epoch counts, the
  test split is read once, after it. A seed stands for the search and for the order of
  fine-tuning. `--searcher uniform` trains nothing and needs no weights.

A row a network in `experiments/results/widths.csv`; rows that are there aren't measured
again. Multiples that can't meet a budget get a row without figures. `--summary` prints
means, and for each multiple the accuracy at the time that `auto` takes at the first
budget, interpolated between the budgets that were measured.

On one core a uniform row takes half a minute; a searched one two minutes on ResNet-20
and six on the others. `--quick` does less of everything, to try the script; its table
and runs are apart.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.agents.search import search
from autoprune.config import (
    DataConfig,
    FinetuneConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.costs.budget import Budget
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.costs.widths import suited_multiples
from autoprune.data.models import build
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import accuracy
from autoprune.latency.engines import ENGINES, Setting
from autoprune.latency.timing import time_in_turns
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods.channels import sliced
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace
from autoprune.training.loop import finetune
from experiments.script import run, run_folder
from experiments.search_agents import sensitivity_cost
from experiments.tables import all_cells, fill_table, rows_for_summary

TABLE = Path(__file__).parent / "results" / "widths.csv"
ENGINE = "onnxruntime"
BATCHES = (1, 32)
SECONDS = 6.0
"""What the passes of one pair of networks take together."""
N_LEVELS = {"auto2": 2, "auto3": 3, "auto4": 4}
"""Multiples that suit the engine to how many levels are enough."""
DEFAULT = "auto3"
"""Those that `--round_to auto` takes."""
WIDTHS = ("1", "2", "4", "8", "tile", *N_LEVELS)
KEY = ("model", "searcher", "budget", "widths", "seed")
FIELDS = (
    *KEY,
    "tile",
    "evaluations",
    "images",
    "epochs",
    "macs_ratio",
    *(f"time_{batch}" for batch in BATCHES),
    "selection_pruned",
    "test_dense",
    "test",
    "seconds",
)


def main() -> None:
    """Measures what the table lacks, or sums it up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--searcher", choices=("dyna", "uniform"), default="dyna")
    parser.add_argument("--budgets", nargs="+", default=["macs=50%"])
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/widths"))
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summarise(rows_for_summary(args.table, parser), args.model)
    if args.quick:
        # Nothing of a trial may be taken for what the real table asks.
        args.runs = args.runs.with_name(f"{args.runs.name}_quick")
        args.table = args.runs / args.table.name
        args.evaluations = 30
        args.images = 1000
        args.epochs = 1
    torch.set_num_threads(1)
    if args.searcher == "uniform":
        args.seeds = [0]
        fill_table(args.table, cells(args), measure_uniform, FIELDS)
        return None
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")
    images = DataConfig("cifar10", max_train_images=args.images)
    network = NetworkConfig(args.model, args.weights)
    proxy = ProxyConfig(workers=1)
    context = RunContext(Settings(network, images, SearchConfig(), proxy))
    fill_table(
        args.table, cells(args), lambda cell: measure(context, cell, args), FIELDS
    )
    return None


def cells(args: argparse.Namespace) -> list[dict]:
    """What is to be measured, seed by seed."""
    columns = {"seed": args.seeds, "budget": args.budgets, "widths": args.widths}
    return all_cells({"model": [args.model], "searcher": [args.searcher]} | columns)


def multiples(groups: Groups, widths: str) -> int | dict[str, int]:
    """What kept counts are multiples of.

    Args:
        groups: The network's trace.
        widths: One of `WIDTHS`.
    """
    if widths in N_LEVELS:
        return suited_multiples(groups, tile(), n_levels=N_LEVELS[widths])
    return tile() if widths == "tile" else int(widths)


def tile() -> int:
    """The engine's, on this machine."""
    return ENGINES[ENGINE].tile("float32")


def measure_uniform(cell: dict) -> dict:
    """The time of a uniformly pruned network; nothing is trained.

    Args:
        cell: Which network.

    Returns:
        The row without its cell.
    """
    started = time.perf_counter()
    model = build(cell["model"], 10).eval()
    example = torch.zeros(1, 3, 32, 32)
    groups = trace(model, example)
    costs = CostTable(groups)
    space = SearchSpace(costs, round_to=multiples(groups, cell["widths"]))
    budget = Budget.parse(cell["budget"])
    target = budget.target(costs)
    try:
        space.check(target, budget)
    except UserError as error:
        return infeasible(error)
    counts = space.uniform(target)
    kept = {}
    for name, count in zip(costs.names, counts.tolist(), strict=True):
        # Which channels stay makes no difference to the time.
        kept[name] = torch.arange(count)
    times = shares_of_time(model, prune(model, groups, kept), example)
    return {
        "tile": tile(),
        "macs_ratio": round(costs.macs(counts) / costs.macs(costs.dense), 5),
        **times,
        "seconds": round(time.perf_counter() - started, 1),
    }


def infeasible(error: UserError) -> dict:
    """The row of multiples that can't meet a budget."""
    print(error, flush=True)
    return {"tile": tile()}


def measure(context: RunContext, cell: dict, args: argparse.Namespace) -> dict:
    """One network from the dense one to its test accuracy.

    Args:
        context: Network, images and trace.
        cell: Which network.
        args: The script's arguments.

    Returns:
        The row without its cell.
    """
    started = time.perf_counter()
    splits = context.splits
    folder = run_folder(args.runs, (cell[name] for name in KEY))
    try:
        env = LayerPruningEnv.with_suited_proxy(
            context.model,
            context.groups,
            context.proxy(),
            cell["budget"],
            round_to=multiples(context.groups, cell["widths"]),
        )
    except UserError as error:
        return infeasible(error)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    config = SearchConfig(
        cell["budget"],
        agent=cell["searcher"],
        episodes=args.evaluations - sensitivity_cost(context),
        seed=cell["seed"],
    )
    # A killed script goes on from the log of the search and the last epoch.
    best = search(env, config, folder).best
    pruned = sliced(context, best.allocation.kept)
    before = accuracy(pruned, splits.selection)
    # Lower than the default, which is for ten epochs of all images.
    training = FinetuneConfig(epochs=args.epochs, lr=0.02)
    checkpoint = folder.finetune_checkpoint
    finetune(pruned, splits.train, training, cell["seed"], context.model, checkpoint)
    return {
        "tile": tile(),
        "evaluations": args.evaluations,
        "images": args.images,
        "epochs": args.epochs,
        "macs_ratio": round(best.macs / context.costs.macs(context.costs.dense), 5),
        **shares_of_time(context.model, pruned, splits.example),
        "selection_pruned": round(before, 4),
        "test_dense": round(accuracy(context.model, splits.test), 4),
        "test": round(accuracy(pruned, splits.test), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def shares_of_time(
    dense: nn.Module, pruned: nn.Module, example: Tensor
) -> dict[str, float]:
    """The pruned network's time over the dense one's, as columns of the table.

    Args:
        dense: The whole network.
        pruned: The pruned one.
        example: One input.
    """
    shares = {}
    for batch in BATCHES:
        setting = Setting(ENGINE, batch, threads=1, precision="float32")
        both = [
            ENGINES[ENGINE].load(network, example, setting)
            for network in (dense, pruned)
        ]
        ratio = float(time_in_turns(both, SECONDS).ratios[1])
        shares[f"time_{batch}"] = round(ratio, 4)
    return shares


def summarise(rows: list[dict], model: str) -> None:
    """Time and accuracy at equal MACs, and accuracy at equal time.

    Args:
        rows: What was measured.
        model: The network.
    """
    by_cell: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for row in rows:
        if row["model"] == model and row["macs_ratio"]:
            by_cell[row["searcher"], row["budget"], row["widths"]].append(row)
    for (searcher, budget, widths), group in by_cell.items():
        times = [f"{mean_of(group, f'time_{batch}'):.3f}" for batch in BATCHES]
        line = f"{searcher:8s} {budget:9s} {widths:6s} time {' '.join(times)}"
        if searcher != "uniform":
            line += f"  test {mean_of(group, 'test'):.2%}  seeds {len(group)}"
        print(line)
    for batch in BATCHES:
        for widths, share, test in at_equal_time(rows, model, batch):
            print(
                f"batch {batch}, {share:.3f} of the time: {widths:6s} test {test:.2%}"
            )


def at_equal_time(
    rows: Sequence[dict], model: str, batch: int
) -> Iterable[tuple[str, float, float]]:
    """Test accuracy of each kind of widths at the time that the default takes.

    That is its time at the budget that has most rows. Multiples whose budgets lie all
    on one side of that time are left out.

    Args:
        rows: The table.
        model: The network.
        batch: Of the times.

    Yields:
        Widths, share of the dense time, and test accuracy.
    """
    by_widths: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["model"] == model and row["searcher"] == "dyna" and row["test"]:
            by_widths[row["widths"]][row["budget"]].append(row)
    if DEFAULT not in by_widths:
        return
    usual = max(by_widths[DEFAULT].values(), key=len)
    share = mean_of(usual, f"time_{batch}")
    for widths, budgets in by_widths.items():
        points = []
        for group in budgets.values():
            points.append((mean_of(group, f"time_{batch}"), mean_of(group, "test")))
        times, tests = zip(*sorted(points), strict=True)
        if times[0] <= share <= times[-1]:
            yield widths, share, float(np.interp(share, times, tests))


def mean_of(rows: Sequence[dict], name: str) -> float:
    """The mean of a column."""
    return float(np.mean([float(row[name]) for row in rows]))


if __name__ == "__main__":
    run(main)
