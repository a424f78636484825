"""Which vision networks can be traced, pruned and exported, and is that right?

    python -m experiments.coverage           every network without a row, then the page
    python -m experiments.coverage --family timm --only swin    some of them
    python -m experiments.coverage --only resnet18 --again      measure rows anew
    python -m experiments.coverage --parts autoprune --before 2026-11-30
                                             rows of autoprune from before that day anew
    python -m experiments.coverage --report                     only write the page

The page is docs/coverage.md. Every network is measured in a process of its own (memory,
crashes), and again in another with Torch-Pruning. No weights are downloaded. Rows go to
`experiments/results/coverage.csv` one by one, so that a killed sweep goes on where it
was. All networks: about a night on one core.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from autoprune.files import write_text
from experiments.coverage_networks import FAMILIES, Network, networks
from experiments.coverage_report import report
from experiments.tables import read_table, write_table

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "experiments" / "results" / "coverage.csv"
DOCUMENT = ROOT / "docs" / "coverage.md"


@dataclass(frozen=True)
class Part:
    """One of those that measure a network, each in a process of its own.

    Attributes:
        prefix: How its columns begin; empty where no other part's beginning fits.
        limit_s: Seconds that its process may take.
        limit_gib: Memory that it may take.
        failures: The column for what went wrong.
        filled: A column that is always filled.
        measured: The column for the time of the measurement, in UTC.
    """

    prefix: str
    limit_s: int
    limit_gib: int
    failures: str
    filled: str
    measured: str


PARTS = {
    "autoprune": Part("", 4 * 3600, 18, "failures", "seconds", "measured"),
    "onnx": Part("onnx_", 3600, 18, "onnx_failure", "onnx_seconds", "onnx_measured"),
    "torch-pruning": Part("tp_", 1800, 18, "tp_failure", "tp_runs", "tp_measured"),
}
RIVAL_LIMIT_S = 120
"""CPU seconds that Torch-Pruning may take for a network."""
FIELDS = (
    "family",
    "builder",
    "size",
    "params",
    "macs",
    "dtype",
    "groups",
    "pinned",
    "reasons",
    "prunable_macs_share",
    "both_axes_macs_share",
    "removable_macs_share",
    "trace_seconds",
    "proof_seconds",
    "trace_mib",
    "proof_mib",
    "error",
    "zeroed_error",
    "change",
    "costs",
    "counted_on",
    "reload",
    "step",
    "failures",
    "seconds",
    "commit",
    "measured",
    "onnx_error",
    "onnx_failure",
    "onnx_seconds",
    "onnx_measured",
    "tp_runs",
    "tp_right",
    "tp_error",
    "tp_seconds",
    "tp_params_ratio",
    "tp_failure",
    "tp_measured",
)


def main() -> None:
    """Measures what the table lacks, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="regular expression that the name contains",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what measures"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure networks that have a row, too"
    )
    parser.add_argument(
        "--before",
        default="",
        metavar="TIME",
        help="measure networks whose row is from before this time, too, in UTC",
    )
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--one", metavar="FAMILY/NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure_here(args.parts[0], Network(*args.one.split("/")))
    for network in [] if args.report else networks(args.family, args.only):
        for part in args.parts:
            if args.again or not is_known(network, part, args.before):
                store(network, part, measure_apart(part, network))
    write_text(DOCUMENT, report(read_table(TABLE)))


def measure_here(part: str, network: Network) -> None:
    """Prints a line of JSON for every check that ends; for a process of its own.

    Args:
        part: A key of `PARTS`.
        network: What is measured.
    """
    n_bytes = PARTS[part].limit_gib * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    for columns in measurements(part, network):
        print(json.dumps(columns), flush=True)


def measurements(part: str, network: Network) -> Iterator[dict]:
    """What one process finds out about one network: columns, check by check.

    Args:
        part: A key of `PARTS`.
        network: What is measured.
    """
    # Only what this process needs, since its memory is measured.
    if part == "autoprune":
        from experiments.coverage_checks import make_case, measure

        return measure(make_case(network))
    if part == "onnx":
        from experiments.coverage_checks import make_case, measure_onnx

        return measure_onnx(make_case(network))
    from experiments.coverage_torch_pruning import compare

    return compare(network, RIVAL_LIMIT_S)


def measure_apart(part: str, network: Network) -> dict:
    """The columns that a process of its own prints.

    How it ended goes to the column of failures.

    Args:
        part: A key of `PARTS`.
        network: What is measured.
    """
    limits = PARTS[part]
    command = [
        sys.executable,
        "-m",
        "experiments.coverage",
        "--one",
        f"{network.family}/{network.name}",
        "--parts",
        part,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    # Before the measurement: the tree may move on while it runs.
    known = origin(part)
    ends = []
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            timeout=limits.limit_s,
        )
        if done.returncode == -signal.SIGTERM:
            sys.exit("stopped")  # with the sweep: says nothing about the network
        printed = done.stdout
        if done.returncode:
            ends.append(f"process ended with {done.returncode}")
    except subprocess.TimeoutExpired as stopped:
        printed = (stopped.stdout or b"").decode()
        ends.append(f"process stopped after {limits.limit_s} s")
    return known | columns_in(printed, part, ends)


def columns_in(printed: str, part: str, ends: list[str]) -> dict:
    """The columns that a process has printed.

    Args:
        printed: Lines, of which some are JSON.
        part: A key of `PARTS`.
        ends: What its end tells about failures.
    """
    limits = PARTS[part]
    columns = {limits.filled: "no"}
    failures = []
    for line in printed.splitlines():
        if line.startswith("{"):
            entries = json.loads(line)
            # Several checks may fail, each with a line.
            if limits.failures in entries:
                failures.append(entries.pop(limits.failures))
            columns |= entries
    columns[limits.failures] = "; ".join(failures + ends)
    return columns


def origin(part: str) -> dict:
    """Columns for when a part measures, and for what.

    Args:
        part: A key of `PARTS`.
    """
    columns = {PARTS[part].measured: now()}
    if part == "autoprune":
        columns["commit"] = commit()
    return columns


def commit() -> str:
    """The version of the tracer that a row was measured with."""
    command = ["git", "log", "-1", "--format=%h", "--", "autoprune"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def now() -> str:
    """The time of a measurement, which orders as text."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


def is_known(network: Network, part: str, since: str = "") -> bool:
    """Whether the table holds one part of a network's row.

    Args:
        network: The network.
        part: A key of `PARTS`.
        since: Rows from before this time don't count.
    """
    columns = PARTS[part]
    for row in read_table(TABLE):
        if is_of(row, network) and row[columns.measured]:
            return row[columns.measured] >= since
    return False


def is_of(row: dict, network: Network) -> bool:
    """Whether a row is a network's.

    Args:
        row: The row.
        network: The network.
    """
    return (row["family"], row["builder"]) == (network.family, network.name)


def store(network: Network, part: str, columns: dict) -> None:
    """Puts columns into a network's row, atomically, and says what it holds.

    Args:
        network: The network.
        part: A key of `PARTS`; the columns of the others stay.
        columns: What one part has measured.
    """
    rows = []
    known: dict[str, str] = {}
    for row in read_table(TABLE):
        if not is_of(row, network):
            rows.append(row)
        elif not known:
            known = row
    entry = {"family": network.family, "builder": network.name}
    entry |= _of_other_parts(known, part) | columns
    rows.append(entry)
    order = {(n.family, n.name): place for place, n in enumerate(networks())}
    rows.sort(key=lambda r: order.get((r["family"], r["builder"]), len(order)))
    write_table(TABLE, rows, FIELDS)
    shown = []
    for name in FIELDS:
        if entry.get(name) not in (None, ""):
            shown.append(f"{name}={entry[name]}")
    print(" ".join(shown), flush=True)


def _of_other_parts(row: dict, part: str) -> dict:
    """What the other parts have left in a row."""
    return {name: value for name, value in row.items() if _part_of(name) != part}


def _part_of(column: str) -> str:
    """The part that a column belongs to."""
    for part, limits in PARTS.items():
        if limits.prefix and column.startswith(limits.prefix):
            return part
    return "autoprune"


if __name__ == "__main__":
    main()
