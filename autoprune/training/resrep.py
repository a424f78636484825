"""ResRep: compactors remember, some of their rows forget and are folded away.

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
from autoprune.training.compactors import Compactor, ConvNorm
from autoprune.training.loop import TrainingCallback, constant_pull, parameter_groups

STRENGTH = 1e-4
"""The paper's pull."""
TRAVEL = 6.0
"""Length of a row that vanishes between the last selection and the end; rows begin with
1, which leaves time after.
"""
EPSILON = 1e-12
"""Keeps divisions by a row's length finite once it has vanished."""


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

    def __post_init__(self) -> None:
        if (self.target is None) == (self.counts is None):
            raise UserError("goal", "give a target or counts, not both")
        if self.counts is not None and min(self.counts.values(), default=1) < 1:
            raise UserError(
                "goal",
                f"every group keeps at least 1 channel, got counts {dict(self.counts)}",
            )

    def may_remove(self, group: str, kept: Mapping[str, int]) -> bool:
        """Whether one more channel of a group may go.

        Args:
            group: Its name.
            kept: Group to the channels that it keeps now.
        """
        least = 1
        if self.counts is not None:
            # A group that the counts leave out keeps what it has.
            least = self.counts.get(group, kept[group])
        return kept[group] > least and not self.is_met(kept)

    def is_met(self, kept: Mapping[str, int]) -> bool:
        """Whether nothing more has to go.

        Args:
            kept: Group to the channels that it keeps now.
        """
        if self.counts is None:
            assert self.target is not None, "a goal has a target or counts"
            return self.costs.metrics[self.metric](dict(kept)) <= self.target
        # Groups without a compactor can't lose anything, whatever the counts say.
        return all(
            kept[name] <= count for name, count in self.counts.items() if name in kept
        )


class Compaction(TrainingCallback):
    """Trains compactors: all rows are pulled to zero, the selected ones harder.

    The selected ones feel nothing else.

    Args:
        groups: The network's trace.
        pairs: See `autoprune.training.compactors.eligible_pairs`.
        goal: When enough is selected.
        strength: The pull; it moves a row by learning rate times strength, 10 times
            that in the long run. Selected rows are pulled harder where that takes too
            long: a row of length 6 vanishes between the last selection and the end.
            None for the paper's.
        selection_share: Share of the training over which rows are selected, evenly.
        n_selections: In how many steps.

    Attributes:
        selection: Group to bool `(n_channels,)`, true for rows that are selected to go.

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
        pairs: Mapping[str, ConvNorm],
        goal: Goal,
        strength: float | None = None,
        selection_share: float = 0.3,
        n_selections: int = 50,
    ) -> None:
        self.goal = goal
        self.selection_share = selection_share
        self.n_selections = n_selections
        self.strength = STRENGTH if strength is None else strength
        self._paths: dict[str, str] = {}
        self.selection: dict[str, Tensor] = {}
        for name, (_, norm) in pairs.items():
            # The compactor's place, behind the norm in the sequence that replaced it.
            self._paths[name] = f"{norm}.1"
            self.selection[name] = torch.zeros(groups[name].channels, dtype=torch.bool)
        # Until `begin` no step is one of selection, and selected rows are pulled like
        # all others.
        self._interval = 1
        self._last_selection = -1
        self._vanishing_pull = 0.0
        # Compactors' weights before the optimizer's step.
        self._previous: dict[str, Tensor] = {}
        # Before any training: a goal out of reach would only show at its end.
        fewest = dict.fromkeys(pairs, 1)
        if goal.target is not None and not goal.is_met(fewest):
            floor = goal.costs.describe(goal.metric, fewest)
            raise UserError(
                "budget",
                f"the target is below the reachable floor; the groups that can have "
                f"compactors leave {floor} or more",
            )

    @property
    def kept(self) -> dict[str, Tensor]:
        """Group to the rows that aren't selected, int64, ascending."""
        return {name: (~mask).nonzero()[:, 0] for name, mask in self.selection.items()}

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """Returns the usual groups, and the compactors with a momentum of their own.

        Compactors have no weight decay: it would pull at the rows that stay.

        Args:
            model: The network with compactors.
            config: Its training.

        Returns:
            Groups as `torch.optim.SGD` takes them.
        """
        # They are among the usual groups' weights, and mustn't be trained twice.
        weights = [compactor.weight for compactor in self._compactors(model).values()]
        # By identity: == compares tensors by their values.
        compactor_ids = {id(weight) for weight in weights}
        groups = []
        for group in parameter_groups(model, config):
            rest = [p for p in group["params"] if id(p) not in compactor_ids]
            groups.append(group | {"params": rest})
        groups.append(
            {
                "params": weights,
                "weight_decay": 0.0,
                "momentum": self.MOMENTUM,
                "nesterov": False,
            }
        )
        return groups

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Spreads the selections, and what makes rows vanish over the time after them.

        Of 1,000 steps the last selection is at step 300, the others every 6 steps.

        Args:
            model: Not used.
            n_steps: Length of the training.
            config: Its learning rate.
        """
        # Not after the end, which a share of 1 would be.
        self._last_selection = min(n_steps - 1, round(self.selection_share * n_steps))
        self._interval = max(1, self._last_selection // self.n_selections)
        self._vanishing_pull = constant_pull(
            TRAVEL, self.MOMENTUM, config, n_steps, self._last_selection
        )

    def before_step(self, model: nn.Module, step: int) -> None:
        """Selects, if it is time; then adds the penalty to the rows' gradients.

        Selected rows have the penalty's gradient alone.

        Args:
            model: The network, whose gradients are those of the loss.
            step: Number of the step, from 0.
        """
        if self._is_selection(step):
            # The share of the selections that are done, and so of what may be selected.
            progress = step / self._last_selection if self._last_selection else 1.0
            self.select(model, progress)
        # Added to the usual pull of selected rows; nothing where that is enough.
        extra = max(0.0, self._vanishing_pull - self.strength)
        with torch.no_grad():
            for name, compactor in self._compactors(model).items():
                weight = compactor.weight
                gradient = weight.grad
                assert gradient is not None, "compactors take part in the loss"
                selected = self.selection[name]
                # What the loss asks of them is forgotten.
                gradient[selected] = 0
                lengths = weight.flatten(1).norm(dim=1).clamp_min(EPSILON)
                pull = self.strength + selected * extra
                # Of the same force whatever a row's length, so that it reaches zero.
                gradient.add_(weight * (pull / lengths).view(-1, 1, 1, 1))
                # A copy: the optimizer writes into the weights.
                self._previous[name] = weight.detach().clone()

    def _is_selection(self, step: int) -> bool:
        """Whether rows are selected in a step."""
        if step == self._last_selection:
            return True
        return step < self._last_selection and step % self._interval == 0

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Lets selected rows only shrink, down to zero.

        A row (3, 4) that the optimizer moved to (4, 2) becomes 0.8 times (3, 4): what
        is left of it along its old direction, which is 20 of 25.

        Args:
            model: The network.
            step: Not used.
        """
        for name, compactor in self._compactors(model).items():
            before = self._previous[name]
            after = compactor.weight
            selected = self.selection[name]
            products = (after * before).flatten(1).sum(1)
            squares = before.flatten(1).square().sum(1).clamp_min(EPSILON)
            # Above 1 the row would grow, below 0 turn round.
            factors = (products / squares).clamp(0, 1).view(-1, 1, 1, 1)
            after[selected] = (factors * before)[selected]

    def select(self, model: nn.Module, share: float) -> None:
        """Selects the shortest rows anew.

        Args:
            model: The network with compactors.
            share: The most that may be selected of all rows; never more than the goal
                asks for.
        """
        rows = []
        for name, compactor in self._compactors(model).items():
            for row, length in enumerate(compactor.norms.tolist()):
                rows.append((length, name, row))
        n_allowed = round(share * len(rows))
        kept = {}
        for name, mask in self.selection.items():
            kept[name] = len(mask)
            # A row that was selected and has recovered since is trained again.
            mask.zero_()
        # Rows of one length go in the order of their groups' names, and of rows.
        for _, name, row in sorted(rows):
            if n_allowed and self.goal.may_remove(name, kept):
                self.selection[name][row] = True
                kept[name] -= 1
                n_allowed -= 1

    def state_dict(self) -> dict:
        """Returns the selected rows."""
        return {name: mask.clone() for name, mask in self.selection.items()}

    def load_state_dict(self, state: dict) -> None:
        """Takes over the selected rows."""
        self.selection = {name: mask.clone() for name, mask in state.items()}

    def _compactors(self, model: nn.Module) -> dict[str, Compactor]:
        """Group to its compactor."""
        compactors = {}
        for name, path in self._paths.items():
            module = model.get_submodule(path)
            assert isinstance(module, Compactor), "insert_compactors put it there"
            compactors[name] = module
        return compactors
