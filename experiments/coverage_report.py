"""Writes the text of docs/coverage.md from experiments/results/coverage.csv."""

import re
from collections.abc import Callable
from pathlib import Path

from experiments.coverage_networks import FAMILIES

# The share of MACs whose layers should be able to shrink on both axes, by name; the
# first pattern that is found counts. A fifth to two thirds of these small networks'
# MACs lie in layers that the architecture ties on one axis.
TARGETS = (
    ("shufflenet", 0.34),
    ("squeezenet", 0.65),
    ("mobilenet_?v3", 0.75),
    ("mnasnet", 0.80),
    ("vit|swin|convnext|deit", 0.95),
    ("", 0.90),
)
INTRODUCTION = Path(__file__).parent / "pages" / "coverage.md"
COLUMNS: dict[str, Callable[[dict], str]] = {
    "network": lambda row: row["builder"],
    "groups": lambda row: row["groups"],
    "pinned": lambda row: row["pinned"],
    "touched": lambda row: percent(row["prunable_macs_share"]),
    "both axes": lambda row: (
        percent(row["both_axes_macs_share"]) + (" **<**" if is_short(row) else "")
    ),
    "removable": lambda row: percent(row["removable_macs_share"]),
    "error": lambda row: row["error"] or "**no**",
    "zeroed": lambda row: (
        "-"
        if row["zeroed_error"] == "not comparable"
        else row["zeroed_error"] or "**no**"
    ),
    "in": lambda row: row["dtype"].replace("float", "f"),
    "costs, reload, step, ONNX": lambda row: missed(row) or "yes",
    "trace s": lambda row: row["trace_seconds"],
    "proof s": lambda row: row["proof_seconds"],
    "MiB": lambda row: row["proof_mib"] or row["trace_mib"],
    "TP runs": lambda row: row["tp_runs"],
    "TP right": lambda row: row["tp_right"],
    "TP s": lambda row: row["tp_seconds"],
}
PASSES: dict[str, Callable[[dict], bool]] = {
    "traced": lambda row: row["groups"] not in ("", "0"),
    "pruned = masked": lambda row: row["error"] != "",
    "= zeroed": lambda row: row["zeroed_error"] not in ("", "not comparable"),
    "costs": lambda row: row["costs"] == "exact",
    "reload": lambda row: row["reload"] == "identical",
    "step": lambda row: row["step"] == "ok",
    "ONNX": lambda row: row["onnx_error"] != "",
    "share as wanted": lambda row: not is_short(row),
    "TP runs": lambda row: row["tp_runs"] == "yes",
    "TP right": lambda row: row["tp_right"] == "yes",
}


def report(rows: list[dict]) -> str:
    """The page: what was checked, how many networks pass, and a table a family."""
    families = {}
    totals = []
    for family in FAMILIES:
        chosen = [row for row in rows if row["family"] == family]
        if chosen:
            families[family] = chosen
            totals.append([family, str(len(chosen)), *counts(chosen)])
    parts = [
        INTRODUCTION.read_text(encoding="utf-8"),
        "## Networks that pass\n",
        table(["family", "networks", *PASSES], totals),
    ]
    for family, chosen in families.items():
        cells = [[column(row) for column in COLUMNS.values()] for row in chosen]
        parts += [f"## {family}\n", table(list(COLUMNS), cells), *remarks(chosen)]
    return "\n".join(parts)


def counts(rows: list[dict]) -> list[str]:
    """For each check the number of networks that pass."""
    return [str(sum(map(passes, rows))) for passes in PASSES.values()]


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown.

    Args:
        header: Names of the columns.
        lines: Cells of each row.
    """
    rule = ["---"] * len(header)
    rows = [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]
    return "\n".join(rows) + "\n"


def remarks(rows: list[dict]) -> list[str]:
    """What failed, and why groups are pinned where the share is below its target."""
    lines = []
    for row in rows:
        if row["failures"]:
            lines.append([row["builder"], "fails", row["failures"]])
        if is_short(row):
            what = f"short of {percent(target(row))}; pinned"
            lines.append([row["builder"], what, summarised(row["reasons"])])
        if row["tp_failure"]:
            lines.append([row["builder"], "with Torch-Pruning", row["tp_failure"]])
    return [table(["network", "what", "why"], lines)] if lines else []


def summarised(reasons: str) -> str:
    """Reasons with those joined that differ in the message of an error alone.

    "3 x the pruned network doesn't run: A; 2 x the pruned network doesn't run: B"
    becomes "5 x the pruned network doesn't run: A, and the like".

    Args:
        reasons: As the table of results holds them.
    """
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for reason in re.split(r"; (?=\d+ x )", reasons):
        count, _, text = reason.partition(" x ")
        kind, _, message = text.partition(": ")
        counts[kind] = counts.get(kind, 0) + int(count)
        examples.setdefault(kind, []).append(message)
    parts = []
    for kind, count in counts.items():
        first, *others = examples[kind]
        message = f": {first}" if first else ""
        parts.append(f"{count} x {kind}{message}{', and the like' if others else ''}")
    return "; ".join(parts)


def missed(row: dict) -> str:
    """The checks after the first that the network doesn't pass."""
    missing = [
        name for name in ("costs", "reload", "step", "ONNX") if not PASSES[name](row)
    ]
    return f"**not {', '.join(missing)}**" if missing else ""


def target(row: dict) -> float:
    """The share of MACs that should be prunable on both axes."""
    for pattern, share in TARGETS:
        if re.search(pattern, row["builder"]):
            return share
    raise AssertionError("the last pattern fits every name")


def is_short(row: dict) -> bool:
    """Whether the share of MACs prunable on both axes is below its target."""
    share = row["both_axes_macs_share"]
    return share == "" or float(share) < target(row)


def percent(share: str | float) -> str:
    """A share as percents with at most one digit; empty as it is."""
    return "" if share == "" else f"{100 * float(share):.1f} %".replace(".0 %", " %")
