"""One offline HTML page per run: what was found, how, and the split behind every
number. Reads the run folder only.
"""

from pathlib import Path

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
from autoprune.runs import RunFolder, write_text

ASSETS = Path(__file__).parent / "assets"
Rows = list[list[str]]
TRAININGS = {
    "sparse epoch": "sparse training",
    "removal epoch": "training that prunes",
    "epoch": "fine-tuning",
}
"""Events of the log to what is trained then, in order."""


def write_report(folder: RunFolder) -> Path:
    """Writes `report.html`, the same bytes for the same run; what a run hasn't done yet
    the page says in words.

    Args:
        folder: The run, with its config, results and log.

    Returns:
        The page's path.

    Raises:
        UserError: If the run has no results yet, or a file is damaged.
    """
    known = {
        key: value
        for key, value in folder.read_json(folder.results).items()
        if value is not None
    }
    results = known if "model" in known else _asked(folder) | known
    rewards, trainings = (
        _series(folder, "episode", "episode", "reward"),
        _trainings(folder, results),
    )
    pareto = folder.read_json(folder.pareto) if folder.pareto.exists() else None
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.jinja").render(
        results=results,
        headline=_headline(results),
        facts=_facts(results),
        costs=_cost_rows(results),
        stages=_stage_rows(results),
        groups=_columns(results.get("groups", []), "kept"),
        pinned=_columns(results.get("pinned", []), "reason"),
        pareto=pareto,
        has_policy=(folder.policy / "policy.json").exists(),
        points=_point_rows(pareto, results) if pareto else [],
        has_dimensions=any(
            row["name"] == "resolution" for row in results.get("groups", [])
        ),
        dimensions=_dimension_rows(results["dimensions"])
        if "dimensions" in results
        else [],
        searchers=_searcher_rows(results, rewards),
        finalists=_finalist_rows(results),
        n_episodes=len(rewards),
        figures=_figures(results, pareto, rewards, trainings),
        rivals=_rivals(results),
        config=yaml.safe_dump(
            folder.read_config(), sort_keys=False, allow_unicode=True
        ),
    )
    write_text(folder.report, html)
    return folder.report


def _asked(folder: RunFolder) -> dict:
    """What results.json says as soon as something is being decided, of a run that was
    interrupted before.
    """
    settings = Settings.from_dict(folder.read_config())
    asked = {
        "run": str(folder.root),
        "model": settings.network.model,
        "data": settings.data.data,
    }
    return asked | {
        name: getattr(settings.search, name) for name in ("budget", "agent", "seed")
    }


def _series(folder: RunFolder, event: str, number: str, value: str) -> dict[int, float]:
    # A resumed run may log an episode or epoch again; the last entry is the one that
    # counted.
    return dict(
        sorted({entry[number]: entry[value] for entry in folder.events(event)}.items())
    )


def _trainings(folder: RunFolder, results: dict) -> dict[str, list[float]]:
    """What was trained to the mean loss of each epoch; of an earlier, longer
    fine-tuning the log knows later epochs.
    """
    losses = {
        name: list(_series(folder, event, "epoch", "loss").values())
        for event, name in TRAININGS.items()
    }
    losses["fine-tuning"] = losses["fine-tuning"][: results.get("finetune_epochs")]
    return {name: values for name, values in losses.items() if values}


def _headline(results: dict) -> str:
    subject = f"{results['model']} on {results['data']}"
    if "macs_ratio" not in results:
        return f"{subject}: {results['budget']} asked for, nothing decided yet"
    within = f"{_percent(results['macs_ratio'], 1)} of the MACs"
    stages = {"accuracy": "", "accuracy_pruned": " before fine-tuning"}
    stage = next((key for key in stages if key in results), None)
    if stage is None or "accuracy_dense" not in results:
        return f"{subject}: an allocation with {within}, not fine-tuned yet"
    accuracies = (
        f"{_percent(results['accuracy_dense'], 1)} → {_percent(results[stage], 1)}"
    )
    return f"{subject}: {within}, accuracy {accuracies}{stages[stage]}"


def _facts(results: dict) -> Rows:
    formats = {
        "method": str,
        "budget": str,
        "agent": str,
        "seed": str,
        "episodes": _count,
        "evaluations": _count,
        "seconds_search": _duration,
        "seconds_total": _duration,
    }
    labels = {"seconds_search": "search", "seconds_total": "whole run"}
    return [
        [labels.get(key, key), show(results[key])]
        for key, show in formats.items()
        if key in results
    ]


def _columns(groups: list[dict], last: str) -> Rows:
    return [
        [group["name"], _count(group["channels"]), str(group[last])] for group in groups
    ]


def _cost_rows(results: dict) -> Rows:
    labels = {"macs": "MACs", "params": "Parameters", "memory_bytes": "Memory, bytes"}
    rows = [
        [
            label,
            _count(results[f"{key}_dense"]),
            _count(results[key]),
            *_change(results[f"{key}_dense"], results[key]),
        ]
        for key, label in labels.items()
        if key in results and f"{key}_dense" in results
    ]
    for row in results.get("latency", []):
        label = f"Latency, {row['engine']}, batch {row['batch']}, {_plural(row['threads'], 'thread')}"
        times = row["dense_ms"], row["pruned_ms"]
        rows.append([label, *map(_milliseconds, times), *_change(*times)])
    if (
        "latency" not in results
        and "latency_ms" in results
        and "latency_ms_dense" in results
    ):
        times = results["latency_ms_dense"], results["latency_ms"]
        rows.append(["Latency", *map(_milliseconds, times), *_change(*times)])
    return rows


def _change(dense: float, pruned: float) -> tuple[str, str]:
    return _percent(pruned / dense, 1), f"{dense / pruned:.2f} ×"


def _stage_rows(results: dict) -> Rows:
    """A run that prunes by training has no accuracy of what the search compared: that
    was sliced at once.

    What is fine-tuned may have begun with weights solved anew though the search
    compared sliced networks.
    """
    is_trained, is_tuned = (
        "removal_method" in results,
        results.get("finetune_epochs") != 0,
    )
    stages = [
        ("Dense", "test", "accuracy_dense", True),
        ("As the search saw it", "selection", "selection_accuracy", not is_trained),
        (
            "Pruned by training" if is_trained else "Pruned",
            "test",
            "accuracy_pruned",
            True,
        ),
        ("Fine-tuned", "test", "accuracy", is_tuned),
    ]
    return [
        [
            name,
            split,
            _count_if_known(results, f"{split}_images"),
            _percent(results[key]),
        ]
        for name, split, key, holds in stages
        if holds and key in results
    ]


def _dimension_rows(found: dict) -> Rows:
    """Networks that were measured, the model's optimum, and what was built."""
    measured = [
        (str(n), point, point["accuracy"], point["fitted"])
        for n, point in enumerate(found["points"], 1)
    ]
    ends = {"Optimum": found["optimum"], "Built": found["chosen"]}
    promised = [
        (title, point, None, point["accuracy"]) for title, point in ends.items()
    ]
    return [
        [
            name,
            *(_percent(point[size], 1) for size in ("depth", "width", "resolution")),
            "–" if accuracy is None else _percent(accuracy, 1),
            _percent(fitted, 1),
        ]
        for name, point, accuracy, fitted in (*measured, *promised)
    ]


SCORES = {
    "proxy_accuracy": lambda value: _percent(value),
    "proxy_loss": lambda value: _score(value),
    "selection_accuracy": lambda value: _percent(value),
    "selection_loss": lambda value: _score(value),
}


def _scores(entry: dict) -> list[str]:
    return [
        show(entry[key]) if entry.get(key) is not None else "–"
        for key, show in SCORES.items()
    ]


def _is_chosen(finalist: dict, results: dict) -> bool:
    return all(
        key in results and finalist.get(key) == results[key]
        for key in ("selection_accuracy", "selection_loss")
    )


def _searcher_rows(results: dict, rewards: dict[int, float]) -> Rows:
    chosen = next(
        (
            finalist
            for finalist in results.get("finalists", [])
            if _is_chosen(finalist, results)
        ),
        {},
    )
    own = {**chosen, **results, "reward": max(rewards.values(), default=None)}
    searchers = {f"{results['agent']} (this run)": own, **results.get("baselines", {})}
    return [
        [
            name,
            _count_if_known(entry, "evaluations"),
            "–" if entry.get("reward") is None else _score(entry["reward"]),
            *_scores(entry),
        ]
        for name, entry in searchers.items()
    ]


def _finalist_rows(results: dict) -> Rows:
    return [
        [
            f"{entry['source']}{', chosen' if _is_chosen(entry, results) else ''}",
            _count(entry["macs"]),
            *_scores(entry),
        ]
        for entry in results.get("finalists", [])
    ]


METRICS = {"macs": "MACs", "params": "parameters"}


def _point_rows(pareto: dict, results: dict) -> Rows:
    return [
        [
            _percent(point["share"], 1)
            + (", chosen" if line == "front" and _is_chosen(point, results) else ""),
            "uniform" if line == "uniform" else point["source"],
            _count(point["cost"]),
            *_scores(point),
        ]
        for line in ("front", "uniform")
        for point in pareto[line]
    ]


def _pareto_figure(pareto: dict, results: dict) -> str:
    front, uniform = (
        [(p["share"], p["selection_accuracy"]) for p in pareto[line]]
        for line in ("front", "uniform")
    )
    metric = METRICS[pareto["metric"]]
    chosen = next(
        (i for i, point in enumerate(pareto["front"]) if _is_chosen(point, results)),
        None,
    )
    ends = " to ".join(_percent(accuracy, 1) for _, accuracy in (front[0], front[-1]))
    shares = " to ".join(_percent(share, 1) for share, _ in (front[0], front[-1]))
    others = " to ".join(
        _percent(accuracy, 1) for _, accuracy in (uniform[0], uniform[-1])
    )
    title = f"Pareto front of {_plural(len(front), 'point')}: accuracy {ends} with {shares} of the {metric}; "
    title += f"uniform pruning {others}; the table below holds the same numbers"
    return render_svg(pareto_front(front, uniform, metric, chosen), "pareto", title)


def _rivals(results: dict) -> dict[str, float]:
    """The best reward of every baseline that has one: what is drawn beside the search."""
    baselines = results.get("baselines", {})
    return {
        name: entry["reward"]
        for name, entry in baselines.items()
        if entry.get("reward") is not None
    }


def _figures(
    results: dict,
    pareto: dict | None,
    rewards: dict[int, float],
    trainings: dict[str, list[float]],
) -> dict[str, str]:
    figures = {}
    if pareto:
        figures["pareto"] = _pareto_figure(pareto, results)
    if rewards and pareto:
        title = f"Reward of {_plural(len(rewards), 'episode')}, each under a budget of its own"
        figures["reward"] = render_svg(
            reward_curve(rewards, {}, comparable=False), "reward", title
        )
    elif len(rewards) > 1:
        best = max(rewards, key=rewards.get)
        title = f"Reward of {_plural(len(rewards), 'episode')}; the best, {_score(rewards[best])}, in episode {best}"
        figures["reward"] = render_svg(
            reward_curve(rewards, _rivals(results)), "reward", title
        )
    if results.get("groups"):
        columns = (
            [group[key] for group in results["groups"]]
            for key in ("name", "channels", "kept")
        )
        counted = results.get("counted", "channels")
        title = f"{counted[0].upper()}{counted[1:]} kept, in network order; the table below holds the same numbers"
        figures["allocation"] = render_svg(
            allocation_bars(*columns, counted), "allocation", title
        )
    if trainings:
        n_epochs, last = (
            sum(map(len, trainings.values())),
            list(trainings.values())[-1][-1],
        )
        title = f"Training loss over {_plural(n_epochs, 'epoch')}; {_score(last)} after the last"
        figures["loss"] = render_svg(loss_curve(trainings), "loss", title)
    return figures


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _count(value: int) -> str:
    return f"{value:,}"


def _count_if_known(entry: dict, key: str) -> str:
    return _count(entry[key]) if key in entry else "–"


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
