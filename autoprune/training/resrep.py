"""ResRep: compactors remember, some of their rows forget, and what is left is folded
away.

Ding et al. 2021 ("ResRep: Lossless CNN Pruning via Decoupling Remembering and
Forgetting"). After a batch norm comes a 1x1 convolution, the compactor, at first the
identity. While everything else trains on the loss alone, a penalty pulls at its rows,
and rows that are selected to go feel nothing but the penalty. In the end convolution,
batch norm and compactor are one convolution again, without the rows that are gone.

Where we differ:
- Rows are selected in even steps over the first part of the training, of whatever
  length, not four more every 200 steps; then the selection stays, so that the rows have
  time to vanish.
- A selected row keeps its direction, never grows, and stays at zero. Only the pull acts
  on it anyway, but what momentum has kept of the loss would let it circle around zero
  through a short training.
- Selected rows are pulled as hard as it takes to vanish in time. The paper pulls at all
  rows alike; as hard as a short training needs it, that costs the others more than they
  can win back.
- How many go may also come from an allocation, group by group.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.costs.cost import CostTable
from autoprune.errors import UserError
from autoprune.structure.groups import Groups
from autoprune.training.compactors import Compactor
from autoprune.training.loop import TrainingCallback, parameter_groups, pull_for

STRENGTH = 1e-4
"""The paper's pull."""
TRAVEL = 6.0
"""Length of a row that vanishes between the last selection and the end; rows begin with
1, which leaves time after.
"""
EPSILON = 1e-12


@dataclass(frozen=True)
class Goal:
    """When enough rows are selected.

    Attributes:
        costs: The network's cost table.
        metric: What is counted.
        target: The most that may be left; None where `counts` say it all.
        counts: Group to the channels that it keeps; None where the rows compete across
            the network.
    """

    costs: CostTable
    metric: str = "macs"
    target: int | None = None
    counts: Mapping[str, int] | None = None

    def __post_init__(self):
        if (self.target is None) == (self.counts is None):
            raise UserError("goal", "give a target or counts, not both")
        if self.counts is not None and min(self.counts.values(), default=1) < 1:
            raise UserError(
                "goal",
                f"every group keeps at least 1 channel, got counts {dict(self.counts)}",
            )

    def may_go(self, group: str, kept: Mapping[str, int]) -> bool:
        """Whether one more channel of a group may go, of which so many are kept now."""
        least = 1 if self.counts is None else self.counts.get(group, kept[group])
        return kept[group] > least and not self.is_met(kept)

    def is_met(self, kept: Mapping[str, int]) -> bool:
        """Whether nothing more has to go."""
        if self.counts is not None:
            return all(
                kept[name] <= count
                for name, count in self.counts.items()
                if name in kept
            )
        return self.costs.metrics[self.metric](dict(kept)) <= self.target


class Compaction(TrainingCallback):
    """Trains compactors: all rows are pulled to zero, the selected ones harder, and by
    nothing else.

    Args:
        groups: The network's trace.
        pairs: `eligible` groups.
        goal: When enough is selected.
        strength: The pull; it moves a row by learning rate times strength, 10 times
            that in the long run. Selected rows are pulled harder where that takes too
            long: a row of length 6 vanishes between the last selection and the end.
            None for the paper's.
        selecting: Share of the training over which rows are selected, evenly.
        selections: In how many steps.

    Raises:
        UserError: If the goal can't be met.
    """

    MOMENTUM = 0.9
    """Of the compactors; the paper's 0.99 remembers a third of a training of a few
    epochs.
    """

    def __init__(
        self,
        groups: Groups,
        pairs: Mapping[str, tuple[str, str]],
        goal: Goal,
        strength: float | None = None,
        selecting: float = 0.3,
        selections: int = 50,
    ):
        self.goal, self.selecting, self.selections = goal, selecting, selections
        self.strength = STRENGTH if strength is None else strength
        self._names = {name: f"{norm}.1" for name, (_, norm) in pairs.items()}
        self.masked = {
            name: torch.zeros(groups[name].channels, dtype=torch.bool) for name in pairs
        }
        self._every, self._last, self._vanishing = 1, -1, 0.0  # none until `begin`
        self._before: dict[str, Tensor] = {}
        fewest = dict.fromkeys(pairs, 1)
        if goal.target is not None and not goal.is_met(fewest):
            floor = goal.costs.metrics[goal.metric](fewest)
            raise UserError(
                "budget",
                f"{goal.metric}={goal.target} is below the reachable floor; "
                f"the groups that can have "
                f"compactors leave {goal.metric}={floor} or more",
            )

    @property
    def kept(self) -> dict[str, Tensor]:
        """Group to the rows that aren't selected, int64, ascending."""
        return {name: (~mask).nonzero()[:, 0] for name, mask in self.masked.items()}

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """The usual ones, and the compactors with their momentum, without decay."""
        own = [compactor.weight for compactor in self._compactors(model).values()]
        ids = {id(weight) for weight in own}
        usual = parameter_groups(model, config)
        rest = [
            group | {"params": [p for p in group["params"] if id(p) not in ids]}
            for group in usual
        ]
        return [
            *rest,
            {
                "params": own,
                "weight_decay": 0.0,
                "momentum": self.MOMENTUM,
                "nesterov": False,
            },
        ]

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Spreads the selections, and what makes rows vanish over the time after them."""
        self._last = min(n_steps - 1, round(self.selecting * n_steps))
        self._every = max(1, self._last // self.selections)
        self._vanishing = pull_for(
            TRAVEL, self.MOMENTUM, config, n_steps, since=self._last
        )

    def before_step(self, model: nn.Module, step: int) -> None:
        """Selects, if it is time; then the rows' gradients are the penalty's, with or
        without the loss's.
        """
        if step == self._last or (step < self._last and step % self._every == 0):
            self.select(model, step / self._last if self._last else 1.0)
        with torch.no_grad():
            for name, compactor in self._compactors(model).items():
                gradient, weight = compactor.weight.grad, compactor.weight
                gradient[self.masked[name]] = 0
                lengths = weight.flatten(1).norm(dim=1).clamp_min(EPSILON)
                pull = self.strength + self.masked[name] * max(
                    0.0, self._vanishing - self.strength
                )
                gradient.add_(weight * (pull / lengths).view(-1, 1, 1, 1))
                self._before[name] = weight.detach().clone()

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Lets selected rows only shrink, down to zero."""
        for name, compactor in self._compactors(model).items():
            before, after, mask = (
                self._before[name],
                compactor.weight,
                self.masked[name],
            )
            along = (after * before).flatten(1).sum(1) / before.flatten(1).square().sum(
                1
            ).clamp_min(EPSILON)
            shrunk = along.clamp(0, 1).view(-1, 1, 1, 1) * before
            after[mask] = shrunk[mask]

    def select(self, model: nn.Module, share: float) -> None:
        """Masks the shortest rows anew: at most this share of all, and not more than
        the goal asks for.
        """
        compactors = self._compactors(model)
        rows = [
            (norm, name, row)
            for name, c in compactors.items()
            for row, norm in enumerate(c.norms.tolist())
        ]
        kept = {name: len(mask) for name, mask in self.masked.items()}
        allowed = round(share * len(rows)) if share < 1 else len(rows)
        for mask in self.masked.values():
            mask.zero_()
        for _, name, row in sorted(rows):
            if allowed and self.goal.may_go(name, kept):
                self.masked[name][row] = True
                kept[name] -= 1
                allowed -= 1

    def state_dict(self) -> dict:
        """The selected rows."""
        return {name: mask.clone() for name, mask in self.masked.items()}

    def load_state_dict(self, state: dict) -> None:
        """Takes them over."""
        self.masked = {name: mask.clone() for name, mask in state.items()}

    def _compactors(self, model: nn.Module) -> dict[str, Compactor]:
        return {name: model.get_submodule(path) for name, path in self._names.items()}
