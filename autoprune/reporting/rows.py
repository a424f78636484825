"""The rows of the report's tables: cells in the order of the columns, as text."""

from typing import Any

from autoprune.reporting.budgets import budget_lines
from autoprune.reporting.wording import (
    NOTHING,
    amount_text,
    count_if_known,
    count_text,
    duration_text,
    milliseconds_text,
    percent_text,
    score_text,
    setting_text,
    widths_text,
)
from autoprune.results import Results

Rows = list[list[str]]
COSTS = {
    "macs": "MACs",
    "params": "Parameters",
    "memory_bytes": "Memory, bytes",
    "size_bytes": "File of the weights, bytes",
}
"""Costs in the results, and what the page calls them."""


def fact_rows(results: Results) -> Rows:
    """What the page says of the run at its top.

    Args:
        results: What the run has decided and measured.
    """
    rows = []
    for name in ("method", "budget", "agent", "seed"):
        value = getattr(results, name)
        if value is not None:
            rows.append([name, str(value)])
    if results.widths is not None:
        rows.append(["widths", widths_text(results.widths)])
    for name in ("episodes", "evaluations"):
        value = getattr(results, name)
        if value is not None:
            rows.append([name, count_text(value)])
    if results.seconds_search is not None:
        rows.append(["search", duration_text(results.seconds_search)])
    if results.seconds_total is not None:
        rows.append(["whole run", duration_text(results.seconds_total)])
    return rows


def preprocessing_rows(results: Results) -> Rows:
    """How images become inputs; empty for runs that don't say.

    Args:
        results: What the run has decided and measured.
    """
    stored = results.preprocessing
    if stored is None:
        return []
    rows = [["Channels", str(stored["channels"])]]
    for label, key in (("Mean", "mean"), ("Deviation", "std")):
        rows.append([label, ", ".join(f"{value:g}" for value in stored[key])])
    for label, key in (("Scaled to", "resize"), ("Cropped to", "size")):
        height, width = stored[key]
        rows.append([label, f"{height} x {width} pixels, height x width"])
    crop = f"{stored['crop_mode']}, {stored['crop']:.4g} of the scaled image"
    rows.append(["Crop", crop])
    rows.append(["Interpolation", stored["interpolation"]])
    rows.append(["Stated by", stored["source"]])
    return rows


def group_rows(groups: list[dict[str, Any]], last: str) -> Rows:
    """Groups, with one more of their columns.

    Args:
        groups: The results' groups, or those that are pinned.
        last: Key of the last column: "kept" or "reason".
    """
    rows = []
    for group in groups:
        rows.append([group["name"], count_text(group["channels"]), str(group[last])])
    return rows


def budget_rows(results: Results) -> Rows:
    """Every budgeted metric with its target and what the pruned network costs.

    Args:
        results: What the run has decided and measured.
    """
    rows = []
    for line in budget_lines(results.budgets, results.latency_kept):
        of_budget = percent_text(line.share_of_budget, 1)
        left = percent_text(line.share_left, 1)
        rows.append([line.name, line.target, line.reached, of_budget, left])
    return rows


def cost_rows(results: Results) -> Rows:
    """What the network costs before and after, latencies among it.

    Args:
        results: What the run has decided and measured.
    """
    rows = []
    for name, label in COSTS.items():
        dense = getattr(results, f"{name}_dense")
        pruned = getattr(results, name)
        if dense is not None and pruned is not None:
            change = _change(dense, pruned)
            rows.append([label, count_text(dense), count_text(pruned), *change])
    for row in results.latency or []:
        label = f"Latency, {setting_text(row)}"
        rows.append(_latency_row(label, row["dense_ms"], row["pruned_ms"]))
    # Runs of earlier versions have no table of engines.
    dense_ms = results.latency_ms_dense
    pruned_ms = results.latency_ms
    if results.latency is None and dense_ms is not None and pruned_ms is not None:
        rows.append(_latency_row("Latency", dense_ms, pruned_ms))
    return rows


def time_budget_rows(results: Results) -> Rows:
    """How a budget of time was predicted and kept, beside what `budget_rows` tells.

    Args:
        results: What the run has decided and measured.
    """
    kept = results.latency_kept
    model = results.latency_model
    if kept is None or model is None:
        return []
    error = percent_text(model["error_median"], 1)
    largest = percent_text(model["error_95"], 1)
    return [
        ["Predicted and measured in", setting_text(kept)],
        [
            "Dense network, in turns with the pruned",
            milliseconds_text(kept["dense_ms"]),
        ],
        ["Corrections of the target", str(kept["corrections"])],
        ["Networks measured for the prediction", str(model["networks"])],
        ["Its error on others", f"{error} (median), {largest} (95th percentile)"],
    ]


def _latency_row(label: str, dense_ms: float, pruned_ms: float) -> list[str]:
    times = [milliseconds_text(dense_ms), milliseconds_text(pruned_ms)]
    return [label, *times, *_change(dense_ms, pruned_ms)]


def _change(dense: float, pruned: float) -> tuple[str, str]:
    return percent_text(pruned / dense, 1), f"{dense / pruned:.2f} ×"


def stage_rows(results: Results) -> Rows:
    """The accuracy at each stage, with its split.

    A run that prunes by training has no accuracy of what the search compared: that was
    sliced at once. What is fine-tuned may have begun with weights solved anew though
    the search compared sliced networks.

    Args:
        results: What the run has decided and measured.
    """
    is_trained = results.removal_method is not None
    stages = [("Dense", "test", results.accuracy_dense)]
    if not is_trained:
        selected = results.selection_accuracy
        stages.append(("As the search saw it", "selection", selected))
    name = "Pruned by training" if is_trained else "Pruned"
    stages.append((name, "test", results.accuracy_pruned))
    if results.finetune_epochs != 0:
        stages.append(("Fine-tuned", "test", results.accuracy))
    rows = []
    for name, split, accuracy in stages:
        if accuracy is not None:
            n_images = count_if_known(getattr(results, f"{split}_images"))
            rows.append([name, split, n_images, percent_text(accuracy)])
    return rows


def dimension_rows(results: Results) -> Rows:
    """Networks that were measured, the model's optimum, and what was built.

    Args:
        results: What the run has decided and measured.
    """
    if results.dimensions is None:
        return []
    rows = []
    for number, point in enumerate(results.dimensions["points"], 1):
        measured = percent_text(point["accuracy"], 1)
        fitted = percent_text(point["fitted"], 1)
        rows.append([str(number), *_sizes(point), measured, fitted])
    for title, name in (("Optimum", "optimum"), ("Built", "chosen")):
        point = results.dimensions[name]
        promised = percent_text(point["accuracy"], 1)
        rows.append([title, *_sizes(point), NOTHING, promised])
    return rows


def _sizes(point: dict[str, float]) -> list[str]:
    return [percent_text(point[name], 1) for name in ("depth", "width", "resolution")]


def _scores(entry: dict[str, Any]) -> list[str]:
    """Accuracy and loss on the proxy and on the selection split."""
    cells = []
    for split in ("proxy", "selection"):
        accuracy = entry.get(f"{split}_accuracy")
        loss = entry.get(f"{split}_loss")
        cells.append(NOTHING if accuracy is None else percent_text(accuracy))
        cells.append(NOTHING if loss is None else score_text(loss))
    return cells


def is_chosen(finalist: dict[str, Any], results: Results) -> bool:
    """Whether the run went on with a finalist, or with a point of the front.

    Args:
        finalist: Its scores.
        results: What the run has decided and measured.
    """
    accuracy = results.selection_accuracy
    loss = results.selection_loss
    if accuracy is None or loss is None:
        return False
    return (
        finalist.get("selection_accuracy") == accuracy
        and finalist.get("selection_loss") == loss
    )


def searcher_rows(results: Results, rewards: dict[int, float]) -> Rows:
    """The run's agent and its baselines, each with the best that it found.

    Args:
        results: What the run has decided and measured.
        rewards: Episode to its reward.
    """
    this_run: dict[str, Any] = {}
    for finalist in results.finalists or []:
        if is_chosen(finalist, results):
            this_run |= finalist
            break
    this_run |= results.to_json()
    this_run["reward"] = max(rewards.values(), default=None)
    searchers = {f"{results.agent} (this run)": this_run, **(results.baselines or {})}
    rows = []
    for name, entry in searchers.items():
        reward = entry.get("reward")
        shown = NOTHING if reward is None else score_text(reward)
        evaluations = count_if_known(entry.get("evaluations"))
        rows.append([name, evaluations, shown, *_scores(entry)])
    return rows


def finalist_rows(results: Results) -> Rows:
    """The finalists with their scores, the chosen one marked.

    Args:
        results: What the run has decided and measured.
    """
    rows = []
    for entry in results.finalists or []:
        mark = ", chosen" if is_chosen(entry, results) else ""
        source = f"{entry['source']}{mark}"
        rows.append([source, count_text(entry["macs"]), *_scores(entry)])
    return rows


def point_rows(pareto: dict[str, Any], results: Results) -> Rows:
    """The front, then uniform pruning at the budgets that were compared.

    Args:
        pareto: What pareto.json holds.
        results: What the run has decided and measured.
    """
    metric = pareto["metric"]
    rows = []
    for point in pareto["front"]:
        mark = ", chosen" if is_chosen(point, results) else ""
        share = percent_text(point["share"], 1) + mark
        cost = amount_text(metric, point["cost"])
        rows.append([share, point["source"], cost, *_scores(point)])
    for point in pareto["uniform"]:
        share = percent_text(point["share"], 1)
        cost = amount_text(metric, point["cost"])
        rows.append([share, "uniform", cost, *_scores(point)])
    return rows
