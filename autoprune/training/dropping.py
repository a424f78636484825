"""Drop Out and Drop Connect as pruning: neurons or connections that come and go at
random while the network trains.

Targeted dropout (Gomez et al. 2019, "Learning Sparse Networks Using Targeted Dropout",
section 3): in each step, of the least channels or weights of a layer, each is dropped
with some probability. The network learns not to need what pruning will take. With a
share of 1 it is plain Drop Out (Srivastava et al. 2014) or Drop Connect (Wan et al.
2013), unscaled: what is pruned later isn't made up for by a larger rest either.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autoprune.errors import UserError, check_share
from autoprune.structure.groups import Group, Groups
from autoprune.training.loop import TrainingCallback


class Dropping(TrainingCallback):
    """Multiplies weights by random masks for the forward and the backward pass of a
    step.

    The weights are back, bit for bit, before the optimizer moves them; what was dropped
    has no gradient then. The masks come from the global random generator, which the
    training loop seeds.

    Args:
        groups: The network's trace.
        rate: Probability in [0, 1) with which a candidate is dropped.
        share: Of a layer's weights or a group's channels, the least of which are
            candidates, in (0, 1].

    Raises:
        UserError: If a number is out of its range.
    """

    def __init__(self, groups: Groups, rate: float, share: float):
        if not 0 <= rate < 1:
            raise UserError(
                "sparse.strength",
                f"of dropping it is a probability, from 0 to below 1; got {rate:g}",
            )
        check_share("sparse.share", share)
        self.groups, self.rate, self.share = groups, rate, share
        self._dropped: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def masks(
        self, parameters: dict[str, nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters, and what to multiply each with, 0 or 1."""
        raise NotImplementedError

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Draws masks and lays them over the weights."""
        for parameter, mask in self.masks(dict(model.named_parameters())):
            self._dropped.append((parameter, parameter.data, mask))
            parameter.data = parameter.data * mask

    def before_step(self, model: nn.Module, step: int) -> None:
        """Gives the weights back; the dropped ones get no gradient."""
        for parameter, whole, mask in reversed(self._dropped):
            parameter.data = whole
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        self._dropped.clear()

    def _kept(self, sizes: Tensor) -> Tensor:
        """Float 1 for what stays of things of these sizes, 0 for what is dropped among
        the least of them.
        """
        n_candidates = round(self.share * sizes.numel())
        kept = torch.ones_like(sizes).flatten()
        candidates = sizes.flatten().argsort(stable=True)[:n_candidates]
        kept[candidates] = (torch.rand(n_candidates) >= self.rate).to(kept.dtype)
        return kept.view_as(sizes)


class DropConnect(Dropping):
    """Drops single weights of convolutions and linear layers, the least |w| of each
    layer first.
    """

    def masks(
        self, parameters: dict[str, nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name in self.groups.applied:
            yield parameters[name], self._kept(parameters[name].detach().abs())


class DropOut(Dropping):
    """Drops whole channels of the prunable groups: no weight reads them.

    The network then computes what the pruned one does, except where a norm, mean or
    softmax over channels, or the product of attention's queries and keys, reads a
    dropped channel: there it still counts.

    The least are those whose filters, of all layers that produce the channel, have the
    smallest L2 norm.
    """

    def masks(
        self, parameters: dict[str, nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for group in self.groups:
            kept = self._kept(self._norms(parameters, group))
            for member in group.consumers:
                yield (
                    parameters[member.tensor],
                    member.laid(kept, parameters[member.tensor], 1),
                )

    def _norms(self, parameters: dict[str, nn.Parameter], group: Group) -> Tensor:
        rows = [
            m.rows(parameters[m.tensor].detach()).flatten(1)
            for m in self.groups.filters(group)
        ]
        return torch.cat(rows, 1).norm(dim=1)
