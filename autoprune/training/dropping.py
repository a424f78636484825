"""Drop Out and Drop Connect as pruning: channels or weights that come and go at random.

Targeted dropout (Gomez et al. 2019, "Learning Sparse Networks Using Targeted Dropout",
section 3): in each step, of the smallest channels or weights of a layer, each is
dropped with some probability. The network learns not to need what pruning will take.
With a share of 1 it is plain Drop Out (Srivastava et al. 2014) or Drop Connect (Wan et
al. 2013), unscaled: what is pruned later isn't made up for by a larger rest either.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autoprune.errors import UserError, check_share
from autoprune.structure.groups import Group, Groups
from autoprune.training.loop import TrainingCallback


class Dropping(TrainingCallback):
    """Multiplies weights by random masks during a step's forward and backward pass.

    The weights are back, bit for bit, before the optimizer moves them; what was dropped
    has no gradient then. The masks come from the global random generator, which the
    training loop seeds.

    Args:
        groups: The network's trace.
        rate: Probability in [0, 1) with which a candidate is dropped.
        share: Of a layer's weights or a group's channels, the smallest of which are
            candidates, in (0, 1].

    Raises:
        UserError: If a number is out of its range.
    """

    def __init__(self, groups: Groups, rate: float, share: float) -> None:
        if not 0 <= rate < 1:
            raise UserError(
                "sparse.strength",
                f"of dropping it is a probability, from 0 to below 1; got {rate:g}",
            )
        check_share("sparse.share", share)
        self.groups = groups
        self.rate = rate
        self.share = share
        # Parameter, its whole values and its mask, between forward pass and optimizer.
        self._dropped: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def masks(
        self, parameters: dict[str, nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Draws masks for one step.

        Args:
            parameters: The network's, by name.

        Yields:
            A parameter, and what to multiply it with, 0 or 1.
        """
        raise NotImplementedError

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Draws masks and multiplies the weights with them.

        Args:
            model: The network.
            step: Not used.
        """
        for parameter, mask in self.masks(dict(model.named_parameters())):
            # A new tensor, so that the whole values stay as they are, to the last bit.
            self._dropped.append((parameter, parameter.data, mask))
            parameter.data = parameter.data * mask

    def before_step(self, model: nn.Module, step: int) -> None:
        """Gives the weights back; the dropped ones get no gradient.

        Args:
            model: The network.
            step: Not used.
        """
        # Backwards: a parameter that two groups masked has its whole values first.
        for parameter, whole, mask in reversed(self._dropped):
            parameter.data = whole
            # It is that of the masked weights; the chain rule adds the mask's factor.
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        self._dropped.clear()

    def _kept(self, sizes: Tensor) -> Tensor:
        """Draws what stays of things of these sizes: 1 for that, 0 for the dropped.

        Only the smallest are candidates: with sizes 3, 1, 2, 4 and a share of 0.5 the
        second and the third.
        """
        n_candidates = round(self.share * sizes.numel())
        kept = torch.ones_like(sizes).flatten()
        # A stable sort, so that things of one size are candidates in their order.
        candidates = sizes.flatten().argsort(stable=True)[:n_candidates]
        kept[candidates] = (torch.rand(n_candidates) >= self.rate).to(kept.dtype)
        return kept.view_as(sizes)


class DropConnect(Dropping):
    """Drops single weights of convolutions and linear layers.

    The smallest |w| of each layer are the candidates.
    """

    def masks(
        self, parameters: dict[str, nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Draws a mask for the weight of every layer."""
        # By layer, or the layers with small weights would be dropped as a whole.
        for name in self.groups.positions_per_weight:
            yield parameters[name], self._kept(parameters[name].detach().abs())


class DropOut(Dropping):
    """Drops whole channels of the prunable groups: no weight reads them.

    The network then computes what the pruned one does, except where a norm, mean or
    softmax over channels, or the product of attention's queries and keys, reads a
    dropped channel: there it still counts.

    Candidates are the channels whose filters, of all layers that produce the channel,
    have the smallest L2 norm.
    """

    def masks(
        self, parameters: dict[str, nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Draws a mask for every weight that reads a group."""
        # Readers, not producers: a shift behind a zeroed filter would still be read.
        for group in self.groups:
            kept = self._kept(self._norms(parameters, group))
            for member in group.consumers:
                weight = parameters[member.tensor]
                # What the weight reads of other groups is left alone by this one.
                yield weight, member.spread(kept, weight, 1)

    def _norms(self, parameters: dict[str, nn.Parameter], group: Group) -> Tensor:
        """L2 norm of all filters that produce each channel, `(n_channels,)`."""
        # Of layers tied by a shortcut together: they lose the same channels.
        rows = []
        for member in self.groups.filters(group):
            weight = parameters[member.tensor].detach()
            rows.append(member.rows(weight).flatten(1))
        return torch.cat(rows, 1).norm(dim=1)
