"""Depth, image size and widths removed together.

An agent searches them, or a model of the accuracy places them: Wang et al., "Accelerate
CNNs from Three Dimensions" (ICML 2021). Networks cut along one dimension and along
several are fine-tuned a little, a polynomial is fitted to what they reach, and the
network to prune to is where it is largest at the budget. Ours measures each network
from the dense one rather than one after the other, in a fixed plan; and of the networks
that can be built, with blocks and pixels in whole numbers, it takes the one for which
the fit says most.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from math import sqrt
from typing import Any

import numpy as np
from torch import nn

from autoprune.config import Settings
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import SingleBudget, parse_budget
from autoprune.costs.search_space import SearchSpace
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import accuracy
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.diverging import explained
from autoprune.pipeline.methods.base import PruningMethod
from autoprune.pipeline.methods.channels import ChannelDecision, sliced
from autoprune.runs import RunFolder
from autoprune.scaling.accuracy_model import (
    EXPONENTS,
    AccuracyModel,
    Point,
    Shares,
    shrink_together,
)
from autoprune.scaling.optimum import measured_bounds, optimum
from autoprune.scaling.scaling import DEPTH, RESOLUTION, Scaling
from autoprune.structure.slicing import top_channels
from autoprune.training.loop import finetune

FITTED = "polynomial"
"""The agent that fits an accuracy model; all others search."""


@dataclass(frozen=True)
class DimensionDecision(ChannelDecision):
    """An allocation in which `depth` and `resolution` take part."""

    def plan(self, context: RunContext) -> dict[str, Any]:
        """Removed blocks, image size and widths.

        Whoever loads the weights makes the network so again.
        """
        scaling = _scaling(context)
        kept = self.allocation.kept
        _, size = scaling.depth_and_size(kept)
        # Only of groups that exist at this depth: those in removed blocks keep nothing.
        indices = top_channels(context.importance, scaling.widths(kept))
        return {
            "granularity": "dimensions",
            "removed_blocks": scaling.removed(kept),
            "image_size": size,
            "allocation": self.allocation.to_json(),
            "kept": {name: rows.tolist() for name, rows in indices.items()},
        }


class Dimensions(PruningMethod[DimensionDecision]):
    """Depth, image size and widths, by one allocation; see `autoprune.scaling`."""

    def is_searched(self, settings: Settings) -> bool:
        """Unless a model of the accuracy decides."""
        return settings.search.agent != FITTED

    def check(self, context: RunContext) -> None:
        """Checks the budget, and whether there is enough to choose from for a fit."""
        choice = _Choice(context)
        # The budget first: that takes no further trace, while the plan of a fit needs
        # one for each depth and image size in it.
        choice.space.check(choice.target, choice.budget)
        if not self.is_searched(context.settings):
            _check_fit(context, choice)

    def is_decided(self, folder: RunFolder) -> bool:
        """Whether there is an allocation."""
        return folder.allocation.exists()

    def load(self, context: RunContext, folder: RunFolder) -> DimensionDecision:
        """The run's allocation.

        Args:
            context: Groups that the allocation has to be for.
            folder: The run.
        """
        return DimensionDecision(Allocation.read(folder.allocation, context.groups))

    def n_steps(self, context: RunContext) -> int:
        """The networks that are measured."""
        return len(_Choice(context).plan())

    def decide(
        self, context: RunContext, folder: RunFolder, advance: Callable[[str], None]
    ) -> tuple[DimensionDecision, dict[str, Any]]:
        """Measures, fits, and takes the network that promises most.

        A killed run measures on.

        Args:
            context: Network, images and trace.
            folder: The run, whose log holds what is measured already.
            advance: Told of each measured network, in words.
        """
        choice = _Choice(context)
        # A point is logged as soon as it is measured. So a kill costs part of one
        # training, and that goes on after its last epoch.
        dimensions = context.settings.dimensions
        training = {"epochs": dimensions.epochs, "lr": dimensions.lr}
        known = {}
        for event in folder.events("point"):
            # Points compare only where all were trained alike. Earlier versions, which
            # didn't log how, never let that change.
            if event.get("training", training) == training:
                known[event["number"]] = Point(**event["point"])
        points = []
        for number, kept in enumerate(choice.plan()):
            checkpoint = folder.checkpoints / f"point-{number}.pt"
            # By number, which is safe since the plan depends on the settings alone.
            point = known.get(number)
            if point is None:
                reached = _measure(context, kept, folder, checkpoint)
                point = Point(**asdict(choice.shares(kept)), accuracy=reached)
                folder.append(
                    "point",
                    number=number,
                    kept=kept,
                    point=asdict(point),
                    training=training,
                )
            points.append(point)
            # Only after the log has the point: a kill between the two leaves a file too
            # many and no training to repeat.
            checkpoint.unlink(missing_ok=True)
            advance(_in_words(point))
        model = AccuracyModel.fit(points, context.settings.dimensions.degree)
        kept, promised = _most_promising(choice, model, points)
        budget_share = choice.budget.share_of(context.costs)
        # For the report, beside what is built: no network with whole blocks and pixels
        # may lie just there.
        best = optimum(model, budget_share, measured_bounds(points))
        allocation = Allocation(
            kept, context.groups.fingerprint, str(choice.budget), FITTED
        )
        rows = []
        for point in points:
            rows.append(asdict(point) | {"fitted": _predict(model, point)})
        results = {
            "optimum": asdict(best),
            "chosen": asdict(promised),
            "error": model.mean_absolute_error(points),
            "points": rows,
        }
        decision = DimensionDecision(allocation)
        return decision, {"dimensions": results, "widths": context.widths}

    def build(self, context: RunContext, decision: DimensionDecision) -> nn.Module:
        """The network without the removed blocks, at its image size, sliced.

        Args:
            context: Network, images and trace.
            decision: Depth, image size and widths.
        """
        # Networks that are only measured are spared the proof of their groups; the one
        # that is kept isn't.
        return _build(context, decision.allocation.kept, verify=True)


class _Choice:
    """The networks of every depth, size and width that a run can choose from.

    Args:
        context: Network, images and trace.
    """

    def __init__(self, context: RunContext):
        search = context.settings.search
        self.context = context
        self.scaling = _scaling(context)
        self.budget: SingleBudget = parse_budget(search.budget).at_position(0)
        self.target = self.budget.target(context.costs)
        self.space = SearchSpace(
            context.costs,
            self.budget.metric,
            max_sparsity=search.max_sparsity,
            **context.limits,
        )

    def plan(self) -> list[dict[str, int]]:
        """The allocations that are measured.

        The dense network; each dimension at a third, two thirds and all of the way
        down; pairs, and all three. All of the way down is the budget, met by the
        dimensions that take part, in equal parts of its logarithm; or half of the
        network where the budget allows more, since depth would hardly differ. Each is
        the nearest network that can be built, so some may coincide; those count once.
        """
        share = min(0.5, self.budget.share_of(self.context.costs))
        wanted = [Shares(1, 1, 1)]
        for name in EXPONENTS:
            for step in (1, 2, 3):
                wanted.append(shrink_together((name,), share ** (step / 3)))
        for size in (2, 3):
            for names in combinations(EXPONENTS, size):
                wanted.append(shrink_together(names, share))
        plan: list[dict[str, int]] = []
        for shares in wanted:
            kept = self._nearest(shares)
            if kept not in plan:
                plan.append(kept)
        return plan

    def shares(self, kept: dict[str, int]) -> Shares:
        """The shares that an allocation really has, by the MACs that are left.

        Depth and size alone; the widths at that depth and size, since groups in removed
        blocks have none.
        """
        macs = self.context.costs.macs
        depth = {DEPTH: kept[DEPTH]}
        size = {RESOLUTION: kept[RESOLUTION]}
        width_share = macs(kept) / macs(depth | size)
        return Shares(
            depth=macs(depth) / macs({}),
            # MACs go with the square of a width, as they do with that of an image's
            # side.
            width=sqrt(width_share),
            resolution=sqrt(macs(size) / macs({})),
        )

    def candidates(self) -> Iterator[dict[str, int]]:
        """Allocations of every depth and size, their widths uniform, within budget."""
        # Depth and size are the first two groups.
        for chosen in product(*self.space.levels[:2]):
            sparsities = 1 - np.array(chosen) / self.space.costs.dense[:2]

            # The counts as a default: a function made in a loop sees the loop's last
            # values otherwise.
            def choose(
                index: int, uniform: np.ndarray, fixed: np.ndarray = sparsities
            ) -> float | np.ndarray:
                return fixed[index] if index < len(fixed) else uniform

            yield self._named(self.space.allocate(self.target, choose))

    def _nearest(self, shares: Shares) -> dict[str, int]:
        """The allowed counts nearest to shares of the three dimensions."""
        share_of = {DEPTH: shares.depth, RESOLUTION: shares.resolution}
        counts = []
        groups = self.context.groups.channels.items()
        for (name, count), levels in zip(groups, self.space.levels, strict=True):
            wanted = count * share_of.get(name, shares.width)
            counts.append(levels[np.abs(levels - wanted).argmin()])
        return self._named(counts)

    def _named(self, counts: Sequence[int] | np.ndarray) -> dict[str, int]:
        names = self.context.costs.names
        return {name: int(n) for name, n in zip(names, counts, strict=True)}


def _scaling(context: RunContext) -> Scaling:
    assert context.scaling is not None, "this method is for granularity dimensions"
    return context.scaling


def _check_fit(context: RunContext, choice: _Choice) -> None:
    """Checks that an accuracy model can be fitted to what the plan measures."""
    for name in (DEPTH, RESOLUTION):
        reason = context.groups.reasons.get(name)
        if reason:
            raise UserError(
                "agent",
                f"{FITTED} weighs depth, width and image size, and {name} is fixed "
                f"({reason})",
            )
    if not context.channel_groups.channels:
        raise UserError(
            "agent",
            f"{FITTED} weighs depth, width and image size, and no channel can be "
            f"pruned",
        )
    # The plan's networks with some accuracy: whether a fit exists depends on where they
    # lie, not on what they reach.
    points = []
    for kept in choice.plan():
        points.append(Point(**asdict(choice.shares(kept)), accuracy=0.5))
    try:
        model = AccuracyModel.fit(points, context.settings.dimensions.degree)
    except UserError as error:
        raise UserError("dimensions.degree", error.reason) from error
    budget_share = choice.budget.share_of(context.costs)
    optimum(model, budget_share, measured_bounds(points))


def _build(
    context: RunContext, kept: dict[str, int], verify: bool = False
) -> nn.Module:
    widths = _scaling(context).widths(kept)
    return sliced(context.scaled(kept, verify), widths)


def _measure(
    context: RunContext, kept: dict[str, int], folder: RunFolder, checkpoint: Any
) -> float:
    """The accuracy on the selection split of one network after a short training."""
    settings = context.settings
    network = _build(context, kept)
    config = replace(
        settings.finetune,
        epochs=settings.dimensions.epochs,
        lr=settings.dimensions.lr,
    )
    train = context.splits.train
    seed = settings.search.seed
    # Taught by the dense network, as the fine-tuning is that this one stands for.
    with explained(folder, "dimensions"):
        finetune(network, train, config, seed, context.dense, checkpoint)
    # Images that no training has seen; the test split must wait until all is decided.
    return accuracy(network, context.splits.selection)


def _most_promising(
    choice: _Choice, model: AccuracyModel, points: list[Point]
) -> tuple[dict[str, int], Point]:
    """Of the candidates the one for which the model promises most.

    Those beyond what was measured come last, since a polynomial says nothing there.
    """
    bounds = measured_bounds(points)
    ranked = []
    for kept in choice.candidates():
        shares = choice.shares(kept)
        is_inside = all(
            low <= getattr(shares, name) <= high for name, (low, high) in bounds.items()
        )
        ranked.append((is_inside, _predict(model, shares), kept, shares))
    # By the first two alone, since allocations can't be compared.
    _, promised, kept, shares = max(ranked, key=lambda candidate: candidate[:2])
    return kept, Point(**asdict(shares), accuracy=promised)


def _in_words(point: Point) -> str:
    """A measured network, for the progress bar."""
    sizes = ", ".join(f"{name} {getattr(point, name):.2f}" for name in EXPONENTS)
    return f"{sizes}: {point.accuracy:.1%}"


def _predict(model: AccuracyModel, shares: Shares) -> float:
    """What a model says of a network."""
    sizes = [np.array(getattr(shares, name)) for name in EXPONENTS]
    return float(model(*sizes))
