"""One offline HTML page per run, made from the run folder alone.

It tells what was found, how, and the split behind every number.
"""

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from autoprune.config import Settings
from autoprune.reporting.figures import (
    allocation_bars,
    loss_curve,
    pareto_front,
    render_svg,
    reward_curve,
)
from autoprune.results import Results
from autoprune.runs import RunFolder, write_text

ASSETS = Path(__file__).parent / "assets"
Rows = list[list[str]]
NOTHING = "–"
"""Stands in a table where nothing was measured."""
TRAININGS = {
    "sparse epoch": "sparse training",
    "removal epoch": "training that prunes",
    "epoch": "fine-tuning",
}
"""Events of the log to what is trained then, in order."""
COSTS = {"macs": "MACs", "params": "Parameters", "memory_bytes": "Memory, bytes"}
"""Costs in the results, and what the page calls them."""
METRICS = {"macs": "MACs", "params": "parameters"}
"""What a budget counts, within a sentence."""


def write_report(folder: RunFolder) -> Path:
    """Writes `report.html`, the same bytes for the same run.

    What a run hasn't done yet the page says in words.

    Args:
        folder: The run, with its config, results and log.

    Returns:
        The page's path.

    Raises:
        UserError: If the run has no results yet, or a file is damaged.
    """
    # Through `read_json`, which says how a run without results goes on.
    results = Results.from_json(folder.read_json(folder.results))
    if results.model is None:
        results = _with_settings(results, folder)
    rewards = _series(folder, "episode", "episode", "reward")
    trainings = _trainings(folder, results)
    pareto = folder.read_json(folder.pareto) if folder.pareto.exists() else None
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = results.groups or []
    config = yaml.safe_dump(folder.read_config(), sort_keys=False, allow_unicode=True)
    html = environment.get_template("report.html.jinja").render(
        results=results,
        headline=_headline(results),
        facts=_facts(results),
        costs=_cost_rows(results),
        stages=_stage_rows(results),
        groups=_group_rows(groups, "kept"),
        pinned=_group_rows(results.pinned or [], "reason"),
        pareto=pareto,
        has_policy=(folder.policy / "policy.json").exists(),
        points=_point_rows(pareto, results) if pareto else [],
        has_dimensions=any(row["name"] == "resolution" for row in groups),
        dimensions=_dimension_rows(results),
        searchers=_searcher_rows(results, rewards),
        finalists=_finalist_rows(results),
        n_episodes=len(rewards),
        figures=_figures(results, pareto, rewards, trainings),
        rivals=_best_of_baselines(results),
        config=config,
    )
    write_text(folder.report, html)
    return folder.report


def _with_settings(results: Results, folder: RunFolder) -> Results:
    """The results of a run that was interrupted before anything was decided."""
    settings = Settings.from_dict(folder.read_config())
    return results.updated(
        run=str(folder.root),
        model=settings.network.model,
        data=settings.data.data,
        budget=settings.search.budget,
        agent=settings.search.agent,
        seed=settings.search.seed,
    )


def _series(folder: RunFolder, event: str, number: str, value: str) -> dict[int, float]:
    """A value of the log by its number, in order.

    A resumed run may log an episode or epoch again; the last entry counted.
    """
    values = {entry[number]: entry[value] for entry in folder.events(event)}
    return dict(sorted(values.items()))


def _trainings(folder: RunFolder, results: Results) -> dict[str, list[float]]:
    """What was trained to the mean loss of each epoch."""
    trainings = {}
    for event, name in TRAININGS.items():
        losses = list(_series(folder, event, "epoch", "loss").values())
        if name == "fine-tuning":
            # Of an earlier, longer fine-tuning the log knows later epochs.
            losses = losses[: results.finetune_epochs]
        if losses:
            trainings[name] = losses
    return trainings


def _headline(results: Results) -> str:
    subject = f"{results.model} on {results.data}"
    if results.macs_ratio is None:
        return f"{subject}: {results.budget} asked for, nothing decided yet"
    within = f"{_percent(results.macs_ratio, 1)} of the MACs"
    reached = results.accuracy
    stage = ""
    if reached is None:
        reached = results.accuracy_pruned
        stage = " before fine-tuning"
    if reached is None or results.accuracy_dense is None:
        return f"{subject}: an allocation with {within}, not fine-tuned yet"
    accuracies = f"{_percent(results.accuracy_dense, 1)} → {_percent(reached, 1)}"
    return f"{subject}: {within}, accuracy {accuracies}{stage}"


def _facts(results: Results) -> Rows:
    """What the page says of the run at its top."""
    rows = []
    for name in ("method", "budget", "agent", "seed"):
        value = getattr(results, name)
        if value is not None:
            rows.append([name, str(value)])
    for name in ("episodes", "evaluations"):
        value = getattr(results, name)
        if value is not None:
            rows.append([name, _count(value)])
    if results.seconds_search is not None:
        rows.append(["search", _duration(results.seconds_search)])
    if results.seconds_total is not None:
        rows.append(["whole run", _duration(results.seconds_total)])
    return rows


def _group_rows(groups: list[dict[str, Any]], last: str) -> Rows:
    rows = []
    for group in groups:
        rows.append([group["name"], _count(group["channels"]), str(group[last])])
    return rows


def _cost_rows(results: Results) -> Rows:
    rows = []
    for name, label in COSTS.items():
        dense = getattr(results, f"{name}_dense")
        pruned = getattr(results, name)
        if dense is not None and pruned is not None:
            change = _change(dense, pruned)
            rows.append([label, _count(dense), _count(pruned), *change])
    for row in results.latency or []:
        threads = _plural(row["threads"], "thread")
        label = f"Latency, {row['engine']}, batch {row['batch']}, {threads}"
        rows.append(_latency_row(label, row["dense_ms"], row["pruned_ms"]))
    # Runs of earlier versions have no table of engines.
    dense_ms = results.latency_ms_dense
    pruned_ms = results.latency_ms
    if results.latency is None and dense_ms is not None and pruned_ms is not None:
        rows.append(_latency_row("Latency", dense_ms, pruned_ms))
    return rows


def _latency_row(label: str, dense_ms: float, pruned_ms: float) -> list[str]:
    times = [_milliseconds(dense_ms), _milliseconds(pruned_ms)]
    return [label, *times, *_change(dense_ms, pruned_ms)]


def _change(dense: float, pruned: float) -> tuple[str, str]:
    return _percent(pruned / dense, 1), f"{dense / pruned:.2f} ×"


def _stage_rows(results: Results) -> Rows:
    """The accuracy at each stage, with its split.

    A run that prunes by training has no accuracy of what the search compared: that was
    sliced at once. What is fine-tuned may have begun with weights solved anew though
    the search compared sliced networks.
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
            n_images = _count_if_known(getattr(results, f"{split}_images"))
            rows.append([name, split, n_images, _percent(accuracy)])
    return rows


def _dimension_rows(results: Results) -> Rows:
    """Networks that were measured, the model's optimum, and what was built."""
    if results.dimensions is None:
        return []
    rows = []
    for number, point in enumerate(results.dimensions["points"], 1):
        measured = _percent(point["accuracy"], 1)
        fitted = _percent(point["fitted"], 1)
        rows.append([str(number), *_sizes(point), measured, fitted])
    for title, name in (("Optimum", "optimum"), ("Built", "chosen")):
        point = results.dimensions[name]
        promised = _percent(point["accuracy"], 1)
        rows.append([title, *_sizes(point), NOTHING, promised])
    return rows


def _sizes(point: dict[str, float]) -> list[str]:
    return [_percent(point[name], 1) for name in ("depth", "width", "resolution")]


def _scores(entry: dict[str, Any]) -> list[str]:
    """Accuracy and loss on the proxy and on the selection split."""
    cells = []
    for split in ("proxy", "selection"):
        accuracy = entry.get(f"{split}_accuracy")
        loss = entry.get(f"{split}_loss")
        cells.append(NOTHING if accuracy is None else _percent(accuracy))
        cells.append(NOTHING if loss is None else _score(loss))
    return cells


def _is_chosen(finalist: dict[str, Any], results: Results) -> bool:
    """Whether the run went on with a finalist, or with a point of the front."""
    accuracy = results.selection_accuracy
    loss = results.selection_loss
    if accuracy is None or loss is None:
        return False
    return (
        finalist.get("selection_accuracy") == accuracy
        and finalist.get("selection_loss") == loss
    )


def _searcher_rows(results: Results, rewards: dict[int, float]) -> Rows:
    """The run's agent and its baselines, each with the best that it found."""
    this_run: dict[str, Any] = {}
    for finalist in results.finalists or []:
        if _is_chosen(finalist, results):
            this_run |= finalist
            break
    this_run |= results.to_json()
    this_run["reward"] = max(rewards.values(), default=None)
    searchers = {f"{results.agent} (this run)": this_run, **(results.baselines or {})}
    rows = []
    for name, entry in searchers.items():
        reward = entry.get("reward")
        shown = NOTHING if reward is None else _score(reward)
        evaluations = _count_if_known(entry.get("evaluations"))
        rows.append([name, evaluations, shown, *_scores(entry)])
    return rows


def _finalist_rows(results: Results) -> Rows:
    rows = []
    for entry in results.finalists or []:
        mark = ", chosen" if _is_chosen(entry, results) else ""
        source = f"{entry['source']}{mark}"
        rows.append([source, _count(entry["macs"]), *_scores(entry)])
    return rows


def _point_rows(pareto: dict[str, Any], results: Results) -> Rows:
    """The front, then uniform pruning at the budgets that were compared."""
    rows = []
    for point in pareto["front"]:
        mark = ", chosen" if _is_chosen(point, results) else ""
        share = _percent(point["share"], 1) + mark
        rows.append([share, point["source"], _count(point["cost"]), *_scores(point)])
    for point in pareto["uniform"]:
        share = _percent(point["share"], 1)
        rows.append([share, "uniform", _count(point["cost"]), *_scores(point)])
    return rows


def _pareto_figure(pareto: dict[str, Any], results: Results) -> str:
    front = _curve(pareto["front"])
    uniform = _curve(pareto["uniform"])
    metric = METRICS[pareto["metric"]]
    chosen = None
    for number, point in enumerate(pareto["front"]):
        if chosen is None and _is_chosen(point, results):
            chosen = number
    accuracies = f"{_percent(front[0][1], 1)} to {_percent(front[-1][1], 1)}"
    shares = f"{_percent(front[0][0], 1)} to {_percent(front[-1][0], 1)}"
    others = f"{_percent(uniform[0][1], 1)} to {_percent(uniform[-1][1], 1)}"
    title = (
        f"Pareto front of {_plural(len(front), 'point')}: accuracy {accuracies} with "
        f"{shares} of the {metric}; uniform pruning {others}; the table below holds "
        f"the same numbers"
    )
    return render_svg(pareto_front(front, uniform, metric, chosen), "pareto", title)


def _curve(points: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Share of the cost and accuracy on the selection split of each point."""
    return [(point["share"], point["selection_accuracy"]) for point in points]


def _best_of_baselines(results: Results) -> dict[str, float]:
    """The best reward of every baseline that has one: drawn beside the search."""
    rewards = {}
    for name, entry in (results.baselines or {}).items():
        if entry.get("reward") is not None:
            rewards[name] = entry["reward"]
    return rewards


def _figures(
    results: Results,
    pareto: dict[str, Any] | None,
    rewards: dict[int, float],
    trainings: dict[str, list[float]],
) -> dict[str, str]:
    """Name to SVG of what there is to draw."""
    figures = {}
    n_episodes = _plural(len(rewards), "episode")
    if pareto:
        figures["pareto"] = _pareto_figure(pareto, results)
    if rewards and pareto:
        title = f"Reward of {n_episodes}, each under a budget of its own"
        figure = reward_curve(rewards, {}, comparable=False)
        figures["reward"] = render_svg(figure, "reward", title)
    elif len(rewards) > 1:
        best = max(rewards, key=lambda episode: rewards[episode])
        title = (
            f"Reward of {n_episodes}; the best, {_score(rewards[best])}, in episode "
            f"{best}"
        )
        figure = reward_curve(rewards, _best_of_baselines(results))
        figures["reward"] = render_svg(figure, "reward", title)
    if results.groups:
        figures["allocation"] = _allocation_figure(results.groups, results.counted)
    if trainings:
        n_epochs = sum(len(losses) for losses in trainings.values())
        last = list(trainings.values())[-1][-1]
        title = (
            f"Training loss over {_plural(n_epochs, 'epoch')}; {_score(last)} after "
            f"the last"
        )
        figures["loss"] = render_svg(loss_curve(trainings), "loss", title)
    return figures


def _allocation_figure(groups: list[dict[str, Any]], counted: str | None) -> str:
    counted = counted or "channels"
    names = [group["name"] for group in groups]
    channels = [group["channels"] for group in groups]
    kept = [group["kept"] for group in groups]
    # "MACs" begins with a capital already, so `capitalize` would spoil it.
    subject = counted[0].upper() + counted[1:]
    title = f"{subject} kept, in network order; the table below holds the same numbers"
    figure = allocation_bars(names, channels, kept, counted)
    return render_svg(figure, "allocation", title)


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _count(value: int) -> str:
    return f"{value:,}"


def _count_if_known(value: int | None) -> str:
    return NOTHING if value is None else _count(value)


def _score(value: float) -> str:
    return f"{value:.4f}".replace("-", "\N{MINUS SIGN}")


def _milliseconds(value: float) -> str:
    return f"{value:.2f}\N{NO-BREAK SPACE}ms"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
