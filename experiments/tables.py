"""Tables of results as CSV files."""

import csv
import io
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from autoprune.evaluation.precision import has_fast_bf16
from autoprune.evaluation.proxy import available_cores
from autoprune.runs import write_text


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it isn't there yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(path: Path, parser: ArgumentParser) -> list[dict[str, str]]:
    """The rows of a table that is to be summed up; a usage error where there are none
    yet.
    """
    return read_table(path) or parser.error(
        f"--summary: {path} holds no row yet; measure some first"
    )


def holds(path: Path, cell: dict) -> bool:
    """Whether a table has a row with these values."""
    return any(
        all(row[name] == str(value) for name, value in cell.items())
        for row in read_table(path)
    )


def add_rows(path: Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    """Writes a table with further rows; see `write_table`."""
    write_table(path, [*read_table(path), *rows], columns)


def fill(
    path: Path,
    cells: Iterable[dict],
    measure: Callable[[dict], dict],
    columns: Sequence[str],
) -> None:
    """Measures the cells that a table lacks, and adds and prints a row after each, so
    that a killed script goes on.

    A last column tells on what device.
    """
    for cell in cells:
        if not holds(path, cell):
            row = cell | measure(cell) | {"device": device()}
            add_rows(path, [row], [*columns, "device"])
            print(row, flush=True)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, which one value doesn't have."""
    spread = f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "-"
    return f"{np.mean(values):.{digits}f} ± {spread}"


def device() -> str:
    """What this process computes on: the instructions decide about times, the precision
    about scores' last digits.
    """
    precision = "bf16" if has_fast_bf16() else "float32"
    return f"{available_cores()} x CPU {torch.backends.cpu.get_cpu_capability()} {precision}"


def write_table(path: Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    """Writes a table at once, so that a killed script leaves the old one or the new
    one.

    Args:
        path: The CSV file.
        rows: Column to value; what a row lacks stays empty.
        columns: In their order.
    """
    text = io.StringIO()
    table = csv.DictWriter(
        text, columns, restval="", extrasaction="ignore", lineterminator="\n"
    )
    table.writeheader()
    table.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
