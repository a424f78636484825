"""Writes docs/methods.md.

    python -m experiments.methods_report

From `METHODS`, the table below and the rows of experiments/results/methods_all.csv.
"""

from collections.abc import Mapping
from pathlib import Path

from autoprune.cli.presets import METHODS
from autoprune.files import write_text
from experiments.tables import read_table

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
TABLE = Path(__file__).parent / "results" / "methods_all.csv"
TEMPLATE = Path(__file__).parent / "pages" / "methods.md"
"""The page with placeholders for the dense accuracy and the rows."""

RANKING = "one look at the weights"
DATA = "a pass over 500 images"
SEARCH = "as many evaluations as `--episodes`"
SPARSE = "a training of the whole network before"
MERGED = "a training of the whole network, and none after"
ABOUT: dict[str, tuple[str, str]] = {
    "l1": (RANKING, "R56 93.78 → 93.51 at 49.7 %, 120 epochs (run by TPP's authors)"),
    "l2": (
        RANKING,
        "R56 93.53 → 93.46 at 52.6 %, 100 epochs (global, by groups; DepGraph's "
        "authors)",
    ),
    "fpgm": (RANKING, "R56 93.59 → 93.26 at 52.6 %, 200 epochs (quoted)"),
    "activation": (DATA, ""),
    "apoz": (DATA, "R56 92.85 → 92.59 at 46.1 %, 70 epochs, gradual (Distiller)"),
    "bn_scale": (RANKING, ""),
    "taylor": ("gradients on 500 images", ""),
    "hessian": ("Hessian-vector products on 500 images", ""),
    "lamp": (RANKING, ""),
    "random": (
        "nothing",
        "0.35 points below L2 at half of the MACs, in a comparison of twelve criteria",
    ),
    "cost_aware": (RANKING, ""),
    "l1_training": (SPARSE, ""),
    "l2_training": (SPARSE, ""),
    "group_lasso": (SPARSE, ""),
    "slimming": (
        SPARSE,
        "VGG-19 93.77 → 93.78 with 88.8 % fewer parameters, 160 + 160 epochs",
    ),
    "depgraph": (SPARSE, "R56 93.53 → 93.77 at 52.9 %, 100 + 100 epochs"),
    "centripetal": (MERGED, "R56 93.39 → 93.44 at 60.9 %, 3 x 600 epochs"),
    "resrep": (MERGED, "R56 93.71 → 93.71 ± .02 at 52.9 %, 480 epochs"),
    "drop_out": (SPARSE, ""),
    "weight_magnitude": (RANKING, ""),
    "layer": ("evaluations, as many as blocks, after each removal", ""),
    "row": (RANKING, ""),
    "column": (RANKING, ""),
    "kernel": (RANKING, ""),
    "filter": (RANKING, ""),
    "random_weights": ("nothing", ""),
    "lamp_weights": (RANKING, ""),
    "2:4": (RANKING, ""),
    "gsm": (SPARSE, "R56 94.05 → 94.10 with 6.6 times fewer weights, 600 epochs"),
    "drop_connect": (SPARSE, ""),
    "sensitivity": (
        "9 evaluations a group",
        "R56 93.04 → 93.06 at 27.6 %, 40 epochs (levels set by hand)",
    ),
    "iterative": (MERGED, ""),
    "agp": (
        MERGED,
        "R20 91.78 → 91.43 at 24.9 %, 180 epochs (Distiller, filters and weights)",
    ),
    "three_dimensions": (
        "up to 14 short trainings",
        "R56 93.69 → 93.76 at 50.0 % (quoted)",
    ),
    "eagleeye": (SEARCH, "ImageNet R50 77.2 → 76.4 at 2 G MACs"),
    "amc": (
        SEARCH,
        "R56 92.80 → 91.90 at 50 % (quoted); R20 91.78 → 91.26, 60 epochs (Distiller)",
    ),
    "dyna": (SEARCH, ""),
    "ppo": (
        SEARCH,
        "R56 93.39 → 93.49 at 50 %, 200 epochs, best on test (GNN-RL: PPO on a graph "
        "of the network)",
    ),
    "sac": (SEARCH, ""),
    "td3": (SEARCH, ""),
    "ddpg": (SEARCH, ""),
    "tqc": (SEARCH, ""),
    "evolution": (SEARCH, ""),
    "tpe": (SEARCH, ""),
}
"""Method to what it costs beside fine-tuning, and the published result nearest to ours,
if one is comparable.
"""


def main() -> None:
    """Writes the page."""
    write_text(PAGE, page(read_table(TABLE)))
    print(PAGE)


def page(rows: list[dict]) -> str:
    """The page, with the first seed's row of each method that was measured."""
    first_rows: dict[str, dict] = {}
    for row in rows:
        first_rows.setdefault(row["row"], row)
    dense = f"{100 * float(rows[0]['test_dense']):.2f}" if rows else "-"
    lines = [table_line(name, first_rows.get(name, {})) for name in METHODS]
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.format(dense=dense, rows="\n".join(lines))


def table_line(name: str, row: Mapping[str, str]) -> str:
    """One method's row in Markdown.

    Args:
        name: The method's.
        row: What was measured of it; empty if nothing was.
    """
    method = METHODS[name]
    costs, published = ABOUT[name]
    ours = "-"
    if row:
        before = percent(row["test_pruned"])
        after = percent(row["test"])
        ours = f"{percent(row['macs_ratio'])}: {before} → {after}"
    cells = (
        f"`autoprune run --method {name}`",
        method.paper,
        method.granularity,
        costs,
        ours,
        published or "-",
    )
    return f"| {' | '.join(cells)} |"


def percent(share: str) -> str:
    """A share as percents with one digit."""
    return f"{100 * float(share):.1f} %"


if __name__ == "__main__":
    main()
