"""Do the contracts hold for networks that nobody wrote? Composed at random, traced,
pruned, counted.

    python experiments/fuzz.py --networks 500 --seed 0

One row a network in `experiments/results/fuzz.csv`: its recipe, its groups, the largest
difference between pruned and masked in float64, and what failed. Rows that are there
aren't checked again. A failure prints the recipe and the smallest one that still fails,
for the list in `tests/test_fuzz.py`; the exit code is 1 then. About a second a network
on one core.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch

from autoprune.reporting.console import progress, say
from experiments.tables import read_table, write_table

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from contracts import check
from recipes import recipe, shrunk

FIELDS = ("seed", "prunable", "pinned", "error", "failures", "recipe")
BETWEEN = " | "


def main() -> int:
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
                rows[seed] = measured(seed)
                write_table(args.out, [rows[seed] for seed in sorted(rows)], FIELDS)
            advance(f"{sum(1 for row in rows.values() if row['failures'])} failures")
    summarise([rows[seed] for seed in seeds])
    return 1 if any(rows[seed]["failures"] for seed in seeds) else 0


def measured(seed: int) -> dict[str, str]:
    """The row of one network; failures are printed."""
    made = recipe(seed)
    found = check(made)
    if found.failures:
        smallest = shrunk(made, lambda smaller: bool(check(smaller).failures))
        say(
            f"recipe({seed}) = {made}\n  smallest: {smallest}\n  "
            + "\n  ".join(found.failures)
        )
    values = (
        seed,
        found.prunable,
        BETWEEN.join(found.pinned),
        found.error,
        BETWEEN.join(found.failures),
        made,
    )
    return {field: str(value) for field, value in zip(FIELDS, values, strict=True)}


def summarise(rows: list[dict[str, str]]) -> None:
    """Networks, groups, failures, and what is pinned why, on stdout."""
    prunable = [int(row["prunable"]) for row in rows]
    worst, failed = (
        max(float(row["error"]) for row in rows),
        [row["seed"] for row in rows if row["failures"]],
    )
    print(
        f"{len(rows)} networks, {sum(prunable)} prunable groups, "
        f"{sum(n > 0 for n in prunable) / len(rows):.1%} of "
        f"networks with at least one; worst error {worst:.1e}; {len(failed)} failures "
        f"{' '.join(failed)}"
    )
    for reason, count in reasons(rows).most_common():
        print(f"{count:6d} pinned: {reason}")


def reasons(rows: list[dict[str, str]]) -> Counter[str]:
    """How often each reason was given, names and numbers aside."""
    given = [
        reason for row in rows for reason in row["pinned"].split(BETWEEN) if reason
    ]
    return Counter(
        re.sub(r"\[.*?\]|\d[\d.e+-]*", "#", re.sub(r" in \S+|: Given groups.*", "", r))
        for r in given
    )


if __name__ == "__main__":
    sys.exit(main())
