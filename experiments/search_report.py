"""docs/results.md: what searches find, what is left of it after fine-tuning, and what a
policy is worth elsewhere.

python experiments/search_report.py

Written from the tables of `search_agents.py`, `after_finetuning.py`, `multi_budget.py`
and `transfer.py`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from autoprune.runs import write_text
from experiments.tables import mean_and_spread, read_table

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
RESULTS = Path(__file__).parent / "results"
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

INTRODUCTION = """\
# Results

Mean ± standard deviation over seeds, in brackets how many, where there are several. The tables with a row a
measurement, what their columns hold, the machines, and what the data says are in
[experiments/results](../experiments/results/README.md); the commands stand in the headers of the scripts. This page is
written from those tables by `experiments/search_report.py`. What isn't measured yet is a dash.
"""
SEARCHES = """
## What a search finds

Networks pruned to the budget by the allocation that won among each searcher's own finalists, **before fine-tuning**:
the loss on 3,000 training images that no search sees, and the accuracy there; best first. All score candidates through
one proxy, and an agent's evaluations include those that measure its groups' sensitivity (`search_agents.py`). Where
uniform pruning leaves less than a guess (both ResNets at 30 %), weights are solved anew by least squares first.
"""
FINETUNED = """
## What is left after fine-tuning

Five annealed epochs on 45,000 training images with distillation, the same for every allocation; the 10,000 test images
are read once, after the last epoch (`after_finetuning.py`). Dyna and random search have 300 evaluations. All but
Torch-Pruning's networks begin with weights solved anew, where that helps.
"""
RANGES = """
## One policy for every budget

One search of 600 evaluations on ResNet-20 over `macs=30%..70%` against one of 300 for each budget, all with sliced
candidates: accuracy before fine-tuning on 3,000 training images that no search sees, in % (`multi_budget.py`).
"""
TRANSFERS = """
## What a policy is worth on another network

The shipped policies, trained on the embedded ResNet-20, at half of the MACs: loss as in the first tables. Zero shot,
nothing is learned; where groups are unlike those that a policy knows, it is mixed with a guide whose 15 to 30
evaluations measure what a group is worth. `100 from it` is a search of 100 evaluations that starts from the policy,
the guide's included; a policy that knows less than half of the network (the VGG, the MobileNet) only leads the first
batch there, together with the guide. `from scratch` are the searches above (`transfer.py`).
"""


def main() -> None:
    write_text(PAGE, page())
    print(PAGE)


def page() -> str:
    """The whole page."""
    parts = (
        INTRODUCTION,
        SEARCHES,
        *searches(),
        FINETUNED,
        *finetuned(),
        RANGES,
        ranges(),
        TRANSFERS,
        *transfers(),
    )
    return "".join(parts)


def searches() -> Iterable[str]:
    """A table a network and budget: searchers by numbers of evaluations."""
    for model in NETWORKS:
        by_budget = grouped(read_table(RESULTS / f"search_{model}.csv"), "budget")
        for budget, rows in by_budget.items():
            lengths = sorted({row["asked"] for row in rows}, key=int)
            found = grouped(rows, "searcher")
            best = sorted(
                found,
                key=lambda name: mean(ranking(found[name], lengths), "selection_loss"),
            )
            lines = [
                [
                    NAMES.get(name, name),
                    *(scored(asked(found[name], n)) for n in lengths),
                ]
                for name in best
            ]
            yield heading(model, budget) + table(
                ["searcher", *(f"{n} evaluations" for n in lengths)], lines
            )


def asked(rows: Rows, evaluations: str) -> Rows:
    """One searcher's rows of so many evaluations; what decides at once has the same
    whatever is asked for.
    """
    at_once = [row for row in rows if row["evaluations"] == "1"][:1]
    return at_once or [row for row in rows if row["asked"] == evaluations]


def ranking(rows: Rows, lengths: Sequence[str]) -> Rows:
    """What a searcher is ranked by: 300 evaluations, or the most that it has."""
    return asked(rows, "300") or next(
        found for n in reversed(lengths) if (found := asked(rows, n))
    )


def scored(rows: Rows) -> str:
    """Loss and accuracy."""
    if not rows:
        return "-"
    accuracy = shown(
        [100 * float(row["selection_accuracy"]) for row in rows], 1, counted=False
    )
    return f"{shown(column(rows, 'selection_loss'), 3)}, {accuracy} %"


def finetuned() -> Iterable[str]:
    """A table a network and budget: allocations by what is left of the dense network's
    accuracy.
    """
    for model in NETWORKS:
        for budget, rows in grouped(
            read_table(RESULTS / f"after_finetuning_{model}.csv"), "budget"
        ).items():
            found = grouped(rows, "method")
            best = sorted(found, key=lambda name: -mean(found[name], "test"))
            lines = [
                [
                    NAMES.get(name, name),
                    *(percent(found[name], of) for of in ("selection_pruned", "test")),
                ]
                for name in best
            ]
            dense = percent(rows[:1], "test_dense")
            yield heading(model, budget) + table(
                ["allocation", "pruned, %", f"fine-tuned, % (dense {dense})"], lines
            )


def ranges() -> str:
    """Budgets by alone and range, of what is chosen and of the policy."""
    rows = grouped(read_table(RESULTS / "multi_budget.csv"), "model")["resnet20"]
    lines = []
    for budget, found in grouped(rows, "budget").items():
        cells = [percentage_of(budget)]
        for of in ("selection_accuracy", "policy_selection_accuracy"):
            alone, ranged = (
                {
                    row["seed"]: 100 * float(row[of])
                    for row in found
                    if row["kind"] == kind
                }
                for kind in ("alone", "range")
            )
            both = sorted(alone.keys() & ranged.keys())
            cells += [shown([alone[seed] for seed in both], 1)]
            cells += [signed([ranged[seed] - alone[seed] for seed in both])]
        lines.append(cells)
    return "\n" + table(
        [
            "MACs",
            "chosen, alone",
            "range minus alone",
            "policy, alone",
            "range minus alone",
        ],
        lines,
    )


def transfers() -> Iterable[str]:
    """A table a network: policies by zero shot, warm start and from scratch."""
    for model, rows in grouped(read_table(RESULTS / "transfer.csv"), "model").items():
        scratch = grouped(read_table(RESULTS / f"search_{model}.csv"), "budget").get(
            rows[0]["budget"], []
        )
        lines = []
        for policy, found in grouped(rows, "policy").items():
            name = policy.rsplit("-", 1)[1]
            own = [row for row in scratch if row["searcher"] == name]
            starts = [
                [row for row in found if row["kind"] == kind]
                for kind in ("zero shot", "warm, 100")
            ]
            parts = (*starts, asked(own, "100"), asked(own, "300"))
            lines.append(
                [
                    NAMES.get(name, name),
                    *(shown(column(part, "selection_loss"), 3) for part in parts),
                ]
            )
        uniform = shown(
            column(
                [row for row in rows if row["kind"] == "uniform"][:1], "selection_loss"
            ),
            3,
        )
        head = [
            "policy of",
            "zero shot",
            "100 from it",
            "100 from scratch",
            "300 from scratch",
        ]
        yield (
            heading(model, rows[0]["budget"])
            + f"Uniform pruning: {uniform}.\n\n"
            + table(head, lines)
        )


def grouped(rows: Rows, key: str) -> dict[str, Rows]:
    """Rows by one column, in the order of its first appearance."""
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return found


def column(rows: Rows, name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def mean(rows: Rows, name: str) -> float:
    return float(np.mean(column(rows, name)))


def percent(rows: Rows, name: str) -> str:
    return shown([100 * value for value in column(rows, name)], 2)


def shown(values: Sequence[float], digits: int, counted: bool = True) -> str:
    """Mean ± standard deviation (number); one value as it is, none as a dash."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return mean_and_spread(values, digits) + (f" ({len(values)})" if counted else "")


def signed(values: Sequence[float]) -> str:
    return ("+" if np.mean(values) >= 0 else "") + shown(values, 1)


def percentage_of(budget: str) -> str:
    return budget.removeprefix("macs=").replace("%", " %")


def heading(model: str, budget: str) -> str:
    return f"\n### {NETWORKS[model]}, {percentage_of(budget)} of the MACs\n\n"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(
        f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines)
    )


if __name__ == "__main__":
    main()
