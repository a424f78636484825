"""Do runs with a budget of latency end within it?

    python -m experiments.latency_budgets
    python -m experiments.latency_report            writes the page

Twenty runs of `autoprune run` over six networks, at 50 and 70 % of the dense network's
time: all of them in ONNX Runtime at batch 1, two of them at batch 32 and in PyTorch as
well. Weights are random and who searches is `random`, since neither makes a difference
to what is kept of a budget in time. The network that a run wrote is then loaded and
timed beside the dense one, in turns, for longer than the run did.

A row a run in `experiments/results/latency_budgets.csv`: what the model predicted, what
the run measured last, and what this script measured, as shares of the dense time. Rows
that are there aren't measured again; runs lie in `runs/latency_budgets`. Nothing else
should run meanwhile. An hour.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from autoprune.config import LatencyConfig
from autoprune.data.models import build
from autoprune.deploy.pruned import load_pruned
from autoprune.latency.engines import setting_of
from autoprune.latency.measuring import measure_latency
from experiments.latency_networks import NETWORKS
from experiments.script import finished_run, run, run_folder
from experiments.tables import all_cells, fill_table

TABLE = Path(__file__).parent / "results" / "latency_budgets.csv"
KEY = ("model", "engine", "batch", "threads", "budget")
FIELDS = (
    *KEY,
    "dense_ms",
    "model_error",
    "predicted",
    "measured_by_run",
    "measured",
    "corrections",
    "macs_ratio",
    "seconds",
    "measured_at",
)
EVERYWHERE = ("resnet56", "mobilenet_v2")
"""Networks that are also run in `FURTHER`."""
FURTHER = (("onnxruntime", 32), ("torch", 1))
"""Engines and batches beside ONNX Runtime at batch 1."""
SECONDS = 15.0
"""What the passes of dense and pruned network take together."""
FEW_IMAGES = {
    "data": "sample",
    "weights": "none",
    "agent": "random",
    "baselines": "none",
    "episodes": 20,
    "epochs": 0,
    "max_train_images": 64,
    "calibration_images": 32,
    "proxy_images": 32,
    "selection_images": 64,
    "max_test_images": 64,
    "proxy.images": 32,
    "proxy.reconstruct": "off",
}
"""Options of every run; images decide nothing here."""


def main() -> None:
    """Measures what the table lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--budgets", nargs="+", default=["latency=50%", "latency=70%"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/latency_budgets"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fill_table(TABLE, cells(args), lambda cell: measure(cell, args.runs), FIELDS)


def cells(args: argparse.Namespace) -> list[dict]:
    """What is to be measured, network by network."""
    chosen = []
    for model in args.models:
        settings = [("onnxruntime", 1)]
        if model in EVERYWHERE:
            settings += FURTHER
        for engine, batch in settings:
            setting = {"engine": engine, "batch": batch, "threads": args.threads}
            columns = {name: [value] for name, value in setting.items()}
            chosen += all_cells({"model": [model]} | columns | {"budget": args.budgets})
    return chosen


def measure(cell: dict, runs: Path) -> dict:
    """One run, and the time of the network that it wrote.

    Args:
        cell: Which run.
        runs: Folder of all of them.

    Returns:
        The row without its cell.
    """
    started = datetime.now(UTC)
    network = NETWORKS[cell["model"]]
    factory = f"experiments.latency_networks:{cell['model']}"
    options = {
        "model": factory,
        "image_size": network.side,
        "budget": cell["budget"],
        "latency.engine": cell["engine"],
        "latency.batch": cell["batch"],
        "latency.threads": cell["threads"],
    }
    folder = run_folder(runs, (cell[name] for name in KEY))
    results = finished_run(folder, FEW_IMAGES | options).read_results()
    assert results.latency_kept is not None, "the run has a budget of latency"
    assert results.latency_model is not None, "the run has a budget of latency"
    setting = setting_of(LatencyConfig(cell["engine"], cell["batch"], cell["threads"]))
    example = torch.randn(1, 3, network.side, network.side)
    dense = build(factory).eval()
    pruned = load_pruned(folder.root)
    [latency] = measure_latency(dense, pruned, example, [setting], SECONDS)
    return {
        "dense_ms": round(latency.dense_ms, 3),
        "model_error": round(results.latency_model["error_median"], 4),
        "predicted": round(results.latency_kept["predicted_share"], 4),
        "measured_by_run": round(results.latency_kept["measured_share"], 4),
        "measured": round(1 / latency.speedup, 4),
        "corrections": results.latency_kept["corrections"],
        "macs_ratio": round(results.macs_ratio or 0, 4),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "measured_at": f"{started:%Y-%m-%d %H:%M}",
    }


if __name__ == "__main__":
    run(main)
