r"""How many candidates a second does the proxy score?

    python -m experiments.bench_search --model resnet56 --weights FILE \
        --budget macs=50% --json

Beside other people's evaluations and the bare forward pass. The contenders take turns
on the same network, images and machine. Each repetition has allocations of its own,
random walks close around uniform that meet the budget:

- `autoprune`: `ProxyAccuracy` with its default configuration, handed batches of 10
  different allocations;
- `floor`: nothing but the forward passes of the networks that `autoprune` has just
  scored, pruned beforehand, each run once before; in eval mode, on the same images, in
  the same precision, as many at once, one thread each;
- `slicing`: nothing but laying these sub-models into a reused copy, on one thread: a
  part of ours, no evaluation;
- `torch_pruning`, `amc_style`, `eagleeye_style`: see `experiments/rival_proxies.py`.
  Torch-Pruning has allocations of its own, at the same budget, that leave whole what it
  can't prune.

One row a contender is added to `experiments/results/bench_search.csv`: `images` pass
through the network for one candidate, `threads` is candidates at once x threads of
each, seconds are per candidate, and `ratio` is the proxy's candidates a second over the
contender's, in the median of the repetitions. `--quick` runs a tenth of AMC's and
EagleEye's batches and scales the seconds up (`share_run`). ResNet-56: a few minutes on
2 idle cores.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from autoprune.config import DataConfig, NetworkConfig, Settings
from autoprune.costs.budget import Budget
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.evaluation.precision import autocast
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.evaluation.workers import available_cores, one_thread_each
from autoprune.pipeline.context import RunContext
from autoprune.reporting.console import say
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import Slicer, top_channels
from experiments import rival_proxies
from experiments.rival_proxies import Contender, Draws, Ground, KeptCounts, one_by_one
from experiments.script import run
from experiments.tables import add_rows

FIELDS = (
    "run",
    "model",
    "budget",
    "contender",
    "images",
    "batch",
    "precision",
    "threads",
    "share_run",
    "repeats",
    "seconds_median",
    "seconds_min",
    "seconds_max",
    "candidates_per_second",
    "ratio",
)
BATCH = 10
"""Allocations that the proxy is handed at once."""
SPREAD = 0.1
"""Deviation of the walks from uniform, in sparsity."""
N_TORCH_PRUNING = 3
"""Candidates of Torch-Pruning in a repetition; AMC and EagleEye score one."""
QUICK_SHARE = 0.1
"""Share of their batches that AMC and EagleEye run with --quick."""

NOTES = (
    "ratio: candidates a second of autoprune over the contender's; "
    "threads: candidates at once x threads of each\n"
    "slicing: {slicing_ms} ms a candidate, {slicing_share:.1%} of what a core spends "
    "on one\n"
    "amc_style, eagleeye_style: scored in batches of {amc_style_batch}, the fastest\n"
    "torch_pruning: its networks have {torch_pruning_macs_ratio:.1%} of the MACs, "
    "ours {macs_ratio:.1%}; it leaves whole\n"
    "  {torch_pruning_leaves_whole} (made by several layers; where padded shortcuts "
    "add to them, what it prunes can't run)"
)
QUICK_NOTE = (
    f"amc_style, eagleeye_style: extrapolated from {QUICK_SHARE:.0%} of their batches"
)


def main() -> None:
    """Times all contenders, adds their rows, and prints what came out."""
    args = arguments()
    images = DataConfig("cifar10", proxy_images=rival_proxies.EAGLEEYE_IMAGES)
    context = RunContext(Settings(NetworkConfig(args.model, args.weights), images))
    ground = Ground.from_context(context, QUICK_SHARE if args.quick else 1.0)
    proxy = context.proxy()
    assert isinstance(proxy, ProxyAccuracy), "channels are pruned, nothing is scaled"
    restricted = rival_proxies.cut_by_layer(ground.groups)
    n_torch_pruning = min(N_TORCH_PRUNING, args.candidates)
    *drawn, spare = draw(ground.groups, args, args.candidates)
    *by_layer, spare_by_layer = draw(restricted, args, n_torch_pruning)

    sliced = ground.sliced(spare[0])
    rival = rival_proxies.prune_with_torch_pruning(ground, spare_by_layer[0])
    proxy(spare[0])  # so that what is done once for all candidates is done
    contenders = ours(ground, proxy, drawn) | rival_proxies.rivals(
        ground, proxy.config.images, drawn, by_layer
    )
    seconds = measure(contenders, args.repeats)
    rows = []
    for name, contender in contenders.items():
        rows.append(make_row(args, name, contender, seconds))
    add_rows(args.out, rows, FIELDS)
    left_whole = ground.groups.channels.keys() - restricted.channels.keys()
    results = summary(args, seconds) | {
        "amc_style_batch": contenders["amc_style"].batch,
        "macs_ratio": ground.macs_ratio(sliced),
        "torch_pruning_macs_ratio": ground.macs_ratio(rival),
        "torch_pruning_leaves_whole": sorted(left_whole),
    }
    describe(rows, results)
    if args.json:
        print(json.dumps(results))


def arguments() -> argparse.Namespace:
    """The script's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budget", type=Budget.parse, default="macs=50%")
    parser.add_argument(
        "--candidates",
        type=int,
        default=2 * BATCH,
        help="that the proxy scores in a repetition",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="extrapolate AMC and EagleEye from a tenth"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "bench_search.csv",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    return parser.parse_args()


def draw(
    groups: Groups, args: argparse.Namespace, candidates: int
) -> list[Sequence[KeptCounts]]:
    """Different allocations at the budget, close around uniform.

    Args:
        groups: The groups that may be pruned.
        args: The script's arguments.
        candidates: Allocations of a repetition.

    Returns:
        Those of each repetition, and once more as many to warm up.
    """
    space = SearchSpace(CostTable(groups), args.budget.metric)
    target = args.budget.target(space.costs)
    rng = np.random.default_rng(args.seed)
    space.check(target, args.budget)
    different: dict[tuple[int, ...], KeptCounts] = {}
    while len(different) < candidates * (args.repeats + 1):
        kept = space.allocate(
            target, lambda _, uniform: uniform + rng.normal(0, SPREAD)
        ).tolist()
        different[tuple(kept)] = dict(zip(space.costs.names, kept, strict=True))
    return in_parts(list(different.values()), candidates)


def in_parts(items: Sequence, size: int) -> list[Sequence]:
    """Parts of a sequence, the last one maybe shorter.

    Args:
        items: The sequence.
        size: Items a part.
    """
    return [items[start : start + size] for start in range(0, len(items), size)]


def ours(ground: Ground, proxy: ProxyAccuracy, drawn: Draws) -> dict[str, Contender]:
    """The proxy, and what it can't do without.

    It is first in every repetition, so that none has warmed up its networks.

    Args:
        ground: Network and images.
        proxy: The proxy.
        drawn: The allocations of each repetition.
    """
    images = proxy.config.images
    slicer = Slicer(ground.model, ground.groups, borrow=True)
    threads = f"{proxy.n_workers}x1"
    return {
        "autoprune": Contender(
            images=images,
            batch=images,
            precision=precision(proxy),
            threads=threads,
            drawn=drawn,
            seconds=lambda allocations: 1 / candidates_per_second(proxy, allocations),
        ),
        "floor": Contender(
            images=images,
            batch=images,
            precision=precision(proxy),
            threads=threads,
            drawn=drawn,
            seconds=lambda allocations: floor(ground, proxy, allocations),
        ),
        "slicing": Contender(
            images=0,
            batch=0,
            precision="float32",
            threads="1x1",
            drawn=drawn,
            seconds=one_by_one(slicing, slicer, ground),
        ),
    }


def candidates_per_second(
    proxy: ProxyAccuracy, allocations: Sequence[KeptCounts]
) -> float:
    """How fast the proxy scores allocations, handed to it in batches.

    What it finds in its cache doesn't count.

    Args:
        proxy: The proxy.
        allocations: What it scores.
    """
    before = proxy.evaluations
    started = time.perf_counter()
    for batch in in_parts(allocations, BATCH):
        proxy.score_all(batch)
    return (proxy.evaluations - before) / (time.perf_counter() - started)


def floor(
    ground: Ground, proxy: ProxyAccuracy, allocations: Sequence[KeptCounts]
) -> float:
    """Seconds per candidate of the bare forward passes, pruned beforehand.

    Args:
        ground: Network and images.
        proxy: Says how many images, in what precision, how many networks at once.
        allocations: What is pruned.
    """
    networks = [ground.sliced(kept) for kept in allocations]
    inputs = ground.inputs[: proxy.config.images]

    @torch.inference_mode()
    def forward(network: nn.Module) -> None:
        with autocast(proxy.config.bf16):
            network(inputs)

    with one_thread_each(proxy.n_workers) as pool:
        list(pool.map(forward, networks))
        started = time.perf_counter()
        for batch in in_parts(networks, BATCH):
            list(pool.map(forward, batch))
        seconds = time.perf_counter() - started
    return seconds / len(networks)


def slicing(slicer: Slicer, ground: Ground, kept: KeptCounts) -> float:
    """Seconds of laying a candidate's channels into the reused copy.

    Args:
        slicer: Holds the copy.
        ground: Has the channels' importance.
        kept: The allocation.
    """
    started = time.perf_counter()
    slicer.apply(top_channels(ground.importance, kept))
    return time.perf_counter() - started


def precision(proxy: ProxyAccuracy) -> str:
    """In what precision the proxy's networks compute here."""
    with autocast(proxy.config.bf16):
        return "bf16" if torch.is_autocast_enabled("cpu") else "float32"


def measure(
    contenders: Mapping[str, Contender], repeats: int
) -> dict[str, list[float]]:
    """Seconds per candidate of each contender at each repetition, all in turns.

    Args:
        contenders: By name.
        repeats: Repetitions.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repeats):
        for name, contender in contenders.items():
            seconds[name].append(contender.seconds(contender.drawn[repetition]))
        latest = ", ".join(f"{name} {times[-1]:.4f}" for name, times in seconds.items())
        say(
            f"repetition {repetition + 1} of {repeats}, seconds per candidate: {latest}"
        )
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str) -> float:
    """The proxy's candidates a second over a contender's, median over repetitions.

    Args:
        seconds: As `measure` returns them.
        name: The contender's.
    """
    pairs = zip(seconds["autoprune"], seconds[name], strict=True)
    return round(median(theirs / ours for ours, theirs in pairs), 4)


def make_row(
    args: argparse.Namespace,
    name: str,
    contender: Contender,
    seconds: Mapping[str, list[float]],
) -> dict:
    """A contender's line in the table.

    Args:
        args: The script's arguments.
        name: The contender's.
        contender: What it does.
        seconds: As `measure` returns them.
    """
    times = seconds[name]
    return {
        "run": datetime.now().isoformat(timespec="minutes"),
        "model": args.model,
        "budget": args.budget,
        "contender": name,
        "repeats": args.repeats,
        "images": contender.images,
        "batch": contender.batch,
        "precision": contender.precision,
        "threads": contender.threads,
        "share_run": contender.share_run,
        "seconds_median": round(median(times), 6),
        "seconds_min": round(min(times), 6),
        "seconds_max": round(max(times), 6),
        "candidates_per_second": round(1 / median(times), 3),
        "ratio": ratio(seconds, name),
    }


def summary(args: argparse.Namespace, seconds: Mapping[str, list[float]]) -> dict:
    """What was measured, for --json.

    Args:
        args: The script's arguments.
        seconds: As `measure` returns them.
    """
    rivals = "amc_style", "eagleeye_style", "torch_pruning", "floor"
    return {
        "model": args.model,
        "budget": str(args.budget),
        "candidates_per_second": round(1 / median(seconds["autoprune"]), 3),
        **{f"ratio_{name}": ratio(seconds, name) for name in rivals},
        "slicing_ms": round(median(seconds["slicing"]) * 1000, 3),
        "slicing_share": round(ratio(seconds, "slicing") / available_cores(), 4),
        "extrapolated": args.quick,
        "machine": {
            "cpus": available_cores(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def describe(rows: Sequence[Mapping], results: Mapping) -> None:
    """The rows as a table on stdout, and what to know about them.

    Args:
        rows: As in the table of results.
        results: As for --json.
    """
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    print(
        f"{results['model']} at {results['budget']}; {machine}; seconds per candidate: "
        f"median (min to max)"
    )
    for row in rows:
        kind = (
            f"{row['contender']:15}{row['images']:6} images  {row['precision']:8}"
            f"{row['threads']:>4}"
        )
        times = (
            f"{row['seconds_median']:9.4f} ({row['seconds_min']:.4f} to "
            f"{row['seconds_max']:.4f})"
        )
        print(
            f"{kind}{times:30}{row['candidates_per_second']:9.2f} a second, ratio "
            f"{row['ratio']:.3f}"
        )
    print(NOTES.format(**results))
    if results["extrapolated"]:
        print(QUICK_NOTE)


if __name__ == "__main__":
    run(main)
