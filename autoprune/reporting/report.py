"""One offline HTML page per run, made from the run folder alone.

It tells what was found, how, and the split behind every number.
"""

from pathlib import Path
from typing import Any

import yaml

from autoprune.config import Settings
from autoprune.files import PLAN, write_text
from autoprune.reporting.figures import (
    allocation_bars,
    loss_curve,
    pareto_front,
    render_svg,
    reward_curve,
)
from autoprune.reporting.pages import render_page
from autoprune.reporting.rows import (
    budget_rows,
    cost_rows,
    dimension_rows,
    fact_rows,
    finalist_rows,
    group_rows,
    is_chosen,
    point_rows,
    preprocessing_rows,
    searcher_rows,
    stage_rows,
    time_budget_rows,
)
from autoprune.reporting.usage import Snippet, usage_snippets
from autoprune.reporting.wording import METRICS, percent_text, plural, score_text
from autoprune.results import Results
from autoprune.runs import RunFolder

TRAININGS = {
    "sparse epoch": "sparse training",
    "removal epoch": "training that prunes",
    "epoch": "fine-tuning",
}
"""Events of the log to what is trained then, in order."""


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
    groups = results.groups or []
    config = yaml.safe_dump(folder.read_config(), sort_keys=False, allow_unicode=True)
    html = render_page(
        "report.html.jinja",
        results=results,
        headline=_headline(results),
        facts=fact_rows(results),
        budgets=budget_rows(results),
        costs=cost_rows(results),
        stages=stage_rows(results),
        time_budget=time_budget_rows(results),
        preprocessing=preprocessing_rows(results),
        usage=_usage(folder, results),
        groups=group_rows(groups, "kept"),
        pinned=group_rows(results.pinned or [], "reason"),
        pareto=pareto,
        has_policy=(folder.policy / "policy.json").exists(),
        points=point_rows(pareto, results) if pareto else [],
        has_dimensions=any(row["name"] == "resolution" for row in groups),
        dimensions=dimension_rows(results),
        searchers=searcher_rows(results, rewards),
        finalists=finalist_rows(results),
        n_episodes=len(rewards),
        figures=_figures(results, pareto, rewards, trainings),
        rivals=_best_of_baselines(results),
        config=config,
    )
    write_text(folder.report, html)
    return folder.report


def _usage(folder: RunFolder, results: Results) -> list[Snippet]:
    """Ways to use the pruned network, as soon as there is one."""
    plan = folder.pruned / PLAN
    if not plan.exists():
        return []
    return usage_snippets(results, folder.read_json(plan), folder.onnx.exists())


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
    within = _within(results)
    reached = results.accuracy
    stage = ""
    if reached is None:
        reached = results.accuracy_pruned
        stage = " before fine-tuning"
    if reached is None or results.accuracy_dense is None:
        return f"{subject}: an allocation with {within}, not fine-tuned yet"
    accuracies = (
        f"{percent_text(results.accuracy_dense, 1)} → {percent_text(reached, 1)}"
    )
    return f"{subject}: {within}, accuracy {accuracies}{stage}"


def _within(results: Results) -> str:
    """What is left of the MACs, and of what else was budgeted."""
    assert results.macs_ratio is not None, "asked for what was decided"
    shares = {"macs": results.macs_ratio}
    for metric, told in (results.budgets or {}).items():
        # Counted parameters stand in the table; a budget of bytes or time is why.
        if metric not in ("macs", "params"):
            shares[metric] = told["cost"] / told["dense"]
    if results.latency_kept is not None:
        # Not what was predicted.
        shares["latency"] = results.latency_kept["measured_share"]
    texts = []
    for metric, share in shares.items():
        texts.append(f"{percent_text(share, 1)} of the {METRICS[metric]}")
    return " and ".join(texts)


def _pareto_figure(pareto: dict[str, Any], results: Results) -> str:
    front = _curve(pareto["front"])
    uniform = _curve(pareto["uniform"])
    metric = METRICS[pareto["metric"]]
    chosen = None
    for number, point in enumerate(pareto["front"]):
        if chosen is None and is_chosen(point, results):
            chosen = number
    accuracies = f"{percent_text(front[0][1], 1)} to {percent_text(front[-1][1], 1)}"
    shares = f"{percent_text(front[0][0], 1)} to {percent_text(front[-1][0], 1)}"
    others = f"{percent_text(uniform[0][1], 1)} to {percent_text(uniform[-1][1], 1)}"
    title = (
        f"Pareto front of {plural(len(front), 'point')}: accuracy {accuracies} with "
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
    n_episodes = plural(len(rewards), "episode")
    if pareto:
        figures["pareto"] = _pareto_figure(pareto, results)
    if rewards and pareto:
        title = f"Reward of {n_episodes}, each under a budget of its own"
        figure = reward_curve(rewards, {}, comparable=False)
        figures["reward"] = render_svg(figure, "reward", title)
    elif len(rewards) > 1:
        best = max(rewards, key=lambda episode: rewards[episode])
        highest = score_text(rewards[best])
        title = f"Reward of {n_episodes}; the best, {highest}, in episode {best}"
        figure = reward_curve(rewards, _best_of_baselines(results))
        figures["reward"] = render_svg(figure, "reward", title)
    if results.groups:
        figures["allocation"] = _allocation_figure(results.groups, results.counted)
    if trainings:
        n_epochs = sum(len(losses) for losses in trainings.values())
        last = list(trainings.values())[-1][-1]
        title = (
            f"Training loss over {plural(n_epochs, 'epoch')}; {score_text(last)} after "
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
