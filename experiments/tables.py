"""Tables of results as CSV files."""

import csv
import io
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from autoprune.evaluation.precision import has_fast_bf16
from autoprune.evaluation.workers import available_cores
from autoprune.files import write_text


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it isn't there yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_for_summary(path: Path, parser: ArgumentParser) -> list[dict[str, str]]:
    """The rows of a table that is to be summed up.

    Args:
        path: The CSV file.
        parser: Ends the script with a usage error where there are no rows yet.
    """
    return read_table(path) or parser.error(
        f"--summary: {path} holds no row yet; measure some first"
    )


def has_row(path: Path, cell: dict) -> bool:
    """Whether a table has a row with certain values.

    Args:
        path: The CSV file.
        cell: Column to value.
    """
    for row in read_table(path):
        if all(row[name] == str(value) for name, value in cell.items()):
            return True
    return False


def all_cells(values: Mapping[str, Iterable[object]]) -> list[dict]:
    """Every combination of values, those of the last column next to each other.

    Args:
        values: Column to what it may be.
    """
    return [dict(zip(values, one, strict=True)) for one in product(*values.values())]


def add_rows(path: Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    """Writes a table with further rows.

    Args:
        path: The CSV file.
        rows: The new ones, as for `write_table`.
        columns: In their order.
    """
    write_table(path, [*read_table(path), *rows], columns)


def fill_table(
    path: Path,
    cells: Iterable[dict],
    measure: Callable[[dict], dict],
    columns: Sequence[str],
) -> None:
    """Measures the cells that a table lacks.

    A row is added and printed after each, so that a killed script goes on. A last
    column tells on what device.

    Args:
        path: The CSV file.
        cells: What identifies each row, column to value.
        measure: From a cell to the row's other columns.
        columns: In their order, without the device.
    """
    for cell in cells:
        if not has_row(path, cell):
            row = cell | measure(cell) | {"device": device()}
            add_rows(path, [row], [*columns, "device"])
            print(row, flush=True)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, which one value doesn't have.

    Args:
        values: At least one.
        digits: After the point.
    """
    spread = f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "-"
    return f"{np.mean(values):.{digits}f} ± {spread}"


def device() -> str:
    """What this process computes on.

    The instructions decide about times, the precision about scores' last digits.
    """
    precision = "bf16" if has_fast_bf16() else "float32"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{available_cores()} x CPU {instructions} {precision}"


def write_table(path: Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    """Writes a table at once: a killed script leaves the old one or the new one.

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
