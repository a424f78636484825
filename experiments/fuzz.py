"""Do the contracts hold for networks that nobody wrote?

    python -m experiments.fuzz --networks 500 --seed 0

Networks are composed at random, traced, pruned and counted. One row a network in
`experiments/results/fuzz.csv`: its recipe, its groups, the largest difference between
pruned and masked in float64, and what failed. Rows that are there aren't checked again.
A failure prints the recipe and the smallest one that still fails, for the list in
`tests/test_fuzz.py`; the exit code is 1 then. About a second a network on one core.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch

from autoprune.reporting.console import progress, say
from experiments.tables import read_table, write_table

# The tests compose and check the same networks.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from contracts import check  # pyright: ignore[reportMissingImports], see above
from recipes import recipe, shrunk  # pyright: ignore[reportMissingImports]

FIELDS = ("seed", "prunable", "pinned", "error", "failures", "recipe")
BETWEEN = " | "


def main() -> int:
    """Checks the networks without a row; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=500)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first network; the others follow"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "fuzz.csv"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = {int(row["seed"]): row for row in read_table(args.out)}
    seeds = range(args.seed, args.seed + args.networks)
    with progress("fuzz", args.networks) as advance:
        for seed in seeds:
            if seed not in rows:
                rows[seed] = check_network(seed)
                write_table(args.out, [rows[seed] for seed in sorted(rows)], FIELDS)
            n_failed = sum(1 for row in rows.values() if row["failures"])
            advance(f"{n_failed} failures")
    summarise([rows[seed] for seed in seeds])
    return 1 if any(rows[seed]["failures"] for seed in seeds) else 0


def check_network(seed: int) -> dict[str, str]:
    """The row of one network; failures are printed."""
    network = recipe(seed)
    outcome = check(network)
    if outcome.failures:
        smallest = shrunk(network, lambda smaller: bool(check(smaller).failures))
        failures = "\n  ".join(outcome.failures)
        say(f"recipe({seed}) = {network}\n  smallest: {smallest}\n  {failures}")
    values = (
        seed,
        outcome.prunable,
        BETWEEN.join(outcome.pinned),
        outcome.error,
        BETWEEN.join(outcome.failures),
        network,
    )
    return {field: str(value) for field, value in zip(FIELDS, values, strict=True)}


def summarise(rows: list[dict[str, str]]) -> None:
    """Networks, groups, failures, and what is pinned why, on stdout."""
    prunable = [int(row["prunable"]) for row in rows]
    share = sum(n > 0 for n in prunable) / len(rows)
    worst = max(float(row["error"]) for row in rows)
    failed = [row["seed"] for row in rows if row["failures"]]
    print(
        f"{len(rows)} networks, {sum(prunable)} prunable groups, {share:.1%} of "
        f"networks with at least one; worst error {worst:.1e}; {len(failed)} failures "
        f"{' '.join(failed)}"
    )
    for reason, count in reasons(rows).most_common():
        print(f"{count:6d} pinned: {reason}")


def reasons(rows: list[dict[str, str]]) -> Counter[str]:
    """How often each reason was given, names and numbers aside."""
    counts: Counter[str] = Counter()
    for row in rows:
        for reason in row["pinned"].split(BETWEEN):
            if reason:
                nameless = re.sub(r" in \S+|: Given groups.*", "", reason)
                counts[re.sub(r"\[.*?\]|\d[\d.e+-]*", "#", nameless)] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
