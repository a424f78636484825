"""Does one policy for a range of budgets do what a policy for each of them does?

    python experiments/multi_budget.py --model resnet20 --weights FILE --seeds 0 1 2
    python experiments/multi_budget.py --summary

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
from collections import defaultdict
from pathlib import Path

from autoprune.agents.finalists import (
    FRONT_BUDGETS,
    Finalist,
    rank_on_selection,
    within,
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
from autoprune.pipeline.context import Workspace
from autoprune.runs import RunFolder
from experiments.script import run
from experiments.tables import add_rows, device, holds, mean_and_spread, measured

RANGE, SHARES = "macs=30%..70%", (30, 40, 50, 60, 70)
TABLE = Path(__file__).parent / "results" / "multi_budget.csv"
KEY = ("model", "agent", "seed", "kind", "budget")
FIELDS = (
    *KEY,
    *("evaluations", "seconds", "selection_loss", "selection_accuracy", "source"),
    *("policy_selection_loss", "policy_selection_accuracy", "device"),
)


def main() -> None:
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
        return summarise(measured(TABLE, parser))
    if args.weights is None:
        parser.error("--weights: give the trained weights of the network")
    if args.episodes <= FRONT_BUDGETS:
        parser.error(
            f"--episodes: a range's front takes {FRONT_BUDGETS}, so give more than "
            f"that; got {args.episodes}"
        )
    network, proxy = (
        NetworkConfig(args.model, args.weights),
        ProxyConfig(workers=args.workers, reconstruct="off"),
    )
    workspace = Workspace(
        Settings(network, DataConfig("cifar10"), SearchConfig(), proxy)
    )
    alone = [("alone", f"macs={share}%", [f"macs={share}%"]) for share in SHARES]
    for seed in args.seeds:
        for kind, trained_on, budgets in [
            ("range", RANGE, [f"macs={share}%" for share in SHARES]),
            *alone,
        ]:
            cells = [
                dict(
                    zip(KEY, (args.model, args.agent, seed, kind, budget), strict=True)
                )
                for budget in budgets
            ]
            if not all(holds(TABLE, cell) for cell in cells):
                measure(workspace, cells, trained_on, args)


def measure(
    workspace: Workspace, cells: list[dict], trained_on: str, args: argparse.Namespace
) -> None:
    """One search, and its rows."""
    # The front takes a roll-out of the policy and one of uniform pruning at each of its
    # budgets.
    first, n = (
        cells[0],
        2 * (args.episodes - FRONT_BUDGETS)
        if cells[0]["kind"] == "range"
        else args.episodes,
    )
    stem = f"{args.model}-{args.agent}-{first['seed']}-{trained_on}".replace(
        "=", "-"
    ).replace("%", "")
    folder = RunFolder(args.runs / stem)
    folder.root.mkdir(parents=True, exist_ok=True)
    config = SearchConfig(trained_on, agent=args.agent, episodes=n, seed=first["seed"])
    env = LayerPruningEnv(
        workspace.model, workspace.groups, workspace.proxy(), trained_on
    )
    result = search(env, config, folder)
    result.policy.save(
        folder.policy, network=workspace.groups.fingerprint, budget=trained_on
    )
    for cell in cells:
        finalists = rank_on_selection(
            within(result.recorder, result.policy, Budget.parse(cell["budget"])), env
        )
        costs = {"evaluations": result.evaluations, "seconds": round(result.seconds, 1)}
        row = cell | costs | scores(finalists) | {"device": device()}
        add_rows(TABLE, [row], FIELDS)
        print(row, flush=True)


def scores(finalists: list[Finalist]) -> dict:
    """The better of the two, and the policy's own."""
    best = finalists[0]
    own = next(
        finalist for finalist in finalists if finalist.allocation.source == "policy"
    )
    return {
        "selection_loss": round(best.selection.loss, 4),
        "selection_accuracy": round(best.selection.accuracy, 4),
        "source": best.allocation.source,
        "policy_selection_loss": round(own.selection.loss, 4),
        "policy_selection_accuracy": round(own.selection.accuracy, 4),
    }


def summarise(rows: list[dict]) -> None:
    """Range minus alone at each budget, over the seeds that have both: of the policies,
    and of what is chosen.
    """
    for column, what in (
        ("policy_selection_accuracy", "policy"),
        ("selection_accuracy", "better of policy and episode"),
    ):
        points: dict[tuple[str, str, str], dict[tuple[str, str], float]] = defaultdict(
            dict
        )
        for row in rows:
            points[row["model"], row["agent"], row["budget"]][
                row["kind"], row["seed"]
            ] = 100 * float(row[column])
        for key, by_kind in points.items():
            seeds = [
                seed
                for kind, seed in by_kind
                if kind == "alone" and ("range", seed) in by_kind
            ]
            if seeds:
                alone = [by_kind["alone", seed] for seed in seeds]
                gaps = [
                    by_kind["range", seed] - by_kind["alone", seed] for seed in seeds
                ]
                shown = f"alone {mean_and_spread(alone)}  range {mean_and_spread(gaps)}  seeds {len(seeds)}"
                print(f"{what}: {' '.join(key)}  {shown}")


if __name__ == "__main__":
    run(main)
