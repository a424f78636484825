"""What people see in a terminal: progress on stderr, tables on stdout."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from autoprune.reporting.budgets import budget_lines
from autoprune.reporting.verbosity import (
    SECONDS_BETWEEN_LINES,
    ProgressLines,
    Verbosity,
    verbosity,
)
from autoprune.reporting.wording import METRICS, setting_text

COSTS = (
    ("MACs", "macs", 1e6, "M"),
    ("parameters", "params", 1e3, "k"),
    ("memory, batch 1", "memory_bytes", 1e6, "MB"),
    ("size of the file", "size_bytes", 1e6, "MB"),
    ("latency", "latency_ms", 1, "ms"),
)
"""Costs of a run's table: label, key of the results, size of the unit, unit."""

NAMES_SHOWN = 4
"""Pinned groups that are named for each reason; `--json` lists all."""

SHARES = {
    "prunable_macs_share": "in layers that can shrink",
    "both_axes_macs_share": "in layers that can on both axes",
    "removable_macs_share": "gone with one channel left of each group",
}
"""Shares of the MACs in a trace's description, and what they say."""


def say(text: str, least: Verbosity = Verbosity.NORMAL) -> None:
    """Prints one line of progress.

    Args:
        text: The line.
        least: Of a command that is less verbose it isn't printed.
    """
    if verbosity.get() >= least:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a bar with the time left.

    Without a terminal a line now and then takes its place, and a verbose command gets a
    line for each step.

    Args:
        title: What is going on.
        total: Steps until the bar is full.

    Yields:
        A function of a text and a number of steps: it sets the text beside the bar and
        advances it, by one step if no number is given.
    """
    # Beside the results: those on stdout may be piped into a file.
    console = Console(stderr=True)
    is_verbose = verbosity.get() == Verbosity.VERBOSE
    if console.is_terminal and not is_verbose:
        is_hidden = verbosity.get() == Verbosity.QUIET
        with _bar(console, is_hidden) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda text, steps=1: bar.update(task, advance=steps, note=text)
        return
    pause = 0.0 if is_verbose else SECONDS_BETWEEN_LINES
    lines = ProgressLines(title, total, say, pause)
    yield lines.advance
    lines.finish()


def _bar(console: Console, is_hidden: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=is_hidden)


def print_results(results: dict) -> None:
    """Prints the before/after table of a run, as far as it has got."""
    model = results.get("model", "")
    budget = results.get("budget", "")
    agent = results.get("agent", "")
    table = Table(title=f"{model}  {budget}  {agent}".strip())
    table.add_column("")
    for heading in ("dense", "pruned", ""):
        table.add_column(heading, justify="right")
    # Memory and latency are known only after the stages that measure them.
    for label, key, size, unit in COSTS:
        if key in results:
            if key == "latency_ms" and "latency_setting" in results:
                label = f"{label}, {setting_text(results['latency_setting'])}"
            dense = results[f"{key}_dense"]
            pruned = results[key]
            table.add_row(
                label,
                f"{dense / size:.2f} {unit}",
                f"{pruned / size:.2f} {unit}",
                f"{pruned / dense:.1%}",
            )
    _add_accuracies(table, results)
    # A run that was interrupted before it decided anything has nothing to compare.
    if table.row_count:
        _print_table(table, 100)
    _print_list("budgets", _describe_budgets(results))
    _print_list("remarks", results.get("remarks", []))


def _describe_budgets(results: dict) -> list[str]:
    """A line for each of several budgets, or for one of bytes or time.

    The table says it all of one budget of MACs or parameters.
    """
    budgets = results.get("budgets", {})
    if len(budgets) == 1 and budgets.keys() <= {"macs", "params"}:
        return []
    lines = []
    for line in budget_lines(budgets, results.get("latency_kept")):
        lines.append(f"{line.name}: {line.reached} of at most {line.target}")
    return lines


def _add_accuracies(table: Table, results: dict) -> None:
    """Adds the rows of the test accuracy; before it is measured, of the selection's."""
    if "accuracy_pruned" in results:
        dense = f"{results['accuracy_dense']:.2%}"
        pruned = f"{results['accuracy_pruned']:.2%}"
        table.add_row("test accuracy, not fine-tuned", dense, pruned, "")
        # Without epochs nothing was fine-tuned.
        if "accuracy" in results and results.get("finetune_epochs") != 0:
            change = results["accuracy"] - results["accuracy_dense"]
            table.add_row(
                "test accuracy, fine-tuned",
                dense,
                f"{results['accuracy']:.2%}",
                # In percentage points, so without a percent sign.
                f"{change * 100:+.2f}",
            )
    elif "selection_accuracy" in results:
        selection = f"{results['selection_accuracy']:.2%}"
        table.add_row("selection accuracy, not fine-tuned", "", selection, "")


def print_front(pareto: dict) -> None:
    """Prints a Pareto front's points beside uniform pruning at about the same cost.

    Args:
        pareto: What `pareto.json` of a run holds.
    """
    table = Table(title="Pareto front, not fine-tuned")
    table.add_column(f"{METRICS[pareto['metric']]} kept")
    table.add_column("front: selection accuracy", justify="right")
    table.add_column("found by")
    table.add_column("uniform", justify="right")
    for point in pareto["front"]:
        # The two lines have no costs in common: widths are whole numbers.
        nearest = _nearest_in_cost(pareto["uniform"], point["share"])
        table.add_row(
            f"{point['share']:.1%}",
            f"{point['selection_accuracy']:.2%}",
            point["source"],
            f"{nearest['selection_accuracy']:.2%} at {nearest['share']:.1%}",
        )
    _print_table(table, 100)


def _nearest_in_cost(points: list[dict], share: float) -> dict:
    return min(points, key=lambda point: abs(point["share"] - share))


def print_comparison(
    headers: Sequence[str],
    rows: list[list[str]],
    settings: Sequence[str],
    differing: dict[str, list],
) -> None:
    """Prints runs beside each other, and the settings in which they differ.

    Args:
        headers: The columns.
        rows: A row a run.
        settings: What the latency of each run was measured in.
        differing: Setting to its value in each run.
    """
    table = Table()
    for place, heading in enumerate(headers):
        # Names and the like read from the left, numbers from the right.
        justify = "left" if place in (1, 2, 3) else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _print_table(table, 160)
    # A column of them would be wider than a terminal.
    once = list(dict.fromkeys(settings))
    _print_list("latency measured in", once if len(once) == 1 else list(settings))
    lines = []
    for name, values in differing.items():
        shown = ["null" if value is None else str(value) for value in values]
        lines.append(f"{name}: {', '.join(shown)}")
    _print_list("settings that differ, in the order of the runs", lines)


def print_policies(policies: list[dict]) -> None:
    """Prints the shipped policies and what is wrong with those that can't be used.

    Args:
        policies: For each its name, algorithm, trained_on, budget, and the problem or
            None.
    """
    if not policies:
        print(
            "no policy is shipped; RUN and FOLDER work wherever a policy is asked for"
        )
        return
    table = Table()
    for heading in ("policy", "algorithm", "trained on", "budget", "usable here"):
        # Folded rather than cut: names are there to be typed.
        table.add_column(heading, overflow="fold")
    problems = []
    for row in policies:
        usable = "yes"
        if row["problem"]:
            usable = "no"
            problems.append(row["problem"])
        table.add_row(
            row["name"], row["algorithm"], row["trained_on"], row["budget"], usable
        )
    _print_table(table, 100)
    # Not a column of the table: reasons are sentences.
    _print_list("can't be used", problems)


def print_methods(methods: list[dict]) -> None:
    """Prints the methods, and what each sets.

    Args:
        methods: For each its name, kind, granularity, paper and options.
    """
    table = Table()
    for heading in ("method", "kind", "removes", "paper", "sets"):
        table.add_column(heading, overflow="fold")
    for row in methods:
        flags = [f"--{name} {value}" for name, value in row["options"].items()]
        table.add_row(
            row["name"], row["kind"], row["granularity"], row["paper"], " ".join(flags)
        )
    _print_table(table, 140)


def print_trace(description: dict) -> None:
    """Prints what a trace found in a network.

    Its prunable groups, what is pinned and why, the operations that the tracer doesn't
    know, and shares of the MACs.

    Args:
        description: As `autoprune trace --json` prints it.
    """
    prunable = []
    pinned = []
    for group in description["groups"]:
        if group["prunable"]:
            prunable.append(group)
        else:
            pinned.append(group)
    macs = f"{description['macs'] / 1e6:.2f} M MACs"
    n_params = f"{description['params']:,} parameters"
    title = f"{description['model']}: {macs}, {n_params}"
    if prunable:
        _print_groups(title, prunable)
    else:
        print(f"{title}; nothing can be pruned")
    _print_list("pinned", _describe_by_reason(pinned))
    _print_list("operations without a rule", description["unsupported"])
    shares = [f"{description[key]:.1%} {text}" for key, text in SHARES.items()]
    print(f"share of MACs: {', '.join(shares)}")


def _print_groups(title: str, groups: list[dict]) -> None:
    table = Table(title=title)
    table.add_column("prunable group")
    table.add_column("channels", justify="right")
    table.add_column("share of MACs", justify="right")
    for group in groups:
        channels = f"{group['channels']:,}"
        table.add_row(group["name"], channels, f"{group['macs_share']:.1%}")
    _print_table(table, 120)


def _print_table(table: Table, width: int) -> None:
    """Prints a table as wide as the terminal, or `width` characters without one."""
    # Without a terminal rich takes 80, in which our tables would be folded.
    console = Console(width=None if sys.stdout.isatty() else width)
    console.print(table)


def _print_list(title: str, lines: list[str]) -> None:
    """Prints a heading with its lines, or nothing if there are none."""
    if not lines:
        return
    # Not by rich: names and patterns may look like its markup.
    print(f"{title}:")
    for line in lines:
        print(f"  {line}")


def _describe_by_reason(groups: list[dict]) -> list[str]:
    """One line for each reason: the first groups that share it, and how many more.

    Reasons that differ in the module alone are one: "operation fft in layer1.0 has no
    rule" and "operation fft in layer2.0 has no rule" become "operation fft has no rule:
    layer1.0.conv1 (16), layer2.0.conv1 (32)".
    """
    groups_of: dict[str, list[dict]] = {}
    for group in groups:
        common = re.sub(r" in [\w.]+", "", group["pinned"])
        groups_of.setdefault(common, []).append(group)
    lines = []
    for common, alike in groups_of.items():
        reasons = {group["pinned"] for group in alike}
        # The only module that a reason names is worth knowing.
        reason = common if len(reasons) > 1 else alike[0]["pinned"]
        shown = alike[:NAMES_SHOWN]
        names = [f"{group['name']} ({group['channels']:,})" for group in shown]
        n_more = len(alike) - len(shown)
        more = f" and {n_more:,} more" if n_more else ""
        lines.append(f"{reason}: {', '.join(names)}{more}")
    return lines
