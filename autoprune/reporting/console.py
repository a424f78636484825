"""What people see in a terminal: progress on stderr, tables on stdout."""

import re
import sys
from collections.abc import Callable, Iterator
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


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time left; the function given sets the text beside it and advances
    it, by one if not told.

    Without a terminal the last text is printed once, at the end.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    note = ""
    with Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(text: str, steps: int = 1) -> None:
            nonlocal note
            note = text
            bar.update(task, advance=steps, note=text)

        yield advance
    if not console.is_terminal:
        say(f"{title}: {note}")


def print_results(results: dict) -> None:
    """The before/after table of a run, as far as it has got."""
    table = Table(
        title=f"{results.get('model', '')}  {results.get('budget', '')}  {results.get('agent', '')}".strip()
    )
    for heading, justify in (
        ("", "left"),
        ("dense", "right"),
        ("pruned", "right"),
        ("", "right"),
    ):
        table.add_column(heading, justify=justify)
    for label, key, scale, unit in (
        ("MACs", "macs", 1e6, "M"),
        ("parameters", "params", 1e3, "k"),
        ("memory, batch 1", "memory_bytes", 1e6, "MB"),
        ("latency, batch 1", "latency_ms", 1, "ms"),
    ):
        if key in results:
            dense, pruned = results[f"{key}_dense"], results[key]
            table.add_row(
                label,
                f"{dense / scale:.2f} {unit}",
                f"{pruned / scale:.2f} {unit}",
                f"{pruned / dense:.1%}",
            )
    if "accuracy_pruned" in results:
        dense = f"{results['accuracy_dense']:.2%}"
        table.add_row(
            "test accuracy, not fine-tuned",
            dense,
            f"{results['accuracy_pruned']:.2%}",
            "",
        )
        if "accuracy" in results:
            change = results["accuracy"] - results["accuracy_dense"]
            table.add_row(
                "test accuracy, fine-tuned",
                dense,
                f"{results['accuracy']:.2%}",
                f"{change * 100:+.2f}",
            )
    elif "selection_accuracy" in results:
        table.add_row(
            "selection accuracy, not fine-tuned",
            "",
            f"{results['selection_accuracy']:.2%}",
            "",
        )
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_front(pareto: dict) -> None:
    """The points of a Pareto front, and uniform pruning at about the same cost."""
    metric = {"macs": "MACs", "params": "parameters"}[pareto["metric"]]
    columns = {
        f"{metric} kept": "left",
        "front: selection accuracy": "right",
        "found by": "left",
        "uniform": "right",
    }
    table = Table(title="Pareto front, not fine-tuned")
    for heading, justify in columns.items():
        table.add_column(heading, justify=justify)
    for point in pareto["front"]:
        nearest = min(
            pareto["uniform"], key=lambda other: abs(other["share"] - point["share"])
        )
        uniform = f"{nearest['selection_accuracy']:.2%} at {nearest['share']:.1%}"
        table.add_row(
            f"{point['share']:.1%}",
            f"{point['selection_accuracy']:.2%}",
            point["source"],
            uniform,
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_policies(policies: list[dict]) -> None:
    """The shipped policies and, below, what is wrong with those that can't be used."""
    if not policies:
        print(
            "no policy is shipped; RUN and FOLDER work wherever a policy is asked for"
        )
        return
    table = Table()
    for heading in ("policy", "algorithm", "trained on", "budget", "usable here"):
        table.add_column(heading, overflow="fold")
    for row in policies:
        table.add_row(
            *(row[key] for key in ("name", "algorithm", "trained_on", "budget")),
            "no" if row["problem"] else "yes",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    _print_list("can't be used", [row["problem"] for row in policies if row["problem"]])


def print_methods(methods: list[dict]) -> None:
    """The methods, and what each sets."""
    table = Table()
    for heading in ("method", "kind", "removes", "paper", "sets"):
        table.add_column(heading, overflow="fold")
    for row in methods:
        options = " ".join(
            f"--{name} {value}" for name, value in row["options"].items()
        )
        table.add_row(
            *(row[key] for key in ("name", "kind", "granularity", "paper")), options
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


NAMES_SHOWN = 4
"""Pinned groups that are named for each reason; `--json` lists all."""

SHARES = {
    "prunable_macs_share": "in layers that can shrink",
    "both_axes_macs_share": "in layers that can on both axes",
    "removable_macs_share": "gone with one channel left of each group",
}
"""Shares of the MACs in a trace's description, and what they say."""


def print_trace(description: dict) -> None:
    """The prunable groups of a network, what is pinned and why, what the tracer doesn't
    know, the shares of MACs.
    """
    prunable = [group for group in description["groups"] if group["prunable"]]
    table = Table(
        title=f"{description['model']}: {description['macs'] / 1e6:.2f} M MACs, {description['params']:,} parameters"
    )
    for heading in ("prunable group", "channels", "share of MACs"):
        table.add_column(
            heading, justify="left" if heading == "prunable group" else "right"
        )
    for group in prunable:
        table.add_row(
            group["name"], f"{group['channels']:,}", f"{group['macs_share']:.1%}"
        )
    if prunable:
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    else:
        print(f"{table.title}; nothing can be pruned")
    _print_list(
        "pinned",
        _by_reason([group for group in description["groups"] if not group["prunable"]]),
    )
    _print_list("operations without a rule", description["unsupported"])
    shares = [f"{description[key]:.1%} {text}" for key, text in SHARES.items()]
    print(f"share of MACs: {', '.join(shares)}")


def _print_list(title: str, lines: list[str]) -> None:
    """A heading with its lines, or nothing; printed as they are, since names and
    patterns may look like markup.
    """
    if lines:
        print("\n".join([f"{title}:", *(f"  {line}" for line in lines)]))


def _by_reason(groups: list[dict]) -> list[str]:
    """One line a reason: the first groups that share it with their channels, and how
    many more there are.

    Reasons that differ in the module alone, "... in layer1.0.norm ...", are one.
    """
    sharing: dict[str, list[dict]] = {}
    for group in groups:
        sharing.setdefault(re.sub(r" in [\w.]+", "", group["pinned"]), []).append(group)
    lines = []
    for common, alike in sharing.items():
        reason = (
            common
            if len({group["pinned"] for group in alike}) > 1
            else alike[0]["pinned"]
        )
        names = ", ".join(
            f"{group['name']} ({group['channels']:,})" for group in alike[:NAMES_SHOWN]
        )
        more = (
            f" and {len(alike) - NAMES_SHOWN:,} more"
            if len(alike) > NAMES_SHOWN
            else ""
        )
        lines.append(f"{reason}: {names}{more}")
    return lines
