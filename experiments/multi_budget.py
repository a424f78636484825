"""Does one policy for a range of budgets do what a policy for each of them does?

    python -m experiments.multi_budget --model resnet20 --weights FILE --seeds 0 1 2
    python -m experiments.multi_budget --summary

One search over `macs=30%..70%` of twice the evaluations, those that draw its front
included, against five searches for 30, 40, 50, 60 and 70 % alone. At each budget both
are judged by the same rule: the policy's own allocation and the best episode, resized
to the budget, are scored on the selection split (3,000 training images that no search
sees), and the better one counts. One row a seed, budget and kind in
`experiments/results/multi_budget.csv`; the columns `policy_*` hold the policy's own
roll-out. Candidates are sliced, not reconstructed, whatever the budget, so that the
scores of a search for all budgets and of one for a loose one are of the same kind.
Resumable search by search. The summary gives range minus alone, in points of accuracy
on that split.
"""

import argparse
from pathlib import Path

from autoprune.agents.finalists import (
    FRONT_BUDGETS,
    Finalist,
    candidates_for_budget,
    rank_on_selection,
)
from autoprune.agents.search import search
from autoprune.config import (
    DataConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.costs.budget import Budget
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.pipeline.context import RunContext
from experiments.script import run, run_folder
from experiments.search_agents import ROUND_TO
from experiments.tables import (
    add_rows,
    device,
    has_row,
    mean_and_spread,
    rows_for_summary,
)

RANGE = "macs=30%..70%"
BUDGETS = tuple(f"macs={share}%" for share in (30, 40, 50, 60, 70))
TABLE = Path(__file__).parent / "results" / "multi_budget.csv"
KEY = ("model", "agent", "seed", "kind", "budget")
FIELDS = (
    *KEY,
    "evaluations",
    "seconds",
    "selection_loss",
    "selection_accuracy",
    "source",
    "policy_selection_loss",
    "policy_selection_accuracy",
    "device",
)


def main() -> None:
    """Measures what the table lacks, or sums it up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--agent", default="dyna")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--episodes",
        type=int,
        default=300,
        help="of a search for one budget; the range gets twice",
    )
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/multi_budget"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summarise(rows_for_summary(TABLE, parser))
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")
    if args.episodes <= FRONT_BUDGETS:
        parser.error(
            f"--episodes: a range's front takes {FRONT_BUDGETS}, so give more than "
            f"that; got {args.episodes}"
        )
    network = NetworkConfig(args.model, args.weights)
    proxy = ProxyConfig(workers=args.workers, reconstruct="off")
    settings = Settings(network, DataConfig("cifar10"), SearchConfig(), proxy)
    context = RunContext(settings)
    # A search is of a kind, for a budget or a range, and fills rows at some budgets.
    searches = [("range", RANGE, BUDGETS)]
    for budget in BUDGETS:
        searches.append(("alone", budget, (budget,)))
    for seed in args.seeds:
        for kind, trained_on, budgets in searches:
            cells = []
            for budget in budgets:
                values = (args.model, args.agent, seed, kind, budget)
                cells.append(dict(zip(KEY, values, strict=True)))
            if not all(has_row(TABLE, cell) for cell in cells):
                measure(context, cells, trained_on, args)


def measure(
    context: RunContext, cells: list[dict], trained_on: str, args: argparse.Namespace
) -> None:
    """Runs one search and adds its rows to the table.

    Args:
        context: Network, images and trace.
        cells: The rows, which differ in their budget.
        trained_on: The budget or range that is searched.
        args: The script's arguments.
    """
    seed = cells[0]["seed"]
    episodes = args.episodes
    if cells[0]["kind"] == "range":
        # The front takes a roll-out of the policy and one of uniform pruning at each
        # of its budgets.
        episodes = 2 * (args.episodes - FRONT_BUDGETS)
    folder = run_folder(args.runs, (args.model, args.agent, seed, trained_on))
    folder.root.mkdir(parents=True, exist_ok=True)
    config = SearchConfig(trained_on, agent=args.agent, episodes=episodes, seed=seed)
    env = LayerPruningEnv.with_suited_proxy(
        context.model, context.groups, context.proxy(), trained_on, round_to=ROUND_TO
    )
    result = search(env, config, folder)
    assert result.policy is not None, "the question is about policies"
    result.policy.save(
        folder.policy, network=context.groups.fingerprint, budget=trained_on
    )
    for cell in cells:
        budget = Budget.parse(cell["budget"])
        candidates = candidates_for_budget(result.recorder, result.policy, budget)
        finalists = rank_on_selection(candidates, env)
        costs = {"evaluations": result.evaluations, "seconds": round(result.seconds, 1)}
        row = cell | costs | scores(finalists) | {"device": device()}
        add_rows(TABLE, [row], FIELDS)
        print(row, flush=True)


def scores(finalists: list[Finalist]) -> dict:
    """The better of the two, and the policy's own."""
    best = finalists[0]
    (of_policy,) = [
        finalist for finalist in finalists if finalist.allocation.source == "policy"
    ]
    return {
        "selection_loss": round(best.selection.loss, 4),
        "selection_accuracy": round(best.selection.accuracy, 4),
        "source": best.allocation.source,
        "policy_selection_loss": round(of_policy.selection.loss, 4),
        "policy_selection_accuracy": round(of_policy.selection.accuracy, 4),
    }


def summarise(rows: list[dict]) -> None:
    """Range minus alone at each budget, over the seeds that have both.

    Of the policies, and of what is chosen.
    """
    summarise_column(rows, "policy_selection_accuracy", "policy")
    summarise_column(rows, "selection_accuracy", "better of policy and episode")


def summarise_column(rows: list[dict], column: str, label: str) -> None:
    """One line a model, agent and budget.

    Args:
        rows: The table.
        column: The accuracy that is compared.
        label: What to call it.
    """
    points: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for row in rows:
        key = (row["model"], row["agent"], row["budget"])
        by_kind = points.setdefault(key, {})
        by_kind[row["kind"], row["seed"]] = 100 * float(row[column])
    for key, by_kind in points.items():
        alone = []
        gaps = []
        for (kind, seed), accuracy in by_kind.items():
            if kind == "alone" and ("range", seed) in by_kind:
                alone.append(accuracy)
                gaps.append(by_kind["range", seed] - accuracy)
        if alone:
            print(
                f"{label}: {' '.join(key)}  alone {mean_and_spread(alone)}  "
                f"range {mean_and_spread(gaps)}  seeds {len(alone)}"
            )


if __name__ == "__main__":
    run(main)
