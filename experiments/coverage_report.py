"""Writes the text of docs/coverage.md from experiments/results/coverage.csv."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from experiments.coverage_networks import FAMILIES, NAMES

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
# Networks whose trace shouldn't take more than three times that of a plain sibling.
SIBLINGS = {
    ("computed weights", "resnet18 weight_norm"): ("computed weights", "resnet18"),
    ("computed weights", "resnet18 spectral_norm"): ("computed weights", "resnet18"),
    ("computed weights", "resnet18 standardised"): ("computed weights", "resnet18"),
    ("computed weights", "mobilenet_v2 weight_norm"): (
        "computed weights",
        "mobilenet_v2",
    ),
    ("transformers", "resnet"): ("computed weights", "resnet18"),
    ("transformers", "deit"): ("transformers", "vit"),
    ("transformers", "dinov2"): ("transformers", "vit"),
    ("transformers", "beit"): ("transformers", "vit"),
    ("transformers", "beit_relative"): ("transformers", "vit"),
    ("timm", "resnetv2_50x1_bit"): ("timm", "resnetv2_50"),
    ("timm", "nf_resnet50"): ("timm", "resnetv2_50"),
    ("timm", "convnextv2_atto"): ("timm", "convnext_atto"),
    ("timm", "swinv2_tiny_window8_256"): ("timm", "swin_tiny_patch4_window7_224"),
}
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
    "error": lambda row: row["error"] or ("refused" if is_refused(row) else "**no**"),
    "zeroed": lambda row: (
        "-"
        if row["zeroed_error"] == "not comparable" or is_refused(row)
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
    "measured": lambda row: day(row["measured"]),
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


# By which column a check is known to have been made, where it isn't the first part's.
MEASURED = {
    "ONNX": "onnx_measured",
    "TP runs": "tp_measured",
    "TP right": "tp_measured",
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
        *siblings(rows),
        *ages(families),
    ]
    for family, chosen in families.items():
        cells = [[column(row) for column in COLUMNS.values()] for row in chosen]
        parts += [f"## {family}\n", table(list(COLUMNS), cells), *remarks(chosen)]
    return "\n".join(parts)


def counts(rows: list[dict]) -> list[str]:
    """For each check the number of networks that pass, of those that were measured."""
    cells = []
    for name, passes in PASSES.items():
        measured = [row for row in rows if row[MEASURED.get(name, "measured")]]
        of = "" if len(measured) == len(rows) else f" of {len(measured)}"
        cells.append(f"{sum(map(passes, measured))}{of}")
    return cells


def siblings(rows: list[dict]) -> list[str]:
    """How long some traces take, and those of their plain siblings."""
    known = {(row["family"], row["builder"]): row for row in rows}
    lines = []
    for network, plain in SIBLINGS.items():
        seconds = [known.get(n, {}).get("trace_seconds") for n in (network, plain)]
        if all(seconds):
            ratio = float(seconds[0] or 0) / float(seconds[1] or 1)
            lines.append([" ".join(network), " ".join(plain), *seconds, f"{ratio:.1f}"])
    header = ["network", "plain sibling", "trace s", "its trace s", "ratio"]
    title = "## Traces beside those of plain siblings\n"
    return [title, table(header, lines)] if lines else []


def ages(families: dict[str, list[dict]]) -> list[str]:
    """On which days the parts were measured; rows of an earlier tracer, and none.

    Args:
        families: Family to its rows.
    """
    lines = []
    for family, rows in families.items():
        cells = [family]
        for column in ("measured", "onnx_measured", "tp_measured"):
            days = Counter(day(row[column]) or "not yet" for row in rows)
            cells.append(", ".join(f"{days[each]} on {each}" for each in sorted(days)))
        lines.append([cell.replace("on not yet", "not yet") for cell in cells])
    every = [row for rows in families.values() for row in rows]
    newest = max((day(row["measured"]) for row in every), default="")
    header = ["family", "shares and checks", "ONNX", "Torch-Pruning"]
    parts = ["## When what was measured\n", table(header, lines)]
    for family, rows in families.items():
        old = [row["builder"] for row in rows if day(row["measured"]) < newest]
        if old:
            which = ", ".join(old) if len(old) < len(rows) else "all"
            parts.append(f"Of an earlier tracer, in {family}: {which}.\n")
    for family in FAMILIES:
        rows = families.get(family, [])
        known = {row["builder"] for row in rows if row["measured"]}
        missing = [name for name in NAMES[family]() if name not in known]
        if missing:
            parts.append(f"Not measured yet, in {family}: {', '.join(missing)}.\n")
    return parts


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
        if row["onnx_failure"]:
            lines.append([row["builder"], "ONNX", row["onnx_failure"]])
        # A row that ONNX alone has measured says nothing of shares.
        if row["measured"] and is_short(row) and not is_refused(row):
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
    """The checks after the first that the network doesn't pass, or that wait."""
    if is_refused(row):
        return "-"
    missing = [
        name
        for name in ("costs", "reload", "step", "ONNX")
        if row[MEASURED.get(name, "measured")] and not PASSES[name](row)
    ]
    parts = [f"**not {', '.join(missing)}**"] if missing else []
    if not row["onnx_measured"]:
        parts.append("ONNX not yet")
    return "; ".join(parts)


def is_refused(row: dict) -> bool:
    """Whether the network can't be traced; the reason is among the failures."""
    return bool(row["measured"]) and row["groups"] == ""


def day(time: str) -> str:
    """The day of a time of measurement."""
    return time[:10]


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
