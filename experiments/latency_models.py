"""How well is the latency of networks predicted that nobody has measured?

    python -m experiments.latency_models --models resnet56 mobilenet_v2 --batches 1 32
    python -m experiments.latency_models --summary

A model is fitted as a run with a budget of latency does it: 24 pruned networks, more
where it errs. Its error is that on 8 others. Beside it stand, fitted to the same
networks and held against the same others, a line over MACs, which is what tools
interpolate; and the sum of the times that the layers take alone, as tables of layers
have it, as a share of the dense network's sum. Weights are random, which makes no
difference to the time. One row each in `experiments/results/latency_models.csv`; rows
that are there aren't measured again. Nothing else should run meanwhile.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.config import LatencyConfig
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.costs.widths import suited_multiples
from autoprune.latency.engine_protocol import Engine, Setting
from autoprune.latency.engines import ENGINES, check_setting, engine_named, setting_of
from autoprune.latency.model import PredictionError
from autoprune.latency.profiling import (
    Measured,
    NetworkTimer,
    profile_latency,
)
from autoprune.latency.timing import time_in_turns
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace
from experiments.latency_networks import NETWORKS
from experiments.tables import all_cells, fill_table, read_table

TABLE = Path(__file__).parent / "results" / "latency_models.csv"
KEY = ("model", "engine", "batch", "threads")
FIELDS = (
    *KEY,
    "networks",
    "seconds",
    "dense_ms",
    "tile",
    "median",
    "p95",
    "macs_median",
    "macs_p95",
    "alone_median",
    "alone_p95",
    "measured",
)
SECONDS_ALONE = 0.05
"""For each layer that is timed alone."""


def main() -> None:
    """Measures what the table lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=["onnxruntime", "torch", "openvino"],
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.summary:
        torch.set_num_threads(args.threads)
        cells = all_cells(
            {
                "model": args.models,
                "engine": args.engines,
                "batch": args.batches,
                "threads": [args.threads],
            }
        )
        fill_table(TABLE, cells, measure, FIELDS)
    for row in read_table(TABLE):
        print(" ".join(f"{name}={row[name]}" for name in FIELDS))


def measure(cell: dict) -> dict[str, str]:
    """The errors of three ways to predict one network's latency.

    Args:
        cell: Which network, engine, batch and number of threads.

    Returns:
        The row without its cell.
    """
    config = LatencyConfig(cell["engine"], cell["batch"], cell["threads"])
    setting = setting_of(config)
    check_setting(setting)
    torch.manual_seed(0)
    network = NETWORKS[cell["model"]]
    model = network.make().eval()
    example = torch.randn(1, 3, network.side, network.side)
    groups = trace(model, example, verify=False)
    engine = engine_named(setting.engine)
    tile = engine.tile(setting.precision)
    costs = CostTable(groups)
    space = SearchSpace(costs, round_to=suited_multiples(groups, tile))
    started = datetime.now(UTC)
    timer = NetworkTimer(model, groups, example, engine, setting)
    profile = profile_latency(timer, space)
    seconds = (datetime.now(UTC) - started).total_seconds()
    by_macs = _by_macs(costs, profile.fitted, profile.unseen)
    alone = _alone(model, groups, example, engine, setting, profile.unseen)
    return {
        "networks": str(profile.model.n_fitted),
        "seconds": f"{seconds:.0f}",
        "dense_ms": f"{1e3 * profile.model.dense_seconds:.2f}",
        "tile": str(profile.model.fit.rounding.tile),
        "median": f"{profile.model.error.median:.4f}",
        "p95": f"{profile.model.error.largest:.4f}",
        "macs_median": f"{by_macs.median:.4f}",
        "macs_p95": f"{by_macs.largest:.4f}",
        "alone_median": f"{alone.median:.4f}",
        "alone_p95": f"{alone.largest:.4f}",
        "measured": f"{started:%Y-%m-%d %H:%M}",
    }


def _by_macs(costs: CostTable, fitted: Measured, unseen: Measured) -> PredictionError:
    """A line over MACs, its errors relative like those of the model."""
    design = np.stack([costs.macs(fitted.kept), np.ones(len(fitted.kept))], 1)
    weighted = design / fitted.shares[:, None]
    line, *_ = np.linalg.lstsq(weighted, np.ones(len(weighted)), rcond=None)
    predicted = costs.macs(unseen.kept) * line[0] + line[1]
    return PredictionError.of(predicted, unseen.shares)


def _alone(
    model: nn.Module,
    groups: Groups,
    example: Tensor,
    engine: Engine,
    setting: Setting,
    unseen: Measured,
) -> PredictionError:
    """The sum of what layers take alone, as a share of the dense network's sum."""
    known: dict[tuple[str, tuple[int, ...]], float] = {}

    def total(network: nn.Module) -> float:
        seconds = 0.0
        for layer, x in _layers(network, example):
            # Layers that print alike on inputs of one shape take the same time.
            key = (str(layer), tuple(x.shape))
            if key not in known:
                loaded = engine.load(layer, x, setting)
                known[key] = time_in_turns([loaded], SECONDS_ALONE).medians[0]
            seconds += known[key]
        return seconds

    dense = total(model)
    predicted = []
    for kept in unseen.kept:
        channels = {}
        for group, count in zip(groups, kept.tolist(), strict=True):
            channels[group.name] = torch.arange(count)
        predicted.append(total(prune(model, groups, channels)) / dense)
    return PredictionError.of(np.array(predicted), unseen.shares)


@torch.no_grad()
def _layers(network: nn.Module, example: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """The convolutions and linear layers, each with an input of one sample."""
    found = []
    handles = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            handles.append(
                module.register_forward_hook(
                    lambda module, inputs, _: found.append((module, inputs[0]))
                )
            )
    network.eval()(example)
    for handle in handles:
        handle.remove()
    return found


if __name__ == "__main__":
    main()
