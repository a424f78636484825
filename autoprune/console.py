"""What people see in a terminal: progress on stderr, tables on stdout."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar with the time left; the function given advances it by one and sets the text beside it.

    Without a terminal the last text is printed once, at the end.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    note = ""
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(text: str) -> None:
            nonlocal note
            note = text
            bar.update(task, advance=1, note=text)

        yield advance
    if not console.is_terminal:
        say(f"{title}: {note}")


def print_results(results: dict) -> None:
    """The before/after table of a run, as far as it has got."""
    table = Table(title=f"{results.get('model', '')}  {results.get('budget', '')}  {results.get('agent', '')}".strip())
    for heading, justify in (("", "left"), ("dense", "right"), ("pruned", "right"), ("", "right")):
        table.add_column(heading, justify=justify)
    for label, key, scale, unit in (
        ("MACs", "macs", 1e6, "M"),
        ("parameters", "params", 1e3, "k"),
        ("memory, batch 1", "memory_bytes", 1e6, "MB"),
        ("latency, batch 1", "latency_ms", 1, "ms"),
    ):
        if key in results:
            dense, pruned = results[f"{key}_dense"], results[key]
            table.add_row(label, f"{dense / scale:.2f} {unit}", f"{pruned / scale:.2f} {unit}", f"{pruned / dense:.1%}")
    if "accuracy_pruned" in results:
        dense = f"{results['accuracy_dense']:.2%}"
        table.add_row("test accuracy, not fine-tuned", dense, f"{results['accuracy_pruned']:.2%}", "")
        if "accuracy" in results:
            change = results["accuracy"] - results["accuracy_dense"]
            table.add_row("test accuracy, fine-tuned", dense, f"{results['accuracy']:.2%}", f"{change * 100:+.2f}")
    elif "selection_accuracy" in results:
        table.add_row("selection accuracy, not fine-tuned", "", f"{results['selection_accuracy']:.2%}", "")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_trace(description: dict) -> None:
    """The groups of a network, what is pinned and why."""
    table = Table(
        title=f"{description['model']}: {description['macs'] / 1e6:.2f} M MACs, {description['params']:,} parameters"
    )
    for heading in ("group", "channels", "layers", "share of MACs", "pinned because it ..."):
        table.add_column(heading, justify="right" if heading in ("channels", "layers", "share of MACs") else "left")
    for group in description["groups"]:
        layers = len({member["tensor"].rpartition(".")[0] for member in group["members"]})
        share = f"{group['macs_share']:.1%}"
        table.add_row(group["name"], str(group["channels"]), str(layers), share, group["pinned"] or "")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"{description['prunable_macs_share']:.1%} of the MACs are in layers that can shrink")
