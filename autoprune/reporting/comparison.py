"""Finished runs beside each other: as data, and as one offline page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.config import Settings
from autoprune.errors import UserError
from autoprune.reporting.wording import (
    METRICS,
    NOTHING,
    duration_text,
    percent_text,
    plural,
    points_text,
    setting_text,
)
from autoprune.results import COST_FIELDS, Results
from autoprune.runs import RunFolder, write_text

HEADERS = (
    "",
    "Run",
    "Agent",
    "Budget",
    "MACs left",
    "Parameters left",
    "Dense accuracy",
    "Accuracy",
    "Points",
    "Fine-tuned",
    "Latency left",
    "Search",
)
"""Columns of the comparison."""
NEEDED = ("macs", "macs_dense", "params", "params_dense", "accuracy", "accuracy_dense")
"""Results without which a run isn't finished."""
MEASURES = COST_FIELDS | {"latency": "latency_ms"}
"""What a budget may count to the field that holds it; `_dense` follows for the dense
network.
"""


@dataclass(frozen=True)
class FinishedRun:
    """A run to compare.

    Attributes:
        name: Its folder, as it was given.
        results: What it measured; all of `NEEDED` are there.
        settings: What it was started with.
    """

    name: str
    results: Results
    settings: Settings

    @classmethod
    def open(cls, root: str) -> "FinishedRun":
        """Reads a run.

        Args:
            root: Its folder.

        Raises:
            UserError: If it is none, or not finished.
        """
        folder = RunFolder.open(root, "runs")
        try:
            settings = Settings.from_dict(folder.read_config())
            results = folder.read_results()
        except UserError as error:
            # Which of the runs isn't in these messages, made for commands of one run.
            raise UserError("runs", f"{root!r}: {error.reason}") from error
        if any(getattr(results, name) is None for name in NEEDED):
            raise UserError(
                "runs",
                f"{root!r} is not finished; go on with: autoprune run --resume --out "
                f"{root}",
            )
        return cls(root, results, settings)

    def number(self, name: str) -> float:
        """One of the results that every finished run has.

        Args:
            name: One of `NEEDED`, or another that is there.
        """
        return getattr(self.results, name)

    def share(self, metric: str) -> float:
        """Cost of the pruned network as a share of the dense one's.

        Args:
            metric: A key of `MEASURES` that it has counted.
        """
        field = MEASURES[metric]
        return self.number(field) / self.number(f"{field}_dense")

    @property
    def metric(self) -> str:
        """What its budget counts; "macs" where that is several metrics or isn't told.

        Runs of earlier versions haven't counted every metric.
        """
        budget = self.results.budget or "macs"
        metric = budget.partition("=")[0]
        field = MEASURES.get(metric)
        is_known = field is not None and getattr(self.results, field) is not None
        return metric if is_known and "," not in budget else "macs"

    def to_json(self) -> dict[str, Any]:
        """What the comparison says of it, as plain data."""
        results = self.results
        row: dict[str, Any] = {"run": self.name}
        for name in ("model", "data", "agent", "budget", "seed"):
            row[name] = getattr(results, name)
        row["macs_ratio"] = self.share("macs")
        row["params_ratio"] = self.share("params")
        for name in ("accuracy_dense", "accuracy_pruned", "accuracy"):
            row[name] = getattr(results, name)
        row["finetune_epochs"] = results.finetune_epochs
        row["latency_ratio"] = _ratio(results.latency_ms, results.latency_ms_dense)
        row["latency_setting"] = results.latency_setting
        row["seconds_search"] = results.seconds_search
        return row


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole


def open_runs(roots: Sequence[str]) -> list[FinishedRun]:
    """The runs to compare.

    Args:
        roots: Their folders.

    Raises:
        UserError: If one isn't a finished run or is given twice, or there is only one.
    """
    places = [Path(root).resolve() for root in roots]
    for place, root in zip(places, roots, strict=True):
        if places.count(place) > 1:
            raise UserError("runs", f"{root!r} is given twice; give each run once")
    if len(roots) < 2:
        raise UserError("runs", f"two or more are compared, got {roots[0]!r} alone")
    return [FinishedRun.open(root) for root in roots]


def differences(runs: Sequence[FinishedRun]) -> dict[str, list[Any]]:
    """The settings in which runs differ.

    Args:
        runs: The runs.

    Returns:
        Setting, as messages call it, to its value in each run.
    """
    settings = [run.settings.arguments for run in runs]
    differing = {}
    for name in settings[0]:
        values = [known[name] for known in settings]
        if any(value != values[0] for value in values):
            differing[name] = values
    return differing


def comparison_rows(runs: Sequence[FinishedRun]) -> list[list[str]]:
    """The runs as text, in the columns of `HEADERS`.

    Args:
        runs: The runs.
    """
    rows = []
    for number, run in enumerate(runs, 1):
        row = run.to_json()
        change = row["accuracy"] - row["accuracy_dense"]
        epochs = row["finetune_epochs"]
        seconds = row["seconds_search"]
        latency = row["latency_ratio"]
        rows.append(
            [
                str(number),
                run.name,
                row["agent"] or NOTHING,
                row["budget"] or NOTHING,
                percent_text(row["macs_ratio"], 1),
                percent_text(row["params_ratio"], 1),
                percent_text(row["accuracy_dense"]),
                percent_text(row["accuracy"]),
                points_text(change),
                plural(epochs, "epoch") if epochs else "no",
                NOTHING if latency is None else percent_text(latency, 1),
                NOTHING if seconds is None else duration_text(seconds),
            ]
        )
    return rows


def latency_settings(runs: Sequence[FinishedRun]) -> list[str]:
    """What the latency of each run was measured in, as text.

    Args:
        runs: The runs.
    """
    texts = []
    for run in runs:
        setting = run.results.latency_setting
        texts.append(NOTHING if setting is None else setting_text(setting))
    return texts


def write_comparison(runs: Sequence[FinishedRun], path: Path) -> None:
    """Writes the page.

    Args:
        runs: The runs.
        path: The page's file.
    """
    from autoprune.reporting.pages import render_page

    differing = differences(runs)
    setting_rows = []
    for name, values in differing.items():
        shown = ["null" if value is None else str(value) for value in values]
        setting_rows.append([name, *shown])
    names = []
    measured = []
    origins = []
    # In two tables: one would be wider than the page.
    settings = latency_settings(runs)
    for setting, row in zip(settings, comparison_rows(runs), strict=True):
        number, name, agent, budget, *cells = row
        *costs, epochs, latency, search = cells
        names.append(f"{number} {name}")
        measured.append([names[-1], *costs, latency])
        origins.append([names[-1], agent, budget, epochs, setting, search])
    html = render_page(
        "comparison.html.jinja",
        headline=f"{len(runs)} runs: {_spread(runs)}",
        facts=_facts(runs),
        names=names,
        measured=measured,
        origins=origins,
        settings=setting_rows,
        figure_svg=_figure(runs),
        metric=METRICS[_metric(runs)],
    )
    write_text(path, html)


def _metric(runs: Sequence[FinishedRun]) -> str:
    """What the figure's cost counts: what all budgets do, MACs where they differ.

    Latencies are compared only where all were measured alike.
    """
    metrics = {run.metric for run in runs}
    if metrics == {"latency"} and len(set(latency_settings(runs))) > 1:
        return "macs"
    return metrics.pop() if len(metrics) == 1 else "macs"


def _spread(runs: Sequence[FinishedRun]) -> str:
    accuracies = sorted(run.number("accuracy") for run in runs)
    metric = _metric(runs)
    shares = sorted(run.share(metric) for run in runs)
    return (
        f"accuracy {percent_text(accuracies[0], 1)} to "
        f"{percent_text(accuracies[-1], 1)} with {percent_text(shares[0], 1)} to "
        f"{percent_text(shares[-1], 1)} of the {METRICS[metric]}"
    )


def _facts(runs: Sequence[FinishedRun]) -> list[list[str]]:
    best = max(runs, key=lambda run: run.number("accuracy"))
    cheapest = min(runs, key=lambda run: run.share(_metric(runs)))
    facts = []
    for name in ("model", "data"):
        # In their order, each once.
        values = dict.fromkeys(str(getattr(run.results, name)) for run in runs)
        facts.append([name, ", ".join(values)])
    facts.append(["most accurate", best.name])
    facts.append(["cheapest", cheapest.name])
    return facts


def _figure(runs: Sequence[FinishedRun]) -> str:
    # Here, since matplotlib takes a while that a refusal needn't wait for.
    from autoprune.reporting.figures import accuracy_cost, render_svg

    metric = _metric(runs)
    points = [(run.share(metric), run.number("accuracy")) for run in runs]
    dense = {}
    for run in runs:
        dense[f"dense {run.results.model}"] = run.number("accuracy_dense")
    if len(dense) == 1:
        dense = {"dense": next(iter(dense.values()))}
    title = (
        f"Accuracy of {plural(len(runs), 'run')} against the share of the "
        f"{METRICS[metric]} left; the table below holds the same numbers"
    )
    figure = accuracy_cost(points, dense, METRICS[metric])
    return render_svg(figure, "comparison", title)
