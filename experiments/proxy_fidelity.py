r"""How well does each proxy rank networks before fine-tuning?

    python -m experiments.proxy_fidelity --model resnet20 --weights FILE
    python -m experiments.proxy_fidelity --model resnet20 --weights FILE \
        --budget macs=30% --training distilled
    python -m experiments.proxy_fidelity --model resnet20 --weights FILE \
        --stages score                                          new proxies only

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
from autoprune.costs.budget import Budget
from autoprune.costs.search_space import SearchSpace
from autoprune.evaluation.evaluate import accuracy, recalibrate
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods.channels import recalibrated, sliced
from autoprune.training.loop import finetune
from experiments.agreement import agreement
from experiments.proxies import N_SETS, PROXIES, SET_SIZE, Network, answer, score
from experiments.script import run
from experiments.tables import add_rows, has_row, read_table, write_table

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "proxy_fidelity_runs.csv"
SCORES = RESULTS / "proxy_fidelity_scores.csv"
AGREEMENT = RESULTS / "proxy_fidelity.csv"
RUN_FIELDS = (
    "model",
    "budget",
    "training",
    "number",
    "kind",
    "spread",
    "seed",
    "kept",
    "macs_ratio",
    "accuracy",
    "seconds",
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
    "tau_better_half",
    "pearson",
    "seconds",
    "noise",
    "noise_apart",
)
N_CANDIDATES = 24
"""Allocations whose networks are trained."""


@dataclass(frozen=True)
class Training:
    """How pruned networks are trained before they are compared.

    Attributes:
        n_images: Training images.
        config: Epochs, learning rate, distillation.
        begin: The network of an allocation as the training finds it.
    """

    n_images: int
    config: FinetuneConfig
    begin: Callable[[RunContext, dict[str, int]], nn.Module]


TRAININGS = {
    "short": Training(
        10_000, FinetuneConfig(epochs=1, lr=0.05, distillation=0.0), recalibrated
    ),
    "distilled": Training(15_000, FinetuneConfig(epochs=2, lr=0.02), sliced),
}
"""A single harsh epoch without a teacher; and as `autoprune run` trains.

That begins with solved weights where they are better.
"""


def main() -> None:
    """Measures what the tables lack, and writes the agreement."""
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

    settings = Settings(
        NetworkConfig(args.model, args.weights),
        DataConfig("cifar10", proxy_images=N_SETS * SET_SIZE),
        SearchConfig(budget=args.budget),
    )
    network = Network(RunContext(settings))
    if "finetune" in args.stages:
        for seed in args.seeds:
            train_all(network, args.training, seed)
    if "score" in args.stages:
        if not has_row(RUNS, network.cell):
            parser.error(
                f"--stages: no {args.model} is trained at {args.budget} yet; give "
                f"finetune too"
            )
        score_all(network)
        rows = agreement(read_table(RUNS), read_table(SCORES))
        write_table(AGREEMENT, rows, AGREEMENT_FIELDS)


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
    """Adds the networks that the table lacks, one by one.

    Args:
        network: The dense network and its images.
        training: A key of `TRAININGS`.
        seed: Of the training.
    """
    missing = {}
    for number in range(N_CANDIDATES):
        cell = network.cell | {"training": training, "number": number, "seed": seed}
        if not has_row(RUNS, cell):
            missing[number] = cell
    chosen = candidates(network) if missing else []
    for number, cell in missing.items():
        row = cell | train(network, chosen[number], TRAININGS[training], seed)
        add_rows(RUNS, [row], RUN_FIELDS)
        print(row, flush=True)


def candidates(network: Network) -> list[Candidate]:
    """The 24 allocations, all different, the same for the same network."""
    space = network.space
    generator = np.random.default_rng(0)
    target = Budget.parse(network.budget).target(space.costs)
    uniform = tuple(map(int, space.uniform(target)))
    seen = {uniform}

    def walks(kind: str, spreads: np.ndarray) -> Iterator[Candidate]:
        for spread in map(float, spreads):
            counts = around_uniform(space, target, spread, generator)
            while counts in seen:
                counts = around_uniform(space, target, spread, generator)
            seen.add(counts)
            yield Candidate(kind, round(spread, 3), counts)

    drawn = list(walks("random", np.geomspace(0.03, 0.5, 18)))
    tried = list(walks("best of 30", np.linspace(0.05, 0.2, 30)))
    exam = network.exam(network.context.splits.selection[:500])
    calibration = network.context.splits.selection[500:1000].inputs

    evenly = Candidate("uniform", 0.0, uniform)
    suited = network.context.proxy().suited_to(kept_of(network, evenly))
    reconstructed = suited.reconstructs

    def loss(candidate: Candidate) -> float:
        model = network.sub_model(kept_of(network, candidate), reconstructed)
        recalibrate(model, calibration, bf16="auto")
        return exam.measure(answer(model, exam.inputs, "auto"))["cross_entropy"]

    return [evenly, *drawn, *sorted(tried, key=loss)[:5]]


def around_uniform(
    space: SearchSpace, target: int, spread: float, generator: np.random.Generator
) -> tuple[int, ...]:
    """Counts of a walk that asks for uniform-to-go and a random offset.

    Args:
        space: The allocations.
        target: The cost to meet.
        spread: Standard deviation of the offsets, in sparsity.
        generator: Draws them.
    """
    counts = space.allocate(
        target, lambda index, uniform: uniform + generator.normal(0, spread)
    )
    return tuple(map(int, counts))


def kept_of(network: Network, candidate: Candidate) -> dict[str, int]:
    """Group to kept channels.

    Args:
        network: The dense network.
        candidate: The allocation.
    """
    return dict(zip(network.space.costs.names, candidate.counts, strict=True))


def train(
    network: Network, candidate: Candidate, training: Training, seed: int
) -> dict:
    """Prunes, trains and reads the test split.

    Args:
        network: The dense network and its images.
        candidate: The allocation.
        training: How its network is trained.
        seed: Of the training.

    Returns:
        The row without its cell.
    """
    context = network.context
    kept = kept_of(network, candidate)
    started = time.process_time()
    model = training.begin(context, kept)
    images = context.splits.train[: training.n_images]
    finetune(model, images, training.config, seed, context.dense)
    seconds = time.process_time() - started
    macs_ratio = context.costs.macs(kept) / context.costs.macs(context.costs.dense)
    return {
        "kind": candidate.kind,
        "spread": candidate.spread,
        "kept": json.dumps(kept),
        "macs_ratio": round(macs_ratio, 5),
        "accuracy": accuracy(model, context.splits.test),
        "seconds": round(seconds, 1),
    }


def score_all(network: Network) -> None:
    """Adds the scores that the table lacks, network by network."""
    kept_by_number: dict[str, dict[str, int]] = {}
    for row in read_table(RUNS):
        if all(row[key] == value for key, value in network.cell.items()):
            kept_by_number[row["number"]] = json.loads(row["kept"])
    for number, kept in kept_by_number.items():
        cell = network.cell | {"number": number}
        missing = []
        for name in PROXIES:
            if not has_row(SCORES, cell | {"proxy": name}):
                missing.append(name)
        rows = [cell | row for row in scores(network, kept, missing)]
        add_rows(SCORES, rows, SCORE_FIELDS)
        print(*cell.values(), len(rows), flush=True)


def scores(network: Network, kept: dict[str, int], names: list[str]) -> Iterator[dict]:
    """A row a proxy and set, without its cell.

    Args:
        network: The dense network and its images.
        kept: Group to kept channels.
        names: The proxies.
    """
    for name in names:
        proxy = PROXIES[name]
        for number, part in enumerate(proxy.sets):
            exam = getattr(network, proxy.split)[part]
            measured, seconds = score(network, kept, proxy, part, exam)
            rounded = {measure: round(value, 5) for measure, value in measured.items()}
            yield {"proxy": name, "set": number, "seconds": round(seconds, 4)} | rounded


if __name__ == "__main__":
    run(main)
