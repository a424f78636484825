"""Depth, image size and widths removed together: searched by an agent, or placed by a
model of the accuracy.

Wang et al., "Accelerate CNNs from Three Dimensions" (ICML 2021): networks cut along one
dimension and along several are fine-tuned a little, a polynomial is fitted to what they
reach, and the network to prune to is where it is largest at the budget. Ours measures
each network from the dense one rather than one after the other, in a fixed plan; and of
the networks that can be built, with blocks and pixels in whole numbers, it takes the
one for which the fit says most.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import combinations, product
from math import sqrt

import numpy as np
from torch import nn

from autoprune.costs.allocation import Allocation, SearchSpace
from autoprune.costs.budget import Budget, parse_budget
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import accuracy
from autoprune.pipeline.methods.base import Channels, sliced
from autoprune.scaling.accuracy_model import (
    EXPONENTS,
    AccuracyModel,
    Point,
    Shares,
    measured_bounds,
    optimum,
    together,
)
from autoprune.scaling.scaling import DEPTH, RESOLUTION
from autoprune.training.loop import finetune

FITTED = "polynomial"
"""The agent that fits an accuracy model; all others search."""


class Compound(Channels):
    """Depth, image size and widths, by an allocation in which the first two are groups;
    see `autoprune.scaling.scaling`.
    """

    @property
    def is_searched(self) -> bool:
        """Unless a model of the accuracy decides."""
        return self.workspace.settings.search.agent != FITTED

    def check(self) -> None:
        """Looks whether the budget can be met, and whether there is enough to choose
        from for a fit.
        """
        self._space.check(self._target, self._budget)
        if self.is_searched:
            return
        for name in (DEPTH, RESOLUTION):
            reason = self.workspace.groups.reasons.get(name)
            if reason:
                raise UserError(
                    "agent",
                    f"{FITTED} weighs depth, width and image size, and {name} "
                    f"is fixed ({reason})",
                )
        if not len(self.workspace.widths.channels):
            raise UserError(
                "agent",
                f"{FITTED} weighs depth, width and image size, and no channel "
                f"can be pruned",
            )
        nothing = [
            Point(**asdict(self._shares(kept)), accuracy=0.5) for kept in self._plan
        ]
        try:
            model = AccuracyModel.fit(
                nothing, self.workspace.settings.dimensions.degree
            )
        except UserError as error:
            raise UserError(
                "dimensions.degree", f"{str(error).removeprefix('points: ')}"
            ) from error
        optimum(
            model, self._budget.share_of(self.workspace.costs), measured_bounds(nothing)
        )

    @property
    def n_steps(self) -> int:
        """The networks that are measured."""
        return len(self._plan)

    def decide(self, advance: Callable[[str], None]) -> tuple[Allocation, dict]:
        """Measures, fits, and takes the network that promises most; a killed run
        measures on.
        """
        known = {
            event["number"]: Point(**event["point"])
            for event in self.folder.events("point")
        }
        points = []
        for number, kept in enumerate(self._plan):
            points.append(known.get(number) or self._measured(number, kept))
            (self.folder.checkpoints / f"point-{number}.pt").unlink(missing_ok=True)
            advance(_described(points[-1]))
        model = AccuracyModel.fit(points, self.workspace.settings.dimensions.degree)
        kept, promised = self._best(model, points)
        best = optimum(
            model, self._budget.share_of(self.workspace.costs), measured_bounds(points)
        )
        allocation = Allocation(
            kept, self.workspace.groups.fingerprint, str(self._budget), FITTED
        )
        found = {
            "optimum": asdict(best),
            "chosen": asdict(promised),
            "error": model.mean_absolute_error(points),
        }
        rows = [asdict(point) | {"fitted": _promised(model, point)} for point in points]
        return allocation, {"dimensions": found | {"points": rows}}

    def network(self) -> nn.Module:
        """The network without the removed blocks, at its image size, with the most
        important channels.
        """
        return self._built(self.decision.kept, verify=True)

    @property
    def widths(self) -> dict[str, int]:
        """Those of the groups that are left."""
        return self.workspace.scaling.widths(self.decision.kept)

    def plan(self) -> dict:
        """Removed blocks, image size and widths; whoever loads the weights makes the
        network so again.
        """
        scaling, kept = self.workspace.scaling, self.decision.kept
        shape = {
            "removed_blocks": scaling.removed(kept),
            "image_size": scaling.of(kept)[1],
        }
        return {"granularity": "dimensions"} | shape | super().plan()

    def _built(self, kept: dict[str, int], verify: bool = False) -> nn.Module:
        return sliced(
            self.workspace.at(kept, verify), self.workspace.scaling.widths(kept)
        )

    def _measured(self, number: int, kept: dict[str, int]) -> Point:
        """The accuracy on the selection split after a short training of one network of
        the plan; logged.
        """
        workspace, settings, network = (
            self.workspace,
            self.workspace.settings,
            self._built(kept),
        )
        config = replace(
            settings.finetune,
            epochs=settings.dimensions.epochs,
            lr=settings.dimensions.lr,
        )
        checkpoint = self.folder.checkpoints / f"point-{number}.pt"
        finetune(
            network,
            workspace.splits.train,
            config,
            settings.search.seed,
            workspace.dense,
            checkpoint,
        )
        reached = accuracy(network, workspace.splits.selection)
        point = Point(**asdict(self._shares(kept)), accuracy=reached)
        self.folder.append("point", number=number, kept=kept, point=asdict(point))
        return point

    def _best(
        self, model: AccuracyModel, points: list[Point]
    ) -> tuple[dict[str, int], Point]:
        """Of the networks of every depth and size, with uniform widths that use the
        budget up, the most promising.

        Those beyond what was measured come last, since a polynomial says nothing there.
        """
        bounds, found = measured_bounds(points), []
        for kept in self._candidates():
            shares = self._shares(kept)
            inside = all(
                low <= getattr(shares, name) <= high
                for name, (low, high) in bounds.items()
            )
            found.append((inside, _promised(model, shares), kept, shares))
        _, promised, kept, shares = max(found, key=lambda candidate: candidate[:2])
        return kept, Point(**asdict(shares), accuracy=promised)

    def _candidates(self) -> Iterator[dict[str, int]]:
        """Allocations of every depth and size, the widths uniform and within the
        budget.
        """
        space = self._space
        # Depth and size are the first two groups.
        for chosen in product(*space.levels[:2]):
            wishes = 1 - np.array(chosen) / space.costs.dense[:2]
            choose = partial(_wished, wishes)
            yield self._named(space.allocate(self._target, choose))

    @cached_property
    def _plan(self) -> list[dict[str, int]]:
        """The dense network; each dimension at a third, two thirds and all of the way
        down; pairs, and all three.

        All of the way down is the budget, met by the dimensions that take part, in
        equal parts of its logarithm; or half of the network where the budget allows
        more, since depth would hardly differ. Each is the nearest network that can be
        built, so some may coincide; those count once.
        """
        share = min(0.5, self._budget.share_of(self.workspace.costs))
        parts = [
            ((name,), share ** (step / 3)) for name in EXPONENTS for step in (1, 2, 3)
        ]
        parts += [
            (names, share) for size in (2, 3) for names in combinations(EXPONENTS, size)
        ]
        plan = [
            self._nearest(shares)
            for shares in (Shares(1, 1, 1), *(together(*part) for part in parts))
        ]
        return [kept for number, kept in enumerate(plan) if kept not in plan[:number]]

    def _nearest(self, shares: Shares) -> dict[str, int]:
        """The allocation of allowed counts nearest to shares of the three dimensions."""
        of = {DEPTH: shares.depth, RESOLUTION: shares.resolution}
        wanted = [
            count * of.get(name, shares.width)
            for name, count in self.workspace.groups.channels.items()
        ]
        levels = zip(self._space.levels, wanted, strict=True)
        return self._named([row[np.abs(row - count).argmin()] for row, count in levels])

    def _shares(self, kept: dict[str, int]) -> Shares:
        """The shares that an allocation really has, by the MACs that are left.

        Depth and size alone; the widths at that depth and size, since groups in removed
        blocks have none.
        """
        macs = self.workspace.costs.macs
        depth, size = ({name: kept[name]} for name in (DEPTH, RESOLUTION))
        return Shares(
            macs(depth) / macs({}),
            sqrt(macs(kept) / macs(depth | size)),
            sqrt(macs(size) / macs({})),
        )

    def _named(self, kept) -> dict[str, int]:
        return dict(zip(self.workspace.costs.names, map(int, kept), strict=True))

    @cached_property
    def _space(self) -> SearchSpace:
        search, workspace = self.workspace.settings.search, self.workspace
        metric = parse_budget(search.budget).metric
        return SearchSpace(
            workspace.costs,
            metric,
            max_sparsity=search.max_sparsity,
            **workspace.limits,
        )

    @property
    def _budget(self) -> Budget:
        return parse_budget(self.workspace.settings.search.budget).at(0)

    @property
    def _target(self) -> int:
        return self._budget.target(self.workspace.costs)


def _described(point: Point) -> str:
    """A network in words."""
    sizes = ", ".join(f"{name} {getattr(point, name):.2f}" for name in EXPONENTS)
    return f"{sizes}: {point.accuracy:.1%}"


def _promised(model: AccuracyModel, shares: Shares) -> float:
    """What a model says of a network."""
    return float(model(*(np.array(getattr(shares, name)) for name in EXPONENTS)))


def _wished(wishes: np.ndarray, index: int, even: float) -> float:
    """Given sparsities of the first groups, then the same for all."""
    return wishes[index] if index < len(wishes) else even
