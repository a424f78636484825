"""Compactors: 1x1 convolutions behind batch norms, identities that fold away exactly.

The structure of ResRep (Ding et al. 2021, section 3.2); which rows of a compactor go is
trained in `autoprune.training.resrep`. Convolution, batch norm and compactor are one
convolution again in the end, without the rows that are gone. Where we differ: folding
keeps the batch norm, with the statistics that it then has, rather than a bias, so the
architecture stays. Groups with a depthwise convolution or several producers, as at
shortcuts, have no compactor.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from autoprune.errors import UserError
from autoprune.evaluation.direct_norms import watch_direct_norms
from autoprune.evaluation.evaluate import in_eval_mode
from autoprune.structure.groups import Group, Groups, tensors_in

ConvNorm: TypeAlias = tuple[str, str]
"""The names of a convolution and of the batch norm behind it."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Compactor(nn.Conv2d):
    """A 1x1 convolution without bias that begins as the identity.

    Args:
        channels: How many come in and go out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1, bias=False)
        nn.init.dirac_(self.weight)

    @property
    def norms(self) -> Tensor:
        """Length of each row, `(n_channels,)`."""
        return self.weight.detach().flatten(1).norm(dim=1)


@torch.no_grad()
def eligible_pairs(
    model: nn.Module, groups: Groups, example: Tensor
) -> dict[str, ConvNorm]:
    """Finds the groups that can have a compactor.

    Exactly one convolution, not a grouped one, makes the channels; exactly one batch
    norm takes its output as it is.

    Args:
        model: The network; left as found.
        groups: Its trace.
        example: An input.

    Returns:
        Group to its convolution and batch norm, in the order of the groups.
    """
    modules = dict(model.named_modules())
    pairs: dict[str, ConvNorm] = {}
    for group in groups:
        pair = _pair(group, modules)
        if pair is not None:
            pairs[group.name] = pair

    # The trace knows who makes the channels and which norm they pass, but not whether
    # something stands between the two: that takes a run.
    direct = set()

    def add_direct(conv: nn.Module, norm: nn.Module) -> None:
        for conv_name, norm_name in pairs.values():
            if modules[conv_name] is conv and modules[norm_name] is norm:
                direct.add(norm_name)

    convs = [modules[conv] for conv, _ in pairs.values()]
    norms = [modules[norm] for _, norm in pairs.values()]
    with in_eval_mode(model), watch_direct_norms(convs, norms, add_direct):
        model(example)
    pairs = {name: pair for name, pair in pairs.items() if pair[1] in direct}

    # All at once first: mostly all pass, and one try is cheaper than one for each.
    if _are_only_readers(model, list(pairs.values()), example):
        return pairs
    passing = {}
    for name, pair in pairs.items():
        if _are_only_readers(model, [pair], example):
            passing[name] = pair
    return passing


@torch.no_grad()
def _are_only_readers(model: nn.Module, pairs: list[ConvNorm], example: Tensor) -> bool:
    """Whether nothing but its batch norm reads what each convolution makes.

    Doubling it, and what the norm expects of it, must then leave the output as it is.
    """
    # In float64, so that rounding isn't taken for another reader.
    plain = copy.deepcopy(model).double().eval()
    expected = tensors_in(plain(example.double()))
    for conv_name, norm_name in pairs:
        conv = _submodule(plain, conv_name, nn.Conv2d)
        norm = _submodule(plain, norm_name, nn.BatchNorm2d)
        running_mean, running_var = _statistics(norm)
        for tensor in (*conv.parameters(), running_mean):
            tensor.mul_(2)
        # The norm divides by the root of variance plus eps: the sum has to be 4 times
        # as large, not the variance alone.
        running_var.add_(norm.eps).mul_(4).sub_(norm.eps)
    doubled = tensors_in(plain(example.double()))
    for before, after in zip(expected, doubled, strict=True):
        if not torch.allclose(before, after, rtol=1e-9, atol=1e-9):
            return False
    return True


def _pair(group: Group, modules: Mapping[str, nn.Module]) -> ConvNorm | None:
    """The one convolution and the one batch norm of a group, if they can be folded."""
    producers = _module_names(group, "produce")
    followers = _module_names(group, "follow")
    if len(producers) != 1 or len(followers) != 1:
        return None
    conv_name = producers.pop()
    norm_name = followers.pop()
    conv = modules.get(conv_name)
    norm = modules.get(norm_name)
    # Of exactly these types: a subclass may compute something else.
    if type(conv) is not nn.Conv2d or conv.groups != 1:
        return None
    if type(norm) is not nn.BatchNorm2d or norm.num_features != group.channels:
        return None
    # Folding writes into the norm's scale, shift and statistics.
    if not (norm.affine and norm.track_running_stats):
        return None
    # Channel i has to be row i of every tensor, as it is of the compactor.
    whole = torch.arange(group.channels)[:, None]
    for member in group.members:
        if member.role != "consume" and not torch.equal(member.index, whole):
            return None
    return conv_name, norm_name


def _module_names(group: Group, role: str) -> set[str]:
    """The modules whose tensors have a role in a group."""
    names = set()
    for member in group.members:
        if member.role == role:
            names.add(member.tensor.rpartition(".")[0])
    return names


def _submodule(model: nn.Module, name: str, kind: type[ModuleT]) -> ModuleT:
    """The submodule of a name, which has to be of a kind."""
    module = model.get_submodule(name)
    assert isinstance(module, kind), f"{name} is no {kind.__name__}"
    return module


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Running mean and variance, which are there in every `eligible_pairs`' norm."""
    assert norm.running_mean is not None, "the norm tracks statistics"
    assert norm.running_var is not None, "the norm tracks statistics"
    return norm.running_mean, norm.running_var


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one with that name."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def insert_compactors(
    model: nn.Module, groups: Groups, pairs: Mapping[str, ConvNorm]
) -> nn.Module:
    """Makes a copy with an identity compactor behind the batch norm of each pair.

    A norm `bn1` becomes a sequence of which the norm is `bn1.0`, the compactor `bn1.1`.

    Args:
        model: The network; left as found.
        groups: Its trace.
        pairs: See `eligible_pairs`.

    Returns:
        The copy.

    Raises:
        UserError: If there is no pair.
    """
    grown = copy.deepcopy(model)
    if not pairs:
        raise UserError(
            "removal.method",
            "no group is made by one convolution with its batch norm; use slice",
        )
    for name, (_, norm_name) in pairs.items():
        norm = grown.get_submodule(norm_name)
        compactor = Compactor(groups[name].channels)
        _replace(grown, norm_name, nn.Sequential(norm, compactor))
    return grown


@torch.no_grad()
def fold(grown: nn.Module, pairs: Mapping[str, ConvNorm]) -> nn.Module:
    """Makes a copy in which each convolution has taken up its norm and compactor.

    It has the plain architecture and is exact in eval mode. The batch norms have mean 0
    and variance 1 then, see `standardise`.

    A norm of scale s and shift t turns a convolution's y into s * y + t, a compactor of
    rows R that into R s * y + R t. So R s goes into the convolution's weights, R t into
    the norm's shift, and the norm does nothing else.

    Args:
        grown: The network from `insert_compactors`, trained; left as found.
        pairs: Those that it was made with.

    Returns:
        The copy.
    """
    plain = copy.deepcopy(grown)
    for conv_name, norm_name in pairs.values():
        conv = _submodule(plain, conv_name, nn.Conv2d)
        norm = _submodule(plain, f"{norm_name}.0", nn.BatchNorm2d)
        compactor = _submodule(plain, f"{norm_name}.1", Compactor)
        running_mean, running_var = _statistics(norm)
        scale = norm.weight / (running_var + norm.eps).sqrt()
        shift = norm.bias - running_mean * scale
        if conv.bias is not None:
            # It passes the norm's scale as the convolution's output does.
            shift = shift + conv.bias * scale
            conv.bias.zero_()
        rows = compactor.weight[:, :, 0, 0]
        conv.weight.copy_(torch.einsum("oi,ichw->ochw", rows * scale, conv.weight))
        norm.bias.copy_(rows @ shift)
        running_mean.zero_()
        running_var.fill_(1)
        # The norm divides by the root of 1 + eps, which this undoes.
        norm.weight.fill_((1 + norm.eps) ** 0.5)
        _replace(plain, norm_name, norm)
    return plain


@dataclass
class _Moments:
    """What a batch norm has read so far, float64 by channel.

    Attributes:
        n: Number of values of a channel.
        sums: Their sums, `(n_channels,)`.
        squares: The sums of their squares, `(n_channels,)`.
    """

    n: int
    sums: Tensor
    squares: Tensor


@torch.no_grad()
def standardise(model: nn.Module, norms: list[str], inputs: Tensor) -> None:
    """Gives batch norms the mean and variance that they really read, in place.

    Nothing changes in eval mode: scale and shift make up for it. Afterwards their
    statistics may be measured anew, and training goes on as from any network.

    Args:
        model: The network, from `fold`.
        norms: Names of its batch norms.
        inputs: Normalised calibration images `(n, 3, height, width)`.
    """
    moments: dict[nn.Module, _Moments] = {}
    layers = [_submodule(model, name, nn.BatchNorm2d) for name in norms]
    for layer in layers:
        zeros = torch.zeros(layer.num_features, dtype=torch.float64)
        moments[layer] = _Moments(0, zeros, zeros)

    def add_moments(layer: nn.Module, args: tuple[Tensor]) -> None:
        rows = args[0].movedim(1, 0).flatten(1).double()
        layer_moments = moments[layer]
        layer_moments.n += rows.shape[1]
        layer_moments.sums = layer_moments.sums + rows.sum(1)
        layer_moments.squares = layer_moments.squares + rows.square().sum(1)

    hooks = [layer.register_forward_pre_hook(add_moments) for layer in layers]
    try:
        with in_eval_mode(model):
            # In parts, so that the activations fit into memory.
            for batch in inputs.split(500):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    # After all passes: until then the hooks have to see the network as it was.
    for layer in layers:
        _set_statistics(layer, moments[layer])


def _set_statistics(layer: nn.BatchNorm2d, moments: _Moments) -> None:
    """Writes measured statistics into a batch norm that goes on computing the same."""
    running_mean, running_var = _statistics(layer)
    mean = moments.sums / moments.n
    # Rounding may take the variance of a constant channel below zero.
    variance = (moments.squares / moments.n - mean.square()).clamp_min(0)
    scale = layer.weight.double() / (running_var.double() + layer.eps).sqrt()
    shift = scale * (mean - running_mean.double())
    layer.bias.add_(shift.to(layer.bias.dtype))
    layer.weight.copy_(scale * (variance + layer.eps).sqrt())
    running_mean.copy_(mean)
    running_var.copy_(variance)
