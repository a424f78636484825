"""Writes docs/results.md.

    python -m experiments.search_report

What searches find, what is left of it after fine-tuning, and what a policy is worth
elsewhere, from the tables of `search_agents.py`, `after_finetuning.py`,
`multi_budget.py`, `transfer.py` and `widths.py`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from autoprune.files import write_text
from experiments.tables import mean_and_spread, read_table

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "pages" / "results.md"
"""The page with a placeholder for each group of tables."""
Rows = list[dict[str, str]]

NETWORKS = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "vgg16_bn_cifar": "VGG-16-BN",
    "mobilenet_v2_cifar": "MobileNet-V2",
}
NAMES = {
    "dyna": "Dyna",
    "evolution": "CMA-ES",
    "sensitivity": "sensitivity + dynamic programming",
    "global": "global (one threshold)",
    "cost_aware": "global per MAC",
    "eagleeye": "EagleEye",
    "torch_pruning_l2": "Torch-Pruning's global L2",
    **{name: name.upper() for name in ("ppo", "sac", "td3", "ddpg", "tqc", "tpe")},
}
"""What a searcher or method is called; others by their own name."""
WIDTHS = {
    "tile": "the tile, 16",
    "auto2": "the tile or less, 2 levels",
    "auto3": "the tile or less, 3 levels (the default)",
    "auto4": "the tile or less, 4 levels",
}
"""What multiples are called; others are numbers."""


def main() -> None:
    """Writes the page."""
    write_text(PAGE, page())
    print(PAGE)


def page() -> str:
    """The whole page."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        searches="".join(searches()),
        finetuned="".join(finetuned()),
        ranges=ranges(),
        transfers="".join(transfers()),
        widths="".join(widths()),
    )


def searches() -> Iterable[str]:
    """A table a network and budget: searchers by numbers of evaluations."""
    for model in NETWORKS:
        by_budget = group_rows(read_table(RESULTS / f"search_{model}.csv"), "budget")
        for budget, rows in by_budget.items():
            lengths = sorted({row["asked"] for row in rows}, key=int)
            by_searcher = group_rows(rows, "searcher")
            losses = {}
            for name, its_rows in by_searcher.items():
                losses[name] = mean(ranking_rows(its_rows, lengths), "selection_loss")
            lines = []
            for name in sorted(by_searcher, key=lambda name: losses[name]):
                line = [NAMES.get(name, name)]
                for n in lengths:
                    line.append(scores_cell(rows_of_length(by_searcher[name], n)))
                lines.append(line)
            header = ["searcher", *(f"{n} evaluations" for n in lengths)]
            yield heading(model, budget) + table(header, lines)


def rows_of_length(rows: Rows, evaluations: str) -> Rows:
    """One searcher's rows of so many evaluations.

    What decides at once has the same whatever is asked for.

    Args:
        rows: All of a searcher's.
        evaluations: As the column `asked` has it.
    """
    at_once = [row for row in rows if row["evaluations"] == "1"][:1]
    return at_once or [row for row in rows if row["asked"] == evaluations]


def ranking_rows(rows: Rows, lengths: Sequence[str]) -> Rows:
    """What a searcher is ranked by: 300 evaluations, or the most that it has.

    Args:
        rows: All of a searcher's.
        lengths: Numbers of evaluations, ascending.
    """
    for evaluations in ("300", *reversed(lengths)):
        chosen = rows_of_length(rows, evaluations)
        if chosen:
            return chosen
    raise AssertionError("every searcher has a row")


def scores_cell(rows: Rows) -> str:
    """Loss and accuracy."""
    if not rows:
        return "-"
    loss = values_cell(column(rows, "selection_loss"), 3)
    accuracies = [100 * value for value in column(rows, "selection_accuracy")]
    return f"{loss}, {values_cell(accuracies, 1, is_counted=False)} %"


def finetuned() -> Iterable[str]:
    """A table a network and budget: allocations by accuracy, pruned and fine-tuned."""
    for model in NETWORKS:
        measured = read_table(RESULTS / f"after_finetuning_{model}.csv")
        for budget, rows in group_rows(measured, "budget").items():
            by_method = group_rows(rows, "method")
            tests = {name: mean(of, "test") for name, of in by_method.items()}
            lines = []
            for name in sorted(by_method, key=lambda name: -tests[name]):
                pruned = percent(by_method[name], "selection_pruned")
                test = percent(by_method[name], "test")
                lines.append([NAMES.get(name, name), pruned, test])
            dense = percent(rows[:1], "test_dense")
            header = ["allocation", "pruned, %", f"fine-tuned, % (dense {dense})"]
            yield heading(model, budget) + table(header, lines)


def ranges() -> str:
    """Budgets by alone and range, of what is chosen and of the policy."""
    rows = group_rows(read_table(RESULTS / "multi_budget.csv"), "model")["resnet20"]
    lines = []
    for budget, its_rows in group_rows(rows, "budget").items():
        cells = [percentage_of(budget)]
        for name in ("selection_accuracy", "policy_selection_accuracy"):
            alone = accuracy_by_seed(its_rows, "alone", name)
            ranged = accuracy_by_seed(its_rows, "range", name)
            both = sorted(alone.keys() & ranged.keys())
            cells.append(values_cell([alone[seed] for seed in both], 1))
            cells.append(signed_cell([ranged[seed] - alone[seed] for seed in both]))
        lines.append(cells)
    difference = "range minus alone"
    header = ["MACs", "chosen, alone", difference, "policy, alone", difference]
    return "\n" + table(header, lines)


def accuracy_by_seed(rows: Rows, kind: str, name: str) -> dict[str, float]:
    """Seed to accuracy in percent.

    Args:
        rows: Of one budget.
        kind: "alone" or "range".
        name: The column.
    """
    return {row["seed"]: 100 * float(row[name]) for row in rows if row["kind"] == kind}


def transfers() -> Iterable[str]:
    """A table a network: policies by zero shot, warm start and from scratch."""
    for model, rows in group_rows(
        read_table(RESULTS / "transfer.csv"), "model"
    ).items():
        budget = rows[0]["budget"]
        searches_of_model = read_table(RESULTS / f"search_{model}.csv")
        from_scratch = group_rows(searches_of_model, "budget").get(budget, [])
        lines = []
        for policy, its_rows in group_rows(rows, "policy").items():
            name = policy.rsplit("-", 1)[1]
            searched = [row for row in from_scratch if row["searcher"] == name]
            parts = (
                rows_of_kind(its_rows, "zero shot"),
                rows_of_kind(its_rows, "warm, 100"),
                rows_of_length(searched, "100"),
                rows_of_length(searched, "300"),
            )
            line = [NAMES.get(name, name)]
            for part in parts:
                line.append(values_cell(column(part, "selection_loss"), 3))
            lines.append(line)
        uniform = column(rows_of_kind(rows, "uniform")[:1], "selection_loss")
        header = [
            "policy of",
            "zero shot",
            "100 from it",
            "100 from scratch",
            "300 from scratch",
        ]
        yield (
            heading(model, budget)
            + f"Uniform pruning: {values_cell(uniform, 3)}.\n\n"
            + table(header, lines)
        )


def widths() -> Iterable[str]:
    """A table a network: multiples by time and accuracy at half of the MACs."""
    for model, rows in group_rows(read_table(RESULTS / "widths.csv"), "model").items():
        rows = [row for row in rows if row["budget"] == "macs=50%"]
        lines = []
        for name, its_rows in group_rows(rows, "widths").items():
            by_searcher = group_rows(its_rows, "searcher")
            line = [WIDTHS.get(name, name)]
            for searcher in ("uniform", "dyna"):
                for batch in (1, 32):
                    times = measured(by_searcher[searcher], f"time_{batch}")
                    line.append(values_cell(times, 2))
            tests = measured(by_searcher["dyna"], "test")
            line.append(values_cell([100 * test for test in tests], 2))
            lines.append(line)
        header = [
            "multiples of",
            "uniform, batch 1",
            "batch 32",
            "searched, batch 1",
            "batch 32",
            "its accuracy, %",
        ]
        yield f"\n### {NETWORKS[model]}\n\n" + table(header, lines)


def measured(rows: Rows, name: str) -> list[float]:
    """A column as numbers, without the rows that have none.

    Args:
        rows: The table.
        name: The column.
    """
    return column([row for row in rows if row[name]], name)


def rows_of_kind(rows: Rows, kind: str) -> Rows:
    """The rows of `transfer.csv` of one kind.

    Args:
        rows: Some of them.
        kind: "uniform", "zero shot" or "warm, 100".
    """
    return [row for row in rows if row["kind"] == kind]


def group_rows(rows: Rows, key: str) -> dict[str, Rows]:
    """Rows by one column, in the order of its first appearance.

    Args:
        rows: The table.
        key: The column.
    """
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


def column(rows: Rows, name: str) -> list[float]:
    """A column as numbers.

    Args:
        rows: The table.
        name: The column.
    """
    return [float(row[name]) for row in rows]


def mean(rows: Rows, name: str) -> float:
    """The mean of a column.

    Args:
        rows: The table.
        name: The column.
    """
    return float(np.mean(column(rows, name)))


def percent(rows: Rows, name: str) -> str:
    """A cell with a column of shares, in percent.

    Args:
        rows: The table.
        name: The column.
    """
    return values_cell([100 * value for value in column(rows, name)], 2)


def values_cell(values: Sequence[float], digits: int, is_counted: bool = True) -> str:
    """Mean ± standard deviation (number); one value as it is, none as a dash.

    Args:
        values: The numbers.
        digits: After the point.
        is_counted: Whether the cell says how many there are.
    """
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    count = f" ({len(values)})" if is_counted else ""
    return mean_and_spread(values, digits) + count


def signed_cell(values: Sequence[float]) -> str:
    """As `values_cell`, with a plus sign."""
    return ("+" if np.mean(values) >= 0 else "") + values_cell(values, 1)


def percentage_of(budget: str) -> str:
    """For example, "50 %" of "macs=50%"."""
    return budget.removeprefix("macs=").replace("%", " %")


def heading(model: str, budget: str) -> str:
    """A table's heading in Markdown.

    Args:
        model: A key of `NETWORKS`.
        budget: For example, "macs=50%".
    """
    return f"\n### {NETWORKS[model]}, {percentage_of(budget)} of the MACs\n\n"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        header: Names of the columns.
        lines: Cells of each row.
    """
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


if __name__ == "__main__":
    main()
