"""Which vision networks can be traced, pruned and exported, and is what comes out
right? One row a network.

    python experiments/coverage.py                              every network without a row, then docs/coverage.md
    python experiments/coverage.py --family timm --only swin    some of them
    python experiments/coverage.py --only resnet18 --again      measure rows anew
    python experiments/coverage.py --report                     only write docs/coverage.md from the table

Every network is measured in a process of its own (memory, crashes), and again in
another with Torch-Pruning. No weights are downloaded. Rows go to
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
from pathlib import Path

from autoprune.runs import write_text
from experiments.coverage_networks import FAMILIES, Network, networks
from experiments.coverage_report import report
from experiments.tables import read_table, write_table

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "experiments" / "results" / "coverage.csv"
DOCUMENT = ROOT / "docs" / "coverage.md"
# What measures: seconds and GiB that its process may take, the column for what went
# wrong, one that is always filled.
PARTS = {
    "autoprune": (4 * 3600, 18, "failures", "seconds"),
    "torch-pruning": (1800, 18, "tp_failure", "tp_runs"),
}
RIVAL_LIMIT_S = 120
FIELDS = (
    *(
        "family",
        "builder",
        "size",
        "params",
        "macs",
        "dtype",
        "groups",
        "pinned",
        "reasons",
    ),
    *("prunable_macs_share", "both_axes_macs_share", "removable_macs_share"),
    *("trace_seconds", "proof_seconds", "trace_mib", "proof_mib"),
    *(
        "error",
        "zeroed_error",
        "change",
        "costs",
        "counted_on",
        "reload",
        "step",
        "onnx_error",
    ),
    *("failures", "seconds", "commit"),
    *("tp_runs", "tp_right", "tp_error", "tp_seconds", "tp_params_ratio", "tp_failure"),
)


def main() -> None:
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
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--one", metavar="FAMILY/NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure_here(args.parts[0], Network(*args.one.split("/")))
    for network in [] if args.report else networks(args.family, args.only):
        for part in args.parts:
            if args.again or not is_known(network, part):
                store(network, measured_apart(part, network))
    write_text(DOCUMENT, report(read_table(TABLE)))


def measure_here(part: str, network: Network) -> None:
    """In a process of its own: a line of JSON for every check that ends."""
    n_bytes = PARTS[part][1] * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    for columns in measurements(part, network):
        print(json.dumps(columns), flush=True)


def measurements(part: str, network: Network) -> Iterator[dict]:
    """What one process finds out about one network."""
    if part == "autoprune":
        from experiments.coverage_checks import make_case, measure

        return measure(make_case(network))
    from experiments.coverage_torch_pruning import compare

    return compare(network, RIVAL_LIMIT_S)


def measured_apart(part: str, network: Network) -> dict:
    """The columns that a process of its own prints; how it ended goes to the column of
    failures.
    """
    limit_s, _, failures, filled = PARTS[part]
    command = [
        sys.executable,
        __file__,
        "--one",
        f"{network.family}/{network.name}",
        "--parts",
        part,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environment, text=True, timeout=limit_s
        )
        if done.returncode == -signal.SIGTERM:
            sys.exit("stopped")  # with the sweep: says nothing about the network
        printed, end = (
            done.stdout,
            f"process ended with {done.returncode}" if done.returncode else "",
        )
    except subprocess.TimeoutExpired as stopped:
        printed, end = (
            (stopped.stdout or b"").decode(),
            f"process stopped after {limit_s} s",
        )
    columns = [
        json.loads(line) for line in printed.splitlines() if line.startswith("{")
    ]
    found = [line.pop(failures) for line in columns if failures in line] + [end] * bool(
        end
    )
    merged = {name: value for line in columns for name, value in line.items()} | {
        failures: "; ".join(found)
    }
    return (
        {filled: "no"} | merged | ({"commit": commit()} if part == "autoprune" else {})
    )


def commit() -> str:
    """The version of the tracer that a row was measured with."""
    command = ["git", "log", "-1", "--format=%h", "--", "autoprune"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def is_known(network: Network, part: str) -> bool:
    """Whether the table holds that part of that network's row."""
    return any(row[PARTS[part][3]] for row in read_table(TABLE) if is_of(row, network))


def is_of(row: dict, network: Network) -> bool:
    return (row["family"], row["builder"]) == (network.family, network.name)


def store(network: Network, columns: dict) -> None:
    """Puts columns into a network's row, atomically, and says what it holds."""
    others = [row for row in read_table(TABLE) if not is_of(row, network)]
    entry = next((row for row in read_table(TABLE) if is_of(row, network)), {})
    entry = (
        {"family": network.family, "builder": network.name}
        | _without(entry, columns)
        | columns
    )
    rows = [*others, entry]
    order = {(n.family, n.name): place for place, n in enumerate(networks())}
    rows.sort(key=lambda r: order.get((r["family"], r["builder"]), len(order)))
    write_table(TABLE, rows, FIELDS)
    print(
        " ".join(
            f"{name}={entry[name]}"
            for name in FIELDS
            if entry.get(name) not in (None, "")
        ),
        flush=True,
    )


def _without(row: dict, columns: dict) -> dict:
    """What another part left in the row."""
    is_rival = "tp_runs" in columns
    return {
        name: value for name, value in row.items() if name.startswith("tp_") != is_rival
    }


if __name__ == "__main__":
    main()
