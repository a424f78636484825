"""How well does each proxy rank networks before fine-tuning?

    python experiments/proxy_fidelity.py --model resnet20 --weights FILE
    python experiments/proxy_fidelity.py --model resnet20 --weights FILE --budget macs=30% --training distilled
    python experiments/proxy_fidelity.py --model resnet20 --weights FILE --stages score    new proxies only

Stage `finetune`: 24 allocations that meet the budget are pruned (L1) and trained alike,
in one of the ways of `TRAININGS`. They are uniform, 18 random walks around uniform with
offsets of standard deviation 0.03 to 0.5, and the 5 best of 30 such walks with 0.05 to
0.2, by the loss on selection images that no proxy sees, reconstructed where a search
would reconstruct: the better half is dense, as it is when a search nears its end. What
they reach on the 10,000 test images judges the proxies; no network and no setting is
chosen by it.

Stage `score`: every entry of `proxies.PROXIES` scores every network as it is before
fine-tuning. Then the table of agreement is written for all networks measured so far. A
proxy on few images scores four disjoint sets of them: agreement is the mean over sets,
`noise` the deviation over sets of a network's score by that over networks of one set's,
and `noise_apart` the same once what moves all networks of a set alike is taken off.
`seconds` are processor time on one thread, from an allocation to its score.

Tables in `experiments/results`: `proxy_fidelity_runs.csv` (a row a trained network),
`proxy_fidelity_scores.csv` (network x proxy x set) and `proxy_fidelity.csv`
(agreement). A killed script goes on where it was. On one core, ResNet-20: about a
quarter of an hour to fine-tune and as much to score; ResNet-56: three times that.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from autoprune.config import (
    DataConfig,
    FinetuneConfig,
    NetworkConfig,
    SearchConfig,
    Settings,
)
from autoprune.costs.allocation import SearchSpace
from autoprune.costs.budget import Budget
from autoprune.evaluation.evaluate import accuracy, recalibrate
from autoprune.pipeline.context import Workspace
from autoprune.pipeline.methods.base import recalibrated, sliced
from autoprune.training.loop import finetune
from experiments.agreement import agreement
from experiments.proxies import N_SETS, PROXIES, SET_SIZE, Network, answer, score
from experiments.script import run
from experiments.tables import add_rows, holds, read_table, write_table

RESULTS = Path(__file__).parent / "results"
RUNS, SCORES, AGREEMENT = (
    RESULTS / f"proxy_fidelity{part}.csv" for part in ("_runs", "_scores", "")
)
RUN_FIELDS = (
    *("model", "budget", "training", "number", "kind", "spread", "seed"),
    *("kept", "macs_ratio", "accuracy", "seconds"),
)
SCORE_FIELDS = (
    "model",
    "budget",
    "number",
    "proxy",
    "set",
    "accuracy",
    "cross_entropy",
    "kl",
    "seconds",
)
AGREEMENT_FIELDS = (
    *(
        "model",
        "budget",
        "training",
        "proxy",
        "measure",
        "images",
        "passes",
        "sets",
        "tau",
        "tau_deviation",
    ),
    *("tau_better_half", "pearson", "seconds", "noise", "noise_apart"),
)


@dataclass(frozen=True)
class Training:
    """How pruned networks are trained before they are compared.

    Attributes:
        n_images: Training images.
        how: Epochs, learning rate, distillation.
        begin: The network of an allocation as the training finds it.
    """

    n_images: int
    how: FinetuneConfig
    begin: Callable[[Workspace, dict[str, int]], nn.Module]


TRAININGS = {
    "short": Training(
        10_000, FinetuneConfig(epochs=1, lr=0.05, distillation=0.0), recalibrated
    ),
    "distilled": Training(15_000, FinetuneConfig(epochs=2, lr=0.02), sliced),
}
"""A single harsh epoch without a teacher; and, as `autoprune run` trains, from solved
weights where they are better.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budget", default="macs=50%")
    parser.add_argument("--training", choices=TRAININGS, default="short")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("finetune", "score"),
        default=["finetune", "score"],
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        help="of fine-tuning; several are averaged",
    )
    args = parser.parse_args()

    data, search = (
        DataConfig("cifar10", proxy_images=N_SETS * SET_SIZE),
        SearchConfig(budget=args.budget),
    )
    network = Network(
        Workspace(Settings(NetworkConfig(args.model, args.weights), data, search))
    )
    if "finetune" in args.stages:
        for seed in args.seeds:
            train_all(network, args.training, seed)
    if "score" in args.stages:
        if not holds(RUNS, network.cell):
            parser.error(
                f"--stages: no {args.model} is trained at {args.budget} yet; give "
                f"finetune too"
            )
        score_all(network)
        write_table(
            AGREEMENT, agreement(read_table(RUNS), read_table(SCORES)), AGREEMENT_FIELDS
        )


@dataclass(frozen=True)
class Candidate:
    """An allocation whose network is fine-tuned.

    Attributes:
        kind: How it was found.
        spread: Standard deviation of the offsets from uniform.
        counts: Kept channels in the order of the prunable groups.
    """

    kind: str
    spread: float
    counts: tuple[int, ...]


def train_all(network: Network, training: str, seed: int) -> None:
    """Adds the networks that the table lacks, one by one."""
    cells = (
        network.cell | {"training": training, "number": number, "seed": seed}
        for number in range(24)
    )
    missing = [cell for cell in cells if not holds(RUNS, cell)]
    chosen = candidates(network) if missing else []
    for cell in missing:
        row = cell | trained(network, chosen[cell["number"]], TRAININGS[training], seed)
        add_rows(RUNS, [row], RUN_FIELDS)
        print(row, flush=True)


def candidates(network: Network) -> list[Candidate]:
    """The 24 allocations, all different, the same for the same network."""
    space, generator = network.space, np.random.default_rng(0)
    target = Budget.parse(network.budget).target(space.costs)
    uniform = tuple(map(int, space.uniform(target)))
    seen = {uniform}

    def walks(kind: str, spreads: np.ndarray) -> Iterator[Candidate]:
        for spread in map(float, spreads):
            while (counts := around_uniform(space, target, spread, generator)) in seen:
                pass
            seen.add(counts)
            yield Candidate(kind, round(spread, 3), counts)

    drawn = list(walks("random", np.geomspace(0.03, 0.5, 18)))
    tried = list(walks("best of 30", np.linspace(0.05, 0.2, 30)))
    exam = network.exam(network.workspace.splits.selection[:500])
    calibration = network.workspace.splits.selection[500:1000].inputs

    evenly = Candidate("uniform", 0.0, uniform)
    reconstructed = (
        network.workspace.proxy().suited_to(kept_of(network, evenly)).reconstructs
    )

    def loss(candidate: Candidate) -> float:
        model = network.lay(kept_of(network, candidate), reconstructed)
        recalibrate(model, calibration, bf16="auto")
        return exam.measure(answer(model, exam.inputs, "auto"))["cross_entropy"]

    return [evenly, *drawn, *sorted(tried, key=loss)[:5]]


def around_uniform(
    space: SearchSpace, target: int, spread: float, generator: np.random.Generator
) -> tuple[int, ...]:
    """Counts of a walk whose wishes are uniform-to-go and a random offset."""
    counts = space.allocate(
        target, lambda index, uniform: uniform + generator.normal(0, spread)
    )
    return tuple(map(int, counts))


def kept_of(network: Network, candidate: Candidate) -> dict[str, int]:
    return dict(zip(network.space.costs.names, candidate.counts, strict=True))


def trained(
    network: Network, candidate: Candidate, training: Training, seed: int
) -> dict:
    """Prunes, trains and reads the test split; what a row has beside its cell."""
    workspace, kept, started = (
        network.workspace,
        kept_of(network, candidate),
        time.process_time(),
    )
    model = training.begin(workspace, kept)
    finetune(
        model,
        workspace.splits.train[: training.n_images],
        training.how,
        seed,
        workspace.dense,
    )
    seconds = time.process_time() - started
    return {
        "kind": candidate.kind,
        "spread": candidate.spread,
        "kept": json.dumps(kept),
        "macs_ratio": round(
            workspace.costs.macs(kept) / workspace.costs.macs(workspace.costs.dense), 5
        ),
        "accuracy": accuracy(model, workspace.splits.test),
        "seconds": round(seconds, 1),
    }


def score_all(network: Network) -> None:
    """Adds the scores that the table lacks, network by network."""
    rows = [
        row
        for row in read_table(RUNS)
        if all(row[key] == value for key, value in network.cell.items())
    ]
    for number, kept in {
        row["number"]: json.loads(row["kept"]) for row in rows
    }.items():
        cell = network.cell | {"number": number}
        missing = [
            name for name in PROXIES if not holds(SCORES, cell | {"proxy": name})
        ]
        scored = [cell | row for row in scores(network, kept, missing)]
        add_rows(SCORES, scored, SCORE_FIELDS)
        print(*cell.values(), len(scored), flush=True)


def scores(network: Network, kept: dict[str, int], names: list[str]) -> Iterator[dict]:
    """A row a proxy and set; what it has beside its cell."""
    for name in names:
        proxy = PROXIES[name]
        for number, part in enumerate(proxy.sets):
            exam = getattr(network, proxy.split)[part]
            measured, seconds = score(network, kept, proxy, part, exam)
            rounded = {measure: round(value, 5) for measure, value in measured.items()}
            yield {"proxy": name, "set": number, "seconds": round(seconds, 4)} | rounded


if __name__ == "__main__":
    run(main)
