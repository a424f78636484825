"""Pruning in many small steps while the network trains: iterative, or as in AGP.

Zhu and Gupta 2017 ("To prune, or not to prune", arXiv 1710.01878), section 2. What has
to go is masked step by step, each time ranked anew on the weights as training has left
them; the rest makes up for it until the next step. One annealed training, so that the
last third of it is fine-tuning. AGP's schedule is cubic.

Where we differ: the sparsity that the schedule raises is that of each group, or of all
weights in terms of the budget, and the ranking is any criterion.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.structure.groups import Groups, removal_mask
from autoprune.structure.slicing import KeptIndices, top_channels
from autoprune.training.masks import KeepMasks, Masks


def _cubic(progress: float) -> float:
    """Equation 1 of AGP: fast at first, slow towards the end."""
    return 1 - (1 - progress) ** 3


def _linear(progress: float) -> float:
    """As much in every pruning: usual iterative pruning."""
    return progress


SHAPES: dict[str, Callable[[float], float]] = {"cubic": _cubic, "linear": _linear}
"""From the share of the prunings that are done to the share of what has to go that is
gone; both from 0 to 1.
"""
PRUNING_SHARE = 2 / 3
"""Share of the training over which the prunings are spread."""


class Gradual(KeepMasks):
    """Masks that grow over the first two thirds of a training, and hold throughout.

    Args:
        shape: A key of `SHAPES`.
        n_prunings: In how many steps, 1 or more; the last one reaches the goal.
    """

    def __init__(self, shape: str, n_prunings: int) -> None:
        # Nothing is masked before the first pruning.
        super().__init__(Masks({}))
        self.shape = SHAPES[shape]
        self.n_prunings = n_prunings

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Spreads the prunings, and masks what a training that goes on had masked.

        Of 60 steps and 4 prunings, those are at steps 0, 10, 20 and 30.

        Args:
            model: The network that will be trained.
            n_steps: Length of the training.
            config: Not used.
        """
        # Step of each pruning to the share of the goal that is reached with it. Of
        # several prunings in one step, which a short training has, the last one counts.
        self._shares: dict[int, float] = {}
        for k in range(self.n_prunings):
            step = int(k * PRUNING_SHARE * n_steps / self.n_prunings)
            self._shares[step] = self.shape((k + 1) / self.n_prunings)
        # The masks of a checkpoint, before the next pruning makes others.
        super().begin(model, n_steps, config)

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Prunes where the schedule says so.

        Args:
            model: The network.
            step: Number of the step, from 0.
        """
        if step in self._shares:
            self.masks = self.grow_masks(model, self._shares[step])
            self.masks.apply(model)

    def grow_masks(self, model: nn.Module, share: float) -> Masks:
        """Ranks what is left and masks more of it; nothing masked comes back.

        Args:
            model: The network, as trained so far.
            share: Of what has to go, what is gone afterwards, in (0, 1].

        Returns:
            The new masks.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Returns the masks."""
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
        make_masks: From a network and the cost that may be left to masks. Units that
            are zero have to go first.
    """

    def __init__(
        self,
        shape: str,
        n_prunings: int,
        cost: int,
        target: int,
        make_masks: Callable[[nn.Module, int], Masks],
    ) -> None:
        super().__init__(shape, n_prunings)
        self.cost = cost
        self.target = target
        self.make_masks = make_masks

    def grow_masks(self, model: nn.Module, share: float) -> Masks:
        """Masks what the budget that is due asks for, and all that was masked.

        Args:
            model: The network, as trained so far.
            share: Of what has to go, what is gone afterwards, in (0, 1].

        Returns:
            The new masks.
        """
        # What is due by now, between the dense cost and the target.
        budget = round(self.cost - share * (self.cost - self.target))
        before = self.masks.kept
        kept = {}
        for name, mask in self.make_masks(model, budget).kept.items():
            # A large unit may have saved more than was due then, and more than is now:
            # it would come back.
            kept[name] = mask & before.get(name, mask)
        return Masks(kept)


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
        importance: From a network to scores per channel and group, higher is kept.

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
    ) -> None:
        super().__init__(shape, n_prunings)
        self.groups = groups
        self.goal = goal
        self.importance = importance
        # All of them until the first pruning.
        self.kept: KeptIndices = {
            name: torch.arange(groups[name].channels) for name in goal
        }

    def grow_masks(self, model: nn.Module, share: float) -> Masks:
        """Ranks the channels that are left, and masks the least of each group.

        With 16 channels, a goal of 4 and a share of 0.5, 10 of them are left.

        Args:
            model: The network, as trained so far.
            share: Of what has to go, what is gone afterwards, in (0, 1].

        Returns:
            The new masks.
        """
        importance = self.importance(model)
        scores = {}
        counts = {}
        for name, goal in self.goal.items():
            is_gone = removal_mask(self.groups[name], self.kept)
            counts[name] = round(len(is_gone) - share * (len(is_gone) - goal))
            # Below everything that is left, so that no channel comes back.
            scores[name] = importance[name].masked_fill(is_gone, -torch.inf)
        self.kept = top_channels(scores, counts)
        return channel_masks(self.groups, self.kept)

    def state_dict(self) -> dict:
        """Returns the channels that are left."""
        # Masks follow from them, and would be as large as the network.
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: dict) -> None:
        """Takes over the channels, and masks the others."""
        self.kept = state["kept"]
        self.masks = channel_masks(self.groups, self.kept)


def channel_masks(groups: Groups, kept: KeptIndices) -> Masks:
    """Makes masks over every parameter in which removed channels sit.

    Args:
        groups: The network's trace.
        kept: Prunable group to the surviving channels; groups left out keep all.

    Returns:
        The masks; parameters of which nothing is removed are left out.
    """
    masks: dict[str, Tensor] = {}
    for group in groups:
        is_gone = removal_mask(group, kept)
        if not is_gone.any():
            continue
        for member in group.members:
            # Running statistics aren't trained, so they need no mask.
            if member.tensor not in groups.parameters:
                continue
            if member.tensor not in masks:
                shape = groups.shapes[member.tensor]
                masks[member.tensor] = torch.ones(shape, dtype=torch.bool)
            # A view, so that what is written there is written into the mask.
            channels_first = masks[member.tensor].movedim(member.axis, 0)
            channels_first[member.index[is_gone].flatten()] = False
    return Masks(masks)
