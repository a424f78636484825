"""Measuring a few dozen pruned networks in an engine, and a model fitted to them.

Whole pruned networks are measured, in which every layer runs in its real neighbourhood:
layers timed alone know nothing of fused operations, of layouts that are kept from one
layer to the next, or of what is still in a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from autoprune.costs.search_space import SearchSpace
from autoprune.errors import UserError
from autoprune.latency.engine_protocol import Engine, Loaded, Setting
from autoprune.latency.fitting import fit_times
from autoprune.latency.kernels import WorkTable
from autoprune.latency.model import LatencyModel, PredictionError
from autoprune.latency.sampling import neighbours, spread_allocations
from autoprune.latency.timing import time_in_turns
from autoprune.structure.groups import Groups
from autoprune.structure.inputs import Example
from autoprune.structure.slicing import prune

N_FITTED = 24
"""Networks that a model is fitted to at first."""
N_UNSEEN = 8
"""Networks that only tell how good it is."""
N_MORE = 8
"""Networks that are measured beside where it errs most, at a time."""
LARGEST_ERROR = 0.05
"""Median error above which more networks are measured."""
MOST_ATTEMPTS = 3
"""Fits, each to more networks, until the error has to be lived with."""
LARGEST_NOISE = 0.15
"""How far two timings of the same network may be apart; no model fits beyond that."""
IN_TURNS = 4
"""Pruned networks that are in the engine at once, beside the dense one."""
SECONDS = 60.0
"""Most time for the passes of all networks together, loading them aside."""
ROUNDS = 150
"""Passes of each network that are enough, where they are short."""


@dataclass(frozen=True)
class Measured:
    """Pruned networks that were timed in turns with the dense one.

    Attributes:
        kept: Their counts, `(n, n_groups)`.
        shares: Their times as shares of the dense network's, `(n,)`.
        dense_seconds: The dense network's time.
        noise: By how much, as a share, two timings of the dense network differ.
    """

    kept: np.ndarray
    shares: np.ndarray
    dense_seconds: float
    noise: float

    def part(self, rows: slice) -> "Measured":
        """Some of the networks.

        Args:
            rows: Which.
        """
        return replace(self, kept=self.kept[rows], shares=self.shares[rows])

    def joined(self, other: "Measured") -> "Measured":
        """Both together, with the dense time and the noise of the first."""
        return Measured(
            np.concatenate([self.kept, other.kept]),
            np.concatenate([self.shares, other.shares]),
            self.dense_seconds,
            self.noise,
        )


@dataclass(frozen=True)
class Profile:
    """A fitted model, and the networks behind it.

    Attributes:
        model: The model.
        fitted: The networks that it was fitted to.
        unseen: Those that its error is about.
    """

    model: LatencyModel
    fitted: Measured
    unseen: Measured


class NetworkTimer:
    """Times pruned networks of one dense network in an engine.

    Args:
        model: The dense network; it is left as found.
        groups: Its trace.
        example: Its inputs, as `trace` takes them.
        engine: What runs the networks.
        setting: Batch, threads and precision.

    Raises:
        ExportError: If the engine can't express the network.
        UserError: If it can't run it, or gives other answers.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        example: Example,
        engine: Engine,
        setting: Setting,
    ) -> None:
        self.model = model
        self.groups = groups
        self.example = example
        self.engine = engine
        self.setting = setting
        self._dense = engine.load(model, example, setting)
        # The first pass takes longer than any other.
        self._dense.seconds()
        self._seconds_of_pass = self._dense.seconds()

    def measure(
        self,
        kept: np.ndarray,
        seconds: float,
        on_network: Callable[[int], None] = lambda n_networks: None,
    ) -> Measured:
        """Times allocations in turns with the dense network, a few at a time.

        Args:
            kept: Counts `(n, n_groups)`.
            seconds: For all passes together, unless `ROUNDS` of each take less.
            on_network: Told how many networks more are done.
        """
        enough = ROUNDS * self._seconds_of_pass * len(kept)
        seconds = min(seconds, enough)
        shares = []
        dense_seconds = []
        noises = []
        for start in range(0, len(kept), IN_TURNS):
            block = kept[start : start + IN_TURNS]
            # The dense network is first and last: what differs between them is noise.
            networks = [self._dense, *map(self._load, block), self._dense]
            turns = time_in_turns(networks, seconds * len(block) / len(kept))
            shares += turns.ratios[1:-1].tolist()
            dense_seconds.append(turns.medians[0])
            noises.append(abs(turns.ratios[-1] - 1))
            on_network(len(block))
        return Measured(
            kept,
            np.array(shares),
            float(np.median(dense_seconds)),
            float(np.median(noises)),
        )

    def _load(self, kept: np.ndarray) -> Loaded:
        channels = {}
        for group, count in zip(self.groups, kept.tolist(), strict=True):
            # Which channels they are makes no difference to the time.
            channels[group.name] = torch.arange(count)
        pruned = prune(self.model, self.groups, channels)
        return self.engine.load(pruned, self.example, self.setting)


def profile_latency(
    timer: NetworkTimer,
    space: SearchSpace,
    seed: int = 0,
    seconds: float = SECONDS,
    on_network: Callable[[int], None] = lambda n_networks: None,
) -> Profile:
    """Fits a model of the latency to a few dozen measured networks.

    Where its median error on unseen networks is above 5 %, more networks are measured,
    near those that it predicts worst.

    Args:
        timer: The network in its engine.
        space: The allocations that the model is for; of any metric.
        seed: What the allocations are drawn with.
        seconds: Most time for all passes of the first attempt, loading the networks
            aside.
        on_network: Told how many networks more of the first attempt are done.

    Raises:
        UserError: If timings of the same network differ so much that no model fits.
    """
    generator = np.random.default_rng(seed)
    work = WorkTable(timer.groups, space.costs)
    per_network = seconds / (N_FITTED + N_UNSEEN)
    corners = np.stack([space.high, space.low])
    fitted_kept = spread_allocations(space, N_FITTED - len(corners), generator)
    unseen_kept = spread_allocations(space, N_UNSEEN, generator)
    # Together, so that both see the same machine.
    first = timer.measure(
        np.concatenate([corners, fitted_kept, unseen_kept]), seconds, on_network
    )
    if first.noise > LARGEST_NOISE:
        raise UserError(
            "latency",
            f"two timings of the same network differ by {first.noise:.0%} "
            f"({timer.setting}), the limit is {LARGEST_NOISE:.0%}; close what else "
            f"runs on this machine, or budget macs",
        )
    fitted = first.part(slice(None, N_FITTED))
    unseen = first.part(slice(N_FITTED, None))
    tile = timer.engine.tile(timer.setting.precision)
    attempt = 1
    while True:
        fit = fit_times(work, fitted.kept, fitted.shares, tile)
        predicted = fit.predict(work, unseen.kept)
        error = PredictionError.of(predicted, unseen.shares)
        if error.median <= LARGEST_ERROR or attempt == MOST_ATTEMPTS:
            break
        errors = np.abs(predicted / unseen.shares - 1)
        worst = np.argsort(-errors, kind="stable")[:N_MORE]
        nearby = neighbours(space, unseen.kept[worst], generator)
        more = timer.measure(nearby, per_network * len(nearby))
        fitted = fitted.joined(more)
        attempt += 1
    model = LatencyModel(
        timer.setting, work, fit, first.dense_seconds, error, len(fitted.shares)
    )
    return Profile(model, fitted, unseen)
