"""Compactors: 1x1 convolutions behind batch norms, put in as identities and folded away
exactly.

The structure of ResRep (Ding et al. 2021, section 3.2); which rows of a compactor go is
trained in `autoprune.training.resrep`. Convolution, batch norm and compactor are one
convolution again in the end, without the rows that are gone. Where we differ: folding
keeps the batch norm, with the statistics that it then has, rather than a bias, so the
architecture stays. Groups with a depthwise convolution or several producers, as at
shortcuts, have no compactor.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoprune.errors import UserError
from autoprune.evaluation.evaluate import in_eval_mode
from autoprune.structure.groups import Group, Groups, tensors_in


class Compactor(nn.Conv2d):
    """A 1x1 convolution without bias that begins as the identity.

    Args:
        channels: How many come in and go out.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 1, bias=False)
        nn.init.dirac_(self.weight)

    @property
    def norms(self) -> Tensor:
        """Length of each row, `(n_channels,)`."""
        return self.weight.detach().flatten(1).norm(dim=1)


@torch.no_grad()
def eligible(
    model: nn.Module, groups: Groups, example: Tensor
) -> dict[str, tuple[str, str]]:
    """The groups that can have a compactor: their names to those of the convolution and
    the batch norm behind it.

    Exactly one convolution, not a grouped one, makes the channels; exactly one batch
    norm takes its output as it is.
    """
    modules = dict(model.named_modules())
    pairs = {group.name: _pair(group, modules) for group in groups}
    pairs = {name: pair for name, pair in pairs.items() if pair is not None}
    made: dict[int, tuple[str, Tensor, int]] = {}
    direct = set()

    def make(name: str):
        return lambda module, args, out: made.__setitem__(
            id(out), (name, out, out._version)
        )

    def take(conv: str, norm: str):
        def hook(module: nn.Module, args: tuple) -> None:
            name, out, version = made.get(id(args[0]), ("", None, 0))
            if name == conv and out._version == version:  # and not rectified in place
                direct.add(norm)

        return hook

    hooks = [
        modules[conv].register_forward_hook(make(conv)) for conv, _ in pairs.values()
    ]
    hooks += [
        modules[norm].register_forward_pre_hook(take(conv, norm))
        for conv, norm in pairs.values()
    ]
    try:
        with in_eval_mode(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = {name: pair for name, pair in pairs.items() if pair[1] in direct}
    if _are_only_readers(model, list(pairs.values()), example):
        return pairs
    return {
        name: pair
        for name, pair in pairs.items()
        if _are_only_readers(model, [pair], example)
    }


@torch.no_grad()
def _are_only_readers(
    model: nn.Module, pairs: list[tuple[str, str]], example: Tensor
) -> bool:
    """Whether doubling what convolutions make, and what their batch norms expect of it,
    changes nothing.
    """
    plain = copy.deepcopy(model).double().eval()
    expected = tensors_in(plain(example.double()))
    for conv_name, norm_name in pairs:
        conv, norm = plain.get_submodule(conv_name), plain.get_submodule(norm_name)
        for tensor in (*conv.parameters(), norm.running_mean):
            tensor.mul_(2)
        norm.running_var.add_(norm.eps).mul_(4).sub_(norm.eps)
    found = tensors_in(plain(example.double()))
    return all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-9)
        for a, b in zip(expected, found, strict=True)
    )


def _pair(group: Group, modules: dict[str, nn.Module]) -> tuple[str, str] | None:
    makers = {m.tensor.rpartition(".")[0] for m in group.members if m.role == "produce"}
    norms = {m.tensor.rpartition(".")[0] for m in group.members if m.role == "follow"}
    if len(makers) != 1 or len(norms) != 1:
        return None
    (conv,), (norm,) = makers, norms
    is_plain = type(modules.get(conv)) is nn.Conv2d and modules[conv].groups == 1
    whole = torch.arange(group.channels)[:, None]
    own = all(torch.equal(m.index, whole) for m in group.members if m.role != "consume")
    is_whole = (
        own
        and type(modules.get(norm)) is nn.BatchNorm2d
        and modules[norm].num_features == group.channels
    )
    folds = (
        is_plain
        and is_whole
        and modules[norm].affine
        and modules[norm].track_running_stats
    )
    return (conv, norm) if folds else None


def insert_compactors(
    model: nn.Module, groups: Groups, pairs: Mapping[str, tuple[str, str]]
) -> nn.Module:
    """A copy with an identity compactor behind the batch norm of every `eligible`
    group.

    Raises:
        UserError: If there is none.
    """
    grown = copy.deepcopy(model)
    if not pairs:
        raise UserError(
            "removal.method",
            "no group is made by one convolution with its batch norm; use slice",
        )
    for name, (_, norm) in pairs.items():
        parent, _, attribute = norm.rpartition(".")
        layer = grown.get_submodule(norm)
        setattr(
            grown.get_submodule(parent),
            attribute,
            nn.Sequential(layer, Compactor(groups[name].channels)),
        )
    return grown


@torch.no_grad()
def fold(grown: nn.Module, pairs: Mapping[str, tuple[str, str]]) -> nn.Module:
    """A copy of the plain architecture: each convolution, batch norm and compactor are
    one; exact in eval mode.

    The batch norms have mean 0 and variance 1 then, see `standardise`.
    """
    plain = copy.deepcopy(grown)
    for conv_name, norm_name in pairs.values():
        conv, (norm, compactor) = (
            plain.get_submodule(conv_name),
            plain.get_submodule(norm_name),
        )
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            shift = shift + conv.bias * scale
            conv.bias.zero_()
        rows = compactor.weight[:, :, 0, 0]
        conv.weight.copy_(torch.einsum("oi,ichw->ochw", rows * scale, conv.weight))
        norm.bias.copy_(rows @ shift)
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.weight.fill_((1 + norm.eps) ** 0.5)
        parent, _, attribute = norm_name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, norm)
    return plain


@torch.no_grad()
def standardise(model: nn.Module, norms: list[str], inputs: Tensor) -> None:
    """Gives batch norms the mean and variance that they really read, in place, and
    changes nothing in eval mode.

    Afterwards their statistics may be measured anew, and training goes on as from any
    network.

    Args:
        model: The network, from `fold`.
        norms: Names of its batch norms.
        inputs: Normalised calibration images.
    """
    layers = [model.get_submodule(name) for name in norms]
    moments = {layer: [0, 0.0, 0.0] for layer in layers}

    def read(layer: nn.Module, args: tuple) -> None:
        rows = args[0].movedim(1, 0).flatten(1).double()
        seen = moments[layer]
        moments[layer] = [
            seen[0] + rows.shape[1],
            seen[1] + rows.sum(1),
            seen[2] + rows.square().sum(1),
        ]

    hooks = [layer.register_forward_pre_hook(read) for layer in layers]
    try:
        with in_eval_mode(model):
            for batch in inputs.split(500):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, (n, total, squares) in moments.items():
        mean = total / n
        variance = (squares / n - mean.square()).clamp_min(0)
        scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
        layer.bias.add_(
            (scale * (mean - layer.running_mean.double())).to(layer.bias.dtype)
        )
        layer.weight.copy_(scale * (variance + layer.eps).sqrt())
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
