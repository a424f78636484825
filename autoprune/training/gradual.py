"""Pruning in many small steps while the network trains: iterative, or with AGP's cubic
schedule.

Zhu and Gupta 2017 ("To prune, or not to prune", arXiv 1710.01878), section 2. What has
to go is masked step by step, each time ranked anew on the weights as training has left
them; the rest makes up for it until the next step. One annealed training, so that the
last third of it is fine-tuning.

Where we differ: the sparsity that the schedule raises is that of each group, or of all
weights in terms of the budget, and the ranking is any criterion.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.structure.groups import Groups, removed
from autoprune.structure.slicing import KeptIndices, top_channels
from autoprune.training.masks import KeepMasks, Masks

SHAPES: dict[str, Callable[[float], float]] = {
    "cubic": lambda progress: 1 - (1 - progress) ** 3,
    "linear": lambda progress: progress,
}
"""Share of the prunings that are done to share of what has to go that is gone; cubic is
equation 1 of AGP.
"""
PRUNED_FOR = 2 / 3
"""Share of the training over which the prunings are spread."""


class Gradual(KeepMasks):
    """Masks that grow over the first two thirds of a training, and hold throughout.

    Args:
        shape: A key of `SHAPES`.
        n_prunings: In how many steps, 1 or more; the last one reaches the goal.
    """

    def __init__(self, shape: str, n_prunings: int):
        super().__init__(Masks({}))
        self.shape, self.n_prunings = SHAPES[shape], n_prunings

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Spreads the prunings, and masks what a training that goes on had masked."""
        moments = (
            int(k * PRUNED_FOR * n_steps / self.n_prunings)
            for k in range(self.n_prunings)
        )
        # Of several prunings in one step, which a short training has, the last one
        # counts.
        self._shares = {
            moment: self.shape((k + 1) / self.n_prunings)
            for k, moment in enumerate(moments)
        }
        super().begin(model, n_steps, config)

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Prunes where the schedule says so."""
        if step in self._shares:
            self.masks = self.masks_at(model, self._shares[step])
            self.masks.apply(model)

    def masks_at(self, model: nn.Module, share: float) -> Masks:
        """What is masked once a share in (0, 1] of what has to go is gone; never less
        than `masks`.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        """The masks."""
        return {"masks": dict(self.masks.kept)}

    def load_state_dict(self, state: dict) -> None:
        """Takes over the masks."""
        self.masks = Masks(state["masks"])


class GradualWeights(Gradual):
    """Weights, or larger units of them, go; see `autoprune.training.masks`.

    Args:
        shape: As for `Gradual`.
        n_prunings: As for `Gradual`.
        cost: Of the dense network.
        target: What may be left of it.
        ranked: From a network and the cost that may be left to masks. Units that are
            zero have to go first.
    """

    def __init__(
        self,
        shape: str,
        n_prunings: int,
        cost: int,
        target: int,
        ranked: Callable[[nn.Module, int], Masks],
    ):
        super().__init__(shape, n_prunings)
        self.cost, self.target, self.ranked = cost, target, ranked

    def masks_at(self, model: nn.Module, share: float) -> Masks:
        """Those of the budget that is due, and all that there are."""
        masks, before = (
            self.ranked(model, round(self.cost - share * (self.cost - self.target))),
            self.masks.kept,
        )
        # A large unit may have saved more than was due, and now more than is.
        return Masks(
            {name: kept & before.get(name, kept) for name, kept in masks.kept.items()}
        )


class GradualChannels(Gradual):
    """Channels go, group by group, until each keeps what an allocation says.

    A channel is masked in all of its weights, so that in a network of convolutions and
    batch norms, it can be cut off afterwards without changing anything. Norms, softmax
    and means over channels then see fewer.

    Args:
        shape: As for `Gradual`.
        n_prunings: As for `Gradual`.
        groups: The network's trace.
        goal: Group to the number of channels to keep.
        importance: From a network to scores per channel and group.

    Attributes:
        kept: Group to the channels that aren't masked.
    """

    def __init__(
        self,
        shape: str,
        n_prunings: int,
        groups: Groups,
        goal: Mapping[str, int],
        importance: Callable[[nn.Module], Mapping[str, Tensor]],
    ):
        super().__init__(shape, n_prunings)
        self.groups, self.goal, self.importance = groups, goal, importance
        self.kept: KeptIndices = {
            name: torch.arange(groups[name].channels) for name in goal
        }

    def masks_at(self, model: nn.Module, share: float) -> Masks:
        """Ranks the channels that are left."""
        scores, kept = self.importance(model), {}
        for name, goal in self.goal.items():
            gone = removed(self.groups[name], self.kept)
            count = round(len(gone) - share * (len(gone) - goal))
            kept |= top_channels(
                {name: scores[name].masked_fill(gone, -torch.inf)}, {name: count}
            )
        self.kept = kept
        return channel_masks(self.groups, kept)

    def state_dict(self) -> dict:
        """The channels that are left."""
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: dict) -> None:
        """Takes over the channels, and masks the others."""
        self.kept = state["kept"]
        self.masks = channel_masks(self.groups, self.kept)


def channel_masks(groups: Groups, kept: KeptIndices) -> Masks:
    """Masks over every parameter in which removed channels sit, whatever their role.

    Args:
        groups: The network's trace.
        kept: Prunable group to the surviving channels; groups left out keep all.
    """
    masks: dict[str, Tensor] = {}
    for group in groups:
        gone = removed(group, kept)
        for member in group.members:
            if gone.any() and member.tensor in groups.parameters:
                shape = groups.shapes[member.tensor]
                mask = masks.setdefault(
                    member.tensor, torch.ones(shape, dtype=torch.bool)
                )
                mask.movedim(member.axis, 0)[member.index[gone].flatten()] = False
    return Masks(masks)
