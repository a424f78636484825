"""Sparse training: what a method adds to a step so that some weights or channels become
dispensable.

`SPARSE[name].plug(groups, strength, share)` takes part in
`autoprune.training.loop.finetune`. Penalties add their gradient to that of the loss; it
passes through momentum as in the papers' code. Global Sparse Momentum takes the loss's
gradient away from all but the most useful weights. Afterwards the network has its old
shape; a criterion and an allocation say what goes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.errors import check_known, check_share
from autoprune.evaluation.evaluate import BatchNorm
from autoprune.structure.groups import Group, Groups, Member
from autoprune.training.dropping import DropConnect, DropOut
from autoprune.training.loop import TrainingCallback, parameter_groups

EPSILON = 1e-12


class Penalty(TrainingCallback):
    """Adds `strength` times a pull towards zero to the gradients of some parameters.

    Attributes:
        strength: The penalty's factor; the weights shrink by learning rate times
            strength times the pull, and by 1 / (1 - momentum) as much in the long run.
    """

    def __init__(self, groups: Groups, strength: float):
        self.groups, self.strength = groups, strength

    def before_step(self, model: nn.Module, step: int) -> None:
        """Adds the pull."""
        with torch.no_grad():
            for parameter, pull in self.pulls(model):
                if parameter.grad is not None:
                    parameter.grad.add_(pull, alpha=self.strength)

    def pulls(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters, and the penalty's gradient for each at strength 1."""
        raise NotImplementedError


class L1(Penalty):
    """The sum of |w| over convolutions and linear layers: a constant pull, which
    reaches zero.
    """

    def pulls(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        return [(weight, weight.sign()) for weight in _weights(model, self.groups)]


class L2(Penalty):
    """Half the sum of w^2, beside the usual weight decay: a pull in proportion, which
    never reaches zero.
    """

    def pulls(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        return [(weight, weight.detach()) for weight in _weights(model, self.groups)]


class Slimming(Penalty):
    """Network Slimming, Liu et al. 2017, eq. 1: the sum of |gamma| over batch norms."""

    def pulls(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        scales = [
            m.weight
            for m in model.modules()
            if isinstance(m, BatchNorm) and m.weight is not None
        ]
        return [(scale, scale.sign()) for scale in scales]


class GroupLasso(Penalty):
    """The sum of channels' norms (Wen et al. 2016, eq. 2): a channel is pulled as a
    whole, with constant force.

    A channel's weights are those of all filters that produce it, so that layers tied by
    a shortcut lose the same ones.
    """

    def pulls(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        return _channel_pulls(
            model,
            self.groups,
            self.groups.filters,
            lambda squares: squares.add(EPSILON).rsqrt(),
        )


class GroupDecay(Penalty):
    """DepGraph's group sparsity, Fang et al. 2023, eq. 4: all weights that go with a
    channel decay together.

    The decay is 1 for a group's largest channel and 2^4 for its smallest. Usual weight
    decay is off meanwhile, as in the paper's code, whose gradient (without the factor 2
    of the square's derivative) this is.
    """

    GROWTH = 4.0

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """The usual ones without weight decay."""
        return [
            options | {"weight_decay": 0.0}
            for options in parameter_groups(model, config)
        ]

    def pulls(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        return _channel_pulls(
            model, self.groups, lambda group: group.members, self._decay
        )

    def _decay(self, squares: Tensor) -> Tensor:
        small, large = squares.aminmax()
        return 2 ** (
            self.GROWTH * (large - squares) / (large - small).clamp_min(EPSILON)
        )


class GlobalSparseMomentum(TrainingCallback):
    """GSM-SGD, Ding et al. 2019, section 3.2: only the most useful weights are trained,
    all others decay to zero.

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
    """

    MOMENTUM = 0.98

    def __init__(self, groups: Groups, strength: float, share: float):
        check_share("sparse.share", share)
        self.groups, self.strength, self.share = groups, strength, share

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """The usual ones with this method's momentum, and its decay where there is any."""
        own = {"momentum": self.MOMENTUM, "nesterov": False}
        usual = parameter_groups(model, config)
        return [
            group
            | own
            | {"weight_decay": self.strength if group["weight_decay"] else 0.0}
            for group in usual
        ]

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        """Zeroes the gradients of all but the most useful weights."""
        weights = [
            weight for weight in _weights(model, self.groups) if weight.grad is not None
        ]
        saliency = torch.cat(
            [(weight * weight.grad).abs().flatten() for weight in weights]
        )
        active = torch.zeros_like(saliency, dtype=torch.bool)
        active[saliency.topk(max(1, round(self.share * len(saliency)))).indices] = True
        for weight, mask in zip(
            weights, active.split([weight.numel() for weight in weights]), strict=True
        ):
            weight.grad.mul_(mask.view_as(weight))


def _weights(model: nn.Module, groups: Groups) -> list[nn.Parameter]:
    """The trained weights of convolutions and linear layers, whatever they are called."""
    parameters = dict(model.named_parameters())
    return [
        parameters[name] for name in groups.applied if parameters[name].requires_grad
    ]


def _channel_pulls(
    model: nn.Module,
    groups: Groups,
    members_of: Callable[[Group], Iterable[Member]],
    factor: Callable[[Tensor], Tensor],
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each channel's weights, in some members of its group, times a factor of their
    summed squares `(n_channels,)`.
    """
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pulls = []
    for group in groups:
        parts = [
            (m, tensors[m.tensor], tensors[m.tensor].detach())
            for m in members_of(group)
            if m.tensor in tensors
        ]
        factors = factor(
            sum(
                member.rows(values).square().flatten(1).sum(1)
                for member, _, values in parts
            )
        )
        pulls += [
            (weight, values * member.laid(factors, values, 0))
            for member, weight, values in parts
        ]
    return pulls


@dataclass(frozen=True)
class SparseMethod:
    """A way to train sparsely.

    Attributes:
        plug: From trace, strength and share (see `SparseConfig`) to what takes part in
            the training.
        strength: The usual one for a few epochs from a trained network; the papers
            train for hundreds, with less.
        share: The usual one; None for that of the budget.
    """

    callback: Callable[[Groups, float, float], TrainingCallback]
    strength: float
    share: float | None = None


def _penalty(kind: type[Penalty]) -> Callable[[Groups, float, float], TrainingCallback]:
    return lambda groups, strength, share: kind(groups, strength)


SPARSE: dict[str, SparseMethod] = {
    "l1": SparseMethod(_penalty(L1), 1e-4),
    "l2": SparseMethod(_penalty(L2), 5e-3),
    "group_lasso": SparseMethod(_penalty(GroupLasso), 2e-3),
    "slimming": SparseMethod(_penalty(Slimming), 2e-3),
    "group_decay": SparseMethod(_penalty(GroupDecay), 5e-4),
    "gsm": SparseMethod(GlobalSparseMomentum, 2e-3),
    "drop_out": SparseMethod(DropOut, 0.5, 0.5),
    "drop_connect": SparseMethod(DropConnect, 0.5, 0.5),
}


def check_sparse(name: str) -> None:
    """Raises a `UserError` that offers the nearest method unless `name` is known, or
    "none".
    """
    check_known("method", name, ["none", *SPARSE], "sparse.method")
