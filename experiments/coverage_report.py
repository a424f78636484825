"""docs/coverage.md from the rows of experiments/results/coverage.csv."""

import re
from collections.abc import Callable

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
INTRODUCTION = """\
# Coverage

Which networks can be traced, pruned and exported, and is what comes out right? Written by `experiments/coverage.py`
from `experiments/results/coverage.csv`; every builder is taken as it is, without weights, and measured in a process of
its own on one core.

What was checked, for every network:

- Every parameter, bias, layer scale and batch-norm statistic is random, so that no zero hides anything, and layers are
  scaled to outputs of unit size. Inputs are the smallest legal ones (64 pixels; 75 for Inception, 224 for ViT and
  MaxViT; timm's own where the size is fixed).
- **Error**: two allocations that keep a random 30 to 100 % of every group. The largest difference between the pruned
  network's output and the masked one's, relative to the masked one's largest value, at batch 2; below 1e-8 in float64,
  1e-4 in float32 (networks above 320 million parameters). Masking has to change the output by 1e-3 at least. Masks zero
  what layers read; norms over channels, softmax over channels and attention run on the kept channels only, and keep the
  dense network's scales. The mask follows the tracer's labels, so there is a second judge that doesn't.
- **Zeroed**: the same against a dense copy with zeros in the weights that read removed channels. Networks where
  channels are also read without weights (layer norm, attention) can't be compared so: "-". In all networks, keeping
  every channel gives the dense network's output.
- **Costs**: predicted MACs and parameters of the dense network and of both pruned ones equal what
  `torch.utils.flop_counter` and `numel` count, exactly.
- **Reload**: weights saved, laid into a fresh network: outputs are bit-identical.
- **Step**: in training mode every parameter gets a finite gradient of its shape, and SGD makes a step.
- **ONNX**: ONNX Runtime agrees with PyTorch to 1e-4 at batches of 1 and 4.

Shares of MACs: *touched*, layers of which a prunable group touches an axis; *both axes*, layers that can shrink on
both (**<** marks those short of what was wanted); *removable*, what is gone if every group keeps as little as it can.
*Trace* is the search for groups, *proof* the whole call with its numerical proof, in CPU seconds of one core; memory is
the peak of that call beyond what the network itself takes.

**Torch-Pruning** 1.6.1 has the same builders and values: pruning ratio 0.3, group magnitude, the classifier ignored, no
attribute set by hand, 120 CPU seconds and 18 GiB. *Right*: its output equals that of the dense network in which every
convolution and linear layer reads zeros for the input channels that Torch-Pruning itself says it removed, and layer
norms run over the kept channels. *Seconds* are those of its graph and its pruning.
"""
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
    """The page: what was checked, how many networks pass, and a table for each family."""
    families = {
        family: [row for row in rows if row["family"] == family] for family in FAMILIES
    }
    families = {family: chosen for family, chosen in families.items() if chosen}
    totals = [
        [family, str(len(chosen)), *counts(chosen)]
        for family, chosen in families.items()
    ]
    parts = [
        INTRODUCTION,
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
    """In Markdown."""
    rule = ["---"] * len(header)
    return (
        "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)) + "\n"
    )


def remarks(rows: list[dict]) -> list[str]:
    """What failed, and why groups are pinned where the share is short of what was
    wanted.
    """
    lines = []
    for row in rows:
        if row["failures"]:
            lines.append(f"- {row['builder']} fails: {row['failures']}")
        if is_short(row):
            lines.append(
                f"- {row['builder']} is short of {percent(target(row))}; pinned: "
                f"{row['reasons']}"
            )
        if row["tp_failure"]:
            lines.append(f"- {row['builder']} with Torch-Pruning: {row['tp_failure']}")
    return ["\n".join(lines) + "\n"] if lines else []


def missed(row: dict) -> str:
    """The checks after the first that the network doesn't pass."""
    missing = [
        name for name in ("costs", "reload", "step", "ONNX") if not PASSES[name](row)
    ]
    return f"**not {', '.join(missing)}**" if missing else ""


def target(row: dict) -> float:
    return next(
        share for pattern, share in TARGETS if re.search(pattern, row["builder"])
    )


def is_short(row: dict) -> bool:
    return row["both_axes_macs_share"] == "" or float(
        row["both_axes_macs_share"]
    ) < target(row)


def percent(share: str | float) -> str:
    return "" if share == "" else f"{100 * float(share):.1f} %".replace(".0 %", " %")
