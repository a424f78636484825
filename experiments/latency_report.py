"""Writes docs/latency.md.

    python -m experiments.latency_report

How well latency is predicted, kept and searched for, from the tables of
`latency_models.py`, `latency_budgets.py` and `equal_latency.py`.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from autoprune.cli.kept_promise import LARGEST_EXCESS
from autoprune.costs.budget import Budget
from autoprune.files import write_text
from experiments.equal_latency import ARMS, TIMES
from experiments.search_report import NETWORKS, column, group_rows, table, values_cell
from experiments.tables import read_table

PAGE = Path(__file__).parent.parent / "docs" / "latency.md"
RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "pages" / "latency.md"
"""The page with a placeholder for each group of tables."""
Rows = list[dict[str, str]]

NAMES = NETWORKS | {
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNet-V2",
    "efficientnet_b0": "EfficientNet-B0",
    "vit_small": "ViT-S",
    "unet": "U-Net",
}
ENGINES = {
    "onnxruntime": "ONNX Runtime",
    "torch": "PyTorch",
    "openvino": "OpenVINO",
}
ARM_NAMES = {
    "latency": "half of the time",
    "equal": "MACs, as fast",
    "macs": "half of the MACs",
}
TIME_NAMES = {
    "onnxruntime_1": "ONNX Runtime, batch 1",
    "onnxruntime_32": "batch 32",
    "torch_1": "PyTorch, batch 1",
    "torch_32": "batch 32",
}


def main() -> None:
    """Writes the page."""
    write_text(PAGE, page())
    print(PAGE)


def page() -> str:
    """The whole page."""
    budgets = read_table(RESULTS / "latency_budgets.csv")
    n_kept = sum(excess(row) <= LARGEST_EXCESS for row in budgets)
    return TEMPLATE.read_text(encoding="utf-8").format(
        predictions=predictions(read_table(RESULTS / "latency_models.csv")),
        kept=f"{n_kept} of {len(budgets)}",
        budgets=kept_budgets(budgets),
        searches="".join(searches(read_table(RESULTS / "equal_latency.csv"))),
    )


def predictions(rows: Rows) -> str:
    """Errors by network, engine and batch.

    Args:
        rows: Of `latency_models.csv`.
    """
    lines = []
    for row in sorted(rows, key=_place):
        line = [NAMES[row["model"]], ENGINES[row["engine"]], row["batch"]]
        line.append(f"{float(row['dense_ms']):.3g}")
        for prefix in ("", "macs_", "alone_"):
            median = 100 * float(row[f"{prefix}median"])
            largest = 100 * float(row[f"{prefix}p95"])
            line.append(f"{median:.1f}, {largest:.1f}")
        line.append(row["networks"])
        lines.append(line)
    header = ["network", "engine", "batch", "dense, ms", "model", "over MACs"]
    return table([*header, "layers alone", "fitted to"], lines)


def kept_budgets(rows: Rows) -> str:
    """Predicted and measured times by network and budget.

    Args:
        rows: Of `latency_budgets.csv`.
    """
    lines = []
    for row in sorted(rows, key=_place):
        lines.append(
            [
                NAMES[row["model"]],
                ENGINES[row["engine"]],
                row["batch"],
                row["budget"].removeprefix("latency="),
                f"{100 * float(row['predicted']):.1f}",
                f"{100 * float(row['measured']):.1f}",
                row["corrections"],
                f"{100 * float(row['macs_ratio']):.1f}",
            ]
        )
    header = ["network", "engine", "batch", "budget", "predicted", "measured"]
    return table([*header, "corrections", "MACs left, %"], lines)


def excess(row: dict[str, str]) -> float:
    """Measured latency over budget.

    Args:
        row: Of `latency_budgets.csv`.
    """
    share = Budget.parse(row["budget"]).share
    assert share is not None, "budgets there are shares"
    return float(row["measured"]) / share


def searches(rows: Rows) -> Iterable[str]:
    """A table a network: what was budgeted by accuracy, MACs and times.

    Args:
        rows: Of `equal_latency.csv`.
    """
    for model, its_rows in group_rows(rows, "model").items():
        by_arm = group_rows(its_rows, "arm")
        lines = []
        for arm in ARMS:
            if arm not in by_arm:
                continue
            tests = [100 * test for test in column(by_arm[arm], "test")]
            macs = column(by_arm[arm], "macs_ratio")
            line = [ARM_NAMES[arm], values_cell(tests, 2)]
            line.append(f"{100 * np.mean(macs):.1f}")
            for name in TIMES:
                times = np.array(column(by_arm[arm], name))
                saved = np.mean((1 - times) / (1 - np.array(macs)))
                line.append(f"{100 * times.mean():.1f} ({saved:.2f})")
            lines.append(line)
        header = ["searched under", "accuracy, %", "MACs left, %"]
        header += [TIME_NAMES[name] for name in TIMES]
        yield f"\n### {NAMES[model]}\n\n" + table(header, lines)
        yield gain(by_arm)


def gain(by_arm: dict[str, Rows]) -> str:
    """What a budget of time gains at equal time, over the seeds that both have.

    Args:
        by_arm: Rows of one network.
    """
    tests = {}
    for arm in ("latency", "equal"):
        of_arm = by_arm.get(arm, [])
        tests[arm] = {row["seed"]: 100 * float(row["test"]) for row in of_arm}
    gains = []
    for seed in tests["latency"].keys() & tests["equal"].keys():
        gains.append(tests["latency"][seed] - tests["equal"][seed])
    if not gains:
        return ""
    return f"\nPoints gained at equal time, seed by seed: {values_cell(gains, 2)}.\n"


def _place(row: dict[str, str]) -> tuple[int, int, int, str]:
    """Where a row stands: networks as in `NAMES`, then engines as in `ENGINES`."""
    model = list(NAMES).index(row["model"])
    engine = list(ENGINES).index(row["engine"])
    return model, engine, int(row["batch"]), row.get("budget", "")


if __name__ == "__main__":
    main()
