"""Methods beside each other, one question a table.

    python -m experiments.compare_methods criteria --weights FILE
    python -m experiments.compare_methods criteria --summary

Through the command line that everybody has. Every row is `autoprune search`, `prune`,
`finetune` and `evaluate` of the public ResNet-20 with the options of its name, beside
those that all rows of the table share: the same budget, training images, epochs in all,
distillation. The last epoch counts; the test split is read once, after it. A seed
stands for the order of training and for the search.

A row a network in `experiments/results/methods_TABLE.csv`. Rows that are there aren't
measured again, and a killed script goes on after the last epoch.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.cli.main import main as autoprune
from autoprune.cli.presets import METHODS
from autoprune.runs import RunFolder, file_stem
from experiments.tables import (
    all_cells,
    fill_table,
    mean_and_spread,
    rows_for_summary,
)

RESULTS = Path(__file__).parent / "results"
KEY = ("row", "seed")
FIELDS = (
    *KEY,
    "options",
    "macs_ratio",
    "sparsity",
    "test_dense",
    "test_pruned",
    "test",
    "seconds",
)
FEW_IMAGES = {
    "max_train_images": 10_000,
    "finetune.lr": 0.02,
    "sparse.lr": 0.02,
    "removal.lr": 0.02,
}
"""A short training; its learning rate is lower than the default, which is for ten
epochs of all images.
"""
SLICED = {"proxy.reconstruct": "off"}
"""Weights as published methods leave them, in all rows but AMC's."""
Options = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One question.

    Attributes:
        question: What it is about.
        shared: Options of all rows.
        rows: Name to the options that make the difference.
    """

    question: str
    shared: Options
    rows: Mapping[str, Options]


def _trained(epochs: int, **options: Any) -> Options:
    """Channels leave in a training of that length; there is no other."""
    return {"removal.epochs": epochs, "epochs": 0} | options


ONE_SIZE = {
    "granularity": "dimensions",
    "agent": "uniform",
    "round_to_for": "resolution=1",
}
CRITERIA = (
    "l1",
    "l2",
    "fpgm",
    "bn_scale",
    "activation",
    "apoz",
    "taylor",
    "hessian",
    "lamp",
    "random",
)
MASKS = ("weight", "row", "column", "kernel", "filter")


def _method(name: str) -> Options:
    """A method with two epochs in all, whatever it trains.

    A method that can't meet half of the MACs brings another budget.
    """
    sets = SLICED | METHODS[name].defaults
    epochs: Options = {"epochs": 2}
    if "sparse.method" in sets:
        epochs = {"sparse.epochs": 1, "epochs": 1}
    if "removal.method" in sets:
        epochs = {"removal.epochs": 2}
    options: Options = {"method": name}
    if "budget" not in sets:
        options |= {"budget": "macs=50%"}
    options |= epochs
    if METHODS[name].kind == "search":
        options |= {"episodes": 100, "proxy.reconstruct": sets["proxy.reconstruct"]}
    return options


TABLES = {
    "all": Table(
        "What does each method of `autoprune methods` reach, as it is listed?",
        FEW_IMAGES,
        {name: _method(name) for name in METHODS},
    ),
    "criteria": Table(
        "Which channels go, when each group loses the same share?",
        FEW_IMAGES | SLICED | {"budget": "macs=50%", "agent": "uniform", "epochs": 1},
        {name: {"criterion": name} for name in CRITERIA},
    ),
    "trainings": Table(
        "At four epochs in all: cut and fine-tune, or train so that channels can "
        "leave?",
        FEW_IMAGES | SLICED | {"budget": "macs=50%"},
        {
            "l1": {"method": "l1", "epochs": 4},
            "slimming": {"method": "slimming", "sparse.epochs": 2, "epochs": 2},
            "group_lasso": {"method": "group_lasso", "sparse.epochs": 2, "epochs": 2},
            "iterative": _trained(4, method="iterative"),
            "centripetal": _trained(4, method="centripetal"),
            "compactors": _trained(
                4, agent="uniform", **{"removal.method": "compactors"}
            ),
            "resrep": _trained(4, method="resrep"),
        },
    ),
    "granularities": Table(
        "What does the grain of what goes cost, at equal non-zero MACs?",
        FEW_IMAGES | {"budget": "macs=40%", "epochs": 1},
        {
            name: {"method": name if name != "weight" else "weight_magnitude"}
            for name in MASKS
        }
        | {"channel": {"method": "l1"}, "layer": {"method": "layer"}},
    ),
    "dimensions": Table(
        "Width, depth, image size, or all three?",
        FEW_IMAGES | SLICED | {"budget": "macs=50%", "epochs": 2},
        {
            "width": {"agent": "uniform"},
            "depth": {"method": "layer"},
            "resolution": ONE_SIZE | {"exclude": "depth,[!r]*"},
            "polynomial": {"method": "three_dimensions"},
            "dyna, width": {"agent": "dyna"},
            "dyna, all three": {"granularity": "dimensions", "agent": "dyna"},
        },
    ),
    "longer": Table(
        "The same, for twelve epochs of all training images?",
        {"budget": "macs=50%"},
        {
            "l1": {"method": "l1", "epochs": 12},
            "centripetal": _trained(12, method="centripetal"),
            "resrep": _trained(12, method="resrep"),
        },
    ),
    "allocations": Table(
        "What does the agent's allocation add to a criterion, or to a sparsely trained "
        "network?",
        FEW_IMAGES | SLICED | {"budget": "macs=50%", "episodes": 100},
        {
            f"{name} {agent}": {"criterion": name, "agent": agent, "epochs": 2}
            for name in ("l1", "fpgm", "bn_scale", "taylor", "random")
            for agent in ("uniform", "dyna")
        }
        | {
            f"slimming {agent}": {
                "method": "slimming",
                "agent": agent,
                "sparse.epochs": 1,
                "epochs": 1,
            }
            for agent in ("global", "dyna")
        },
    ),
}


def main() -> None:
    """Measures what a table lacks, or sums it up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--weights")
    parser.add_argument("--rows", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_methods"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    table = TABLES[args.table]
    path = RESULTS / f"methods_{args.table}.csv"
    if args.summary:
        return summarise(table, rows_for_summary(path, parser))
    if args.weights is None:
        parser.error("--weights: give the trained weights of ResNet-20")
    rows = args.rows or list(table.rows)
    for name in rows:
        if name not in table.rows:
            parser.error(f"--rows: no row {name!r}; known: {', '.join(table.rows)}")
    dense: dict[str, float] = {}
    cells = all_cells({"seed": args.seeds, "row": rows})
    runs = args.runs / args.table
    fill_table(
        path,
        cells,
        lambda cell: measure(table, cell, args.weights, runs, dense),
        FIELDS,
    )


def measure(
    table: Table, cell: dict, weights: str, runs: Path, dense: dict[str, float]
) -> dict:
    """One network from the dense one to its test accuracy.

    Args:
        table: The question.
        cell: Row and seed.
        weights: File of the dense network's weights.
        runs: Folder of the table's runs.
        dense: Results of the dense network. The first row measures them and enters them
            here, so that the others don't again.

    Returns:
        The row without its cell.
    """
    name = cell["row"].replace(", ", "-").replace(" ", "-")
    run = runs / file_stem(name, str(cell["seed"]))
    options = flags(table.shared | table.rows[cell["row"]])
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    base = [
        "--model",
        "resnet20",
        "--weights",
        weights,
        "--data",
        "cifar10",
        "--baselines",
        "none",
        # In all rows the same, on any machine.
        "--round_to",
        "2",
    ]
    place = ["--seed", str(cell["seed"]), "--out", str(run)]
    _do("search", *base, *options, *place, *resume)
    plan = run / "pruned" / "plan.json"
    if not plan.exists():
        _do("prune", str(run))
    if json.loads(plan.read_text())["stage"] != "finetuned":
        _do("finetune", str(run), "--resume")
    folder = RunFolder(run)
    folder.add_results(**dense)
    _do("evaluate", str(run))
    results = folder.read_results()
    assert results.accuracy_dense is not None, "evaluate writes it"
    assert results.macs_ratio is not None, "prune writes it"
    dense["accuracy_dense"] = results.accuracy_dense
    sparsity: float | str = ""
    if results.sparsity is not None:
        sparsity = round(results.sparsity, 5)
    return {
        "options": " ".join(options),
        "macs_ratio": round(results.macs_ratio, 5),
        "sparsity": sparsity,
        "test_dense": results.accuracy_dense,
        "test_pruned": results.accuracy_pruned,
        "test": results.accuracy,
        "seconds": results.seconds_total,
    }


def flags(options: Options) -> list[str]:
    """Options as they are typed."""
    parts = []
    for name, value in options.items():
        parts += [f"--{name}", str(value)]
    return parts


def _do(*arguments: str) -> None:
    """Runs a command of autoprune; the script ends with it if it fails."""
    code = autoprune(list(arguments))
    if code:
        raise SystemExit(code)


def summarise(table: Table, rows: list[dict]) -> None:
    """Test accuracy before and after fine-tuning over the seeds, best first.

    Args:
        table: The question.
        rows: What was measured.
    """
    before: dict[str, list[float]] = defaultdict(list)
    after: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        before[row["row"]].append(100 * float(row["test_pruned"]))
        after[row["row"]].append(100 * float(row["test"]))
    print(table.question)
    for name in sorted(after, key=lambda name: -np.mean(after[name])):
        print(
            f"{name:18s} {np.mean(before[name]):6.2f} -> "
            f"{mean_and_spread(after[name])}  seeds {len(after[name])}"
        )


if __name__ == "__main__":
    main()
