r"""What is a search under a budget of latency worth, at equal measured latency?

    python -m experiments.equal_latency --model mobilenet_v2_cifar --weights FILE
    python -m experiments.latency_report                            writes the page

Three networks a seed, each searched, pruned and fine-tuned by the command line with its
defaults but for the sizes below:

- `latency`: searched under `latency=50%`, in ONNX Runtime at batch 1, on one thread.
- `equal`: searched under MACs, the budget changed until the network that is found takes
  as long as that of `latency`, or at most 2 % longer.
- `macs`: searched under `macs=50%`.

All of them are timed by this script beside the dense network, in turns: in ONNX Runtime
and PyTorch, at batch 1 and 32, on one thread. The last epoch of fine-tuning counts, the
test split is read after it; no budget is chosen by it.

A row a network in `experiments/results/equal_latency.csv`. Rows that are there aren't
measured again; runs lie in `runs/equal_latency`, and a killed script goes on with them.
Nothing else should run meanwhile. On two cores a seed takes ten minutes on ResNet-56
and VGG-16-BN, and thirty on MobileNet-V2.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from autoprune.config import DataConfig, LatencyConfig, NetworkConfig, Settings
from autoprune.deploy.pruned import load_pruned
from autoprune.errors import UserError
from autoprune.latency.engines import setting_of
from autoprune.latency.measuring import measure_latency, reported_settings
from autoprune.pipeline.context import RunContext
from autoprune.results import Results
from autoprune.runs import RunFolder
from experiments.script import autoprune, finished_run, run, run_folder
from experiments.tables import all_cells, fill_table, read_table

TABLE = Path(__file__).parent / "results" / "equal_latency.csv"
KEY = ("model", "arm", "seed")
TIMES = ("onnxruntime_1", "onnxruntime_32", "torch_1", "torch_32")
"""Engines and batches; the first is what budgets are about."""
FIELDS = (
    *KEY,
    "budget",
    "episodes",
    "images",
    "epochs",
    "macs_ratio",
    *TIMES,
    "test_dense",
    "test_pruned",
    "test",
    "seconds",
    "measured_at",
)
ARMS = ("latency", "equal", "macs")
LATENCY = "latency=50%"
ENGINE = LatencyConfig(threads=1)
"""What budgets of latency are about."""
LARGEST_EXCESS = 1.02
"""Time over that of `latency` that still counts as equal."""
CLOSE = 0.98
"""Time over that of `latency` above which no larger network is looked for."""
MOST_TRIALS = 5
"""Searches of `equal`."""
SECONDS = 12.0
"""What the passes of dense and pruned network take together, in each setting."""


class Trial(NamedTuple):
    """A search under MACs.

    Attributes:
        folder: Its run.
        macs: Share of the MACs that its budget allows.
        time: Share of the dense network's time that it takes.
    """

    folder: RunFolder
    macs: float
    time: float


def main() -> None:
    """Measures what the table lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mobilenet_v2_cifar")
    parser.add_argument("--weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/equal_latency"))
    args = parser.parse_args()
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")
    settings = Settings(
        NetworkConfig(args.model, args.weights),
        DataConfig("cifar10", max_test_images=1),
    )
    context = RunContext(settings)
    arms = {"seed": args.seeds, "arm": args.arms}
    cells = all_cells({"model": [args.model]} | arms)
    fill_table(TABLE, cells, partial(measure, context, args), FIELDS)


def measure(context: RunContext, args: argparse.Namespace, cell: dict) -> dict:
    """One network, from its search to its test accuracy.

    Args:
        context: The dense network.
        args: The script's arguments.
        cell: Which network.

    Returns:
        The row without its cell.

    Raises:
        UserError: If `equal` comes before `latency`, or finds no network.
    """
    started = datetime.now(UTC)
    if cell["arm"] == "equal":
        folder = search_equal(context, args, cell["seed"])
    else:
        budget = LATENCY if cell["arm"] == "latency" else "macs=50%"
        folder = search(args, budget, cell["seed"])
    results = fine_tuned(folder, args.epochs)
    return {
        "budget": results.budget,
        "episodes": args.episodes,
        "images": args.images,
        "epochs": args.epochs,
        "macs_ratio": round(results.macs_ratio or 0, 4),
        **shares_of_time(context, folder),
        "test_dense": results.accuracy_dense,
        "test_pruned": results.accuracy_pruned,
        "test": results.accuracy,
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "measured_at": f"{started:%Y-%m-%d %H:%M}",
    }


def search(args: argparse.Namespace, budget: str, seed: int) -> RunFolder:
    """A run of the command line without fine-tuning.

    Args:
        args: The script's arguments.
        budget: Of the run.
        seed: Of search and fine-tuning.
    """
    options = {
        "model": args.model,
        "weights": args.weights,
        "data": "cifar10",
        "max_train_images": args.images,
        "budget": budget,
        "episodes": args.episodes,
        "latency.threads": ENGINE.threads,
        "seed": seed,
        "epochs": 0,
        "baselines": "none",
    }
    return finished_run(run_folder(args.runs, (args.model, budget, seed)), options)


def fine_tuned(folder: RunFolder, epochs: int) -> Results:
    """The results of a run after fine-tuning, which is done where it is missing.

    Args:
        folder: A finished run without.
        epochs: Passes over the training images.

    Raises:
        UserError: If fine-tuning fails; what it printed has been shown.
    """
    if not folder.read_results().finetune_epochs:
        autoprune("finetune", str(folder.root), "--epochs", str(epochs))
    return folder.read_results()


def search_equal(context: RunContext, args: argparse.Namespace, seed: int) -> RunFolder:
    """The run under MACs whose network takes as long as that under a latency budget.

    Args:
        context: The dense network.
        args: The script's arguments.
        seed: Of the searches.

    Returns:
        Of all searches that with the slowest network that is fast enough.

    Raises:
        UserError: If `latency` has no row yet, or no network is fast enough.
    """
    row = row_of(args.model, "latency", seed)
    goal = float(row[TIMES[0]])
    macs = float(row["macs_ratio"])
    trials: list[Trial] = []
    while len(trials) < MOST_TRIALS:
        folder = search(args, f"macs={macs:.1%}", seed)
        time = shares_of_time(context, folder, TIMES[:1])[TIMES[0]]
        trials.append(Trial(folder, macs, time))
        print(f"{macs:.1%} of the MACs: {time:.1%} of the time, {goal:.1%} wanted")
        if CLOSE <= time / goal <= LARGEST_EXCESS:
            break
        macs = next_budget(trials, goal)
    fast = [trial for trial in trials if trial.time <= goal * LARGEST_EXCESS]
    if not fast:
        raise UserError(None, f"no network takes {goal:.1%} of the time: {trials}")
    return max(fast, key=lambda trial: trial.time).folder


def next_budget(trials: Sequence[Trial], goal: float) -> float:
    """Where a line over the budgets says that the goal is met.

    Through the nearest trials on both sides of it; until there are both, through the
    dense network and the last trial.

    Args:
        trials: So far.
        goal: Share of the time.
    """
    slower = [trial for trial in trials if trial.time > goal]
    faster = [trial for trial in trials if trial.time <= goal]
    if slower and faster:
        above = min(slower, key=lambda trial: trial.time)
        below = max(faster, key=lambda trial: trial.time)
        part = (goal - below.time) / (above.time - below.time)
        return below.macs + part * (above.macs - below.macs)
    last = trials[-1]
    slope = (1 - last.macs) / (1 - last.time)
    # At least half a percent, so that two trials never ask for the same.
    step = (goal - last.time) * slope
    if abs(step) < 0.005:
        step = 0.005 if step > 0 else -0.005
    return max(last.macs + step, 0.02)


def row_of(model: str, arm: str, seed: int) -> dict[str, str]:
    """A row of the table.

    Args:
        model: The network.
        arm: One of `ARMS`.
        seed: Of the search.

    Raises:
        UserError: If it isn't there.
    """
    for row in read_table(TABLE):
        if (row["model"], row["arm"], row["seed"]) == (model, arm, str(seed)):
            return row
    raise UserError("arms", f"{arm} of seed {seed} has no row yet; measure it first")


def shares_of_time(
    context: RunContext, folder: RunFolder, columns: Sequence[str] = TIMES
) -> dict[str, float]:
    """The pruned network's time over the dense one's, as columns of the table.

    Args:
        context: The dense network.
        folder: The run of the pruned one.
        columns: Of `TIMES`.
    """
    pruned = load_pruned(folder.root)
    example = context.splits.example
    shares = {}
    for setting in reported_settings(setting_of(ENGINE)):
        column = f"{setting.engine}_{setting.batch}"
        if column in columns:
            [row] = measure_latency(context.model, pruned, example, [setting], SECONDS)
            shares[column] = round(1 / row.speedup, 4)
    return shares


if __name__ == "__main__":
    run(main)
