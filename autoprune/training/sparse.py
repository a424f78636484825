"""Sparse training: a step is changed so that some weights or channels lose importance.

`SPARSE[name].callback(groups, strength, share)` makes the callback that takes part in
`autoprune.training.loop.finetune`. Penalties add their gradient to that of the loss; it
passes through momentum as in the papers' code. Global Sparse Momentum takes the loss's
gradient away from all but the most useful weights. Afterwards the network has its old
shape; a criterion and an allocation say what goes.

To add a method, write a `Penalty` with its `pulls`, or any other `TrainingCallback`,
and give it a line in `SPARSE`. The option `sparse.method` knows it by that name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.errors import check_known, check_share
from autoprune.evaluation.evaluate import BatchNorm
from autoprune.structure.groups import Group, Groups, Member
from autoprune.training.dropping import DropConnect, DropOut
from autoprune.training.loop import TrainingCallback, parameter_groups

EPSILON = 1e-12
"""Keeps divisions finite where all weights of a channel are zero."""

Pull: TypeAlias = tuple[nn.Parameter, Tensor]
"""A parameter, and a penalty's gradient for it at strength 1, of its shape."""


class Penalty(TrainingCallback):
    """Adds `strength` times a pull towards zero to the gradients of some parameters.

    Args:
        groups: The network's trace.
        strength: The penalty's factor; the weights shrink by learning rate times
            strength times the pull, and by 1 / (1 - momentum) as much in the long run.
    """

    def __init__(self, groups: Groups, strength: float) -> None:
        self.groups = groups
        self.strength = strength

    def before_step(self, model: nn.Module, step: int) -> None:
        """Adds the pull.

        Args:
            model: The network, whose gradients are those of the loss.
            step: Not used.
        """
        with torch.no_grad():
            for parameter, pull in self.pulls(model):
                # A part of the network that the loss didn't reach has no gradient.
                if parameter.grad is not None:
                    parameter.grad.add_(pull, alpha=self.strength)

    def pulls(self, model: nn.Module) -> list[Pull]:
        """Computes the penalty's gradient for each parameter that it acts on."""
        raise NotImplementedError


class L1(Penalty):
    """The sum of |w| over convolutions and linear layers.

    A constant pull, which reaches zero.
    """

    def pulls(self, model: nn.Module) -> list[Pull]:
        """The weights' signs."""
        return [(weight, weight.sign()) for weight in _weights(model, self.groups)]


class L2(Penalty):
    """Half the sum of w^2 over convolutions and linear layers, beside weight decay.

    A pull in proportion, which never reaches zero.
    """

    def pulls(self, model: nn.Module) -> list[Pull]:
        """The weights themselves."""
        return [(weight, weight.detach()) for weight in _weights(model, self.groups)]


class Slimming(Penalty):
    """Network Slimming, Liu et al. 2017, eq. 1: the sum of |gamma| over batch norms."""

    def pulls(self, model: nn.Module) -> list[Pull]:
        """The signs of the batch norms' scales."""
        pulls = []
        for module in model.modules():
            # A batch norm may have no scale of its own.
            if isinstance(module, BatchNorm) and module.weight is not None:
                pulls.append((module.weight, module.weight.sign()))
        return pulls


class GroupLasso(Penalty):
    """The sum of channels' norms (Wen et al. 2016, eq. 2).

    A channel is pulled as a whole, with constant force. Its weights are those of all
    filters that produce it, so that layers tied by a shortcut lose the same ones.
    """

    def pulls(self, model: nn.Module) -> list[Pull]:
        """Each channel's weights over their norm: (3, 4) is pulled by (0.6, 0.8)."""
        return _channel_pulls(model, self.groups, self.groups.filters, _inverse_norm)


def _inverse_norm(squares: Tensor) -> Tensor:
    """One over the norm, from summed squares."""
    return squares.add(EPSILON).rsqrt()


class GroupDecay(Penalty):
    """DepGraph's group sparsity, Fang et al. 2023, eq. 4.

    All weights that go with a channel decay together. The decay is 1 for a group's
    largest channel and 2^4 for its smallest. Usual weight decay is off meanwhile, as in
    the paper's code, whose gradient (without the factor 2 of the square's derivative)
    this is.
    """

    GROWTH = 4.0
    """Exponent of the smallest channel's decay."""

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """Returns the usual groups without weight decay.

        Args:
            model: The network that will be trained.
            config: Its training.

        Returns:
            Groups as `torch.optim.SGD` takes them.
        """
        # Weight decay would pull at all channels alike, this penalty tells them apart.
        usual = parameter_groups(model, config)
        return [options | {"weight_decay": 0.0} for options in usual]

    def pulls(self, model: nn.Module) -> list[Pull]:
        """Each channel's weights times its decay."""
        return _channel_pulls(model, self.groups, _all_members, self._decay)

    def _decay(self, squares: Tensor) -> Tensor:
        """Decay of each channel of a group: summed squares 1, 5, 9 give 16, 4, 1."""
        small, large = squares.aminmax()
        # Channels of one size would divide by zero; they all get 1.
        spread = (large - small).clamp_min(EPSILON)
        return 2 ** (self.GROWTH * (large - squares) / spread)


def _all_members(group: Group) -> Iterable[Member]:
    """Every place where a group's channels sit, biases and batch norm included."""
    return group.members


class GlobalSparseMomentum(TrainingCallback):
    """GSM-SGD, Ding et al. 2019, section 3.2: only the most useful weights are trained.

    In each step |w dL/dw| ranks the weights of all convolutions and linear layers; the
    gradients of those beyond the `share` are zeroed, so weight decay alone moves them,
    accelerated by a momentum of 0.98 without Nesterov's step. A weight that becomes
    useful again is trained again.

    A decaying weight approaches zero from its side only while learning rate times
    `strength` is at most (1 - sqrt(0.98))^2, about 1e-4; above, it swings through.

    Args:
        groups: The network's trace.
        strength: Weight decay.
        share: Of the weights that are trained in a step, in (0, 1].

    Raises:
        UserError: If the share is out of its range.
    """

    MOMENTUM = 0.98

    def __init__(self, groups: Groups, strength: float, share: float) -> None:
        check_share("sparse.share", share)
        self.groups = groups
        self.strength = strength
        self.share = share

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """Returns the usual groups with this method's momentum and weight decay.

        Args:
            model: The network that will be trained.
            config: Its training.

        Returns:
            Groups as `torch.optim.SGD` takes them.
        """
        groups = []
        for group in parameter_groups(model, config):
            # What usually doesn't decay, batch norm and biases, doesn't here either.
            decay = self.strength if group["weight_decay"] else 0.0
            options = {
                "momentum": self.MOMENTUM,
                "nesterov": False,
                "weight_decay": decay,
            }
            groups.append(group | options)
        return groups

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        """Zeroes the gradients of all but the most useful weights.

        Args:
            model: The network, whose gradients are those of the loss.
            step: Not used.
        """
        gradients = []
        saliencies = []
        for weight in _weights(model, self.groups):
            if weight.grad is not None:
                gradients.append(weight.grad)
                # The first-order change of the loss, were the weight zero.
                saliencies.append((weight * weight.grad).abs().flatten())
        saliency = torch.cat(saliencies)
        # One at least: with none, nothing would ever be learned.
        n_active = max(1, round(self.share * len(saliency)))
        is_active = torch.zeros_like(saliency, dtype=torch.bool)
        is_active[saliency.topk(n_active).indices] = True
        masks = is_active.split([gradient.numel() for gradient in gradients])
        # In place: the optimizer reads the parameters' own gradients.
        for gradient, mask in zip(gradients, masks, strict=True):
            gradient.mul_(mask.view_as(gradient))


def _weights(model: nn.Module, groups: Groups) -> list[nn.Parameter]:
    """The weights of convolutions and linear layers that aren't frozen.

    They come from the trace, not by name: a weight may be called anything.
    """
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in groups.positions_per_weight]
    return [weight for weight in weights if weight.requires_grad]


def _channel_pulls(
    model: nn.Module,
    groups: Groups,
    members_of: Callable[[Group], Iterable[Member]],
    factor: Callable[[Tensor], Tensor],
) -> list[Pull]:
    """Weights of each channel times a factor that depends on how large they are.

    Args:
        model: The network.
        groups: Its trace.
        members_of: From a group to the places whose weights count as the channel's.
        factor: From a group's summed squares `(n_channels,)` to its factors.

    Returns:
        The pull of every parameter, one for each of its places.
    """
    parameters = dict(model.named_parameters())
    pulls = []
    for group in groups:
        members = []
        squares = []
        for member in members_of(group):
            parameter = parameters.get(member.tensor)
            # Running statistics are no parameters, and what is frozen can't be pulled.
            if parameter is not None and parameter.requires_grad:
                members.append((member, parameter))
                rows = member.rows(parameter.detach())
                squares.append(rows.square().flatten(1).sum(1))
        # Where all is frozen there is nothing to pull.
        if not members:
            continue
        factors = factor(sum(squares[1:], start=squares[0]))
        for member, parameter in members:
            values = parameter.detach()
            # Zero where the group has no channel, as in other parts of a concatenation.
            pulls.append((parameter, values * member.spread(factors, values, 0)))
    return pulls


@dataclass(frozen=True)
class SparseMethod:
    """A way to train sparsely.

    Attributes:
        callback: From trace, strength and share (see `autoprune.config.SparseConfig`)
            to what takes part in the training.
        strength: The usual one for a few epochs from a trained network; the papers
            train for hundreds, with less.
        share: The usual one; None for that of the budget.
    """

    callback: Callable[[Groups, float, float], TrainingCallback]
    strength: float
    share: float | None = None


def _penalty(kind: type[Penalty]) -> Callable[[Groups, float, float], TrainingCallback]:
    """A penalty as `SparseMethod.callback` needs it: penalties know no share."""

    def make(groups: Groups, strength: float, share: float) -> TrainingCallback:
        return kind(groups, strength)

    return make


SPARSE: dict[str, SparseMethod] = {
    "l1": SparseMethod(_penalty(L1), 1e-4),
    "l2": SparseMethod(_penalty(L2), 5e-3),
    "group_lasso": SparseMethod(_penalty(GroupLasso), 2e-3),
    "slimming": SparseMethod(_penalty(Slimming), 2e-3),
    "group_decay": SparseMethod(_penalty(GroupDecay), 5e-4),
    # Trains as many weights as the budget leaves.
    "gsm": SparseMethod(GlobalSparseMomentum, 2e-3),
    # The strength of these two is the probability with which a candidate is dropped.
    "drop_out": SparseMethod(DropOut, 0.5, 0.5),
    "drop_connect": SparseMethod(DropConnect, 0.5, 0.5),
}
"""Name to method, in the order in which the command line lists them."""


def check_sparse(name: str) -> None:
    """Checks that a method is known, or "none".

    Raises:
        UserError: If it isn't; the message offers the nearest one.
    """
    check_known("method", name, ["none", *SPARSE], "sparse.method")
