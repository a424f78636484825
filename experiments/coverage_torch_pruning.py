"""The same builders with Torch-Pruning, as its README uses it.

Nothing is set by hand, no layer but the last ignored. Whether what it prunes is right
is decided by masks that are built from the indices that it removed: in a copy of the
dense network every convolution and linear layer reads zeros for the input channels that
it lost, and every layer norm runs over the channels that it kept.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from experiments.coverage_networks import Network, example, randomise
from experiments.coverage_tools import (
    Usage,
    describe_error,
    difference,
    n_params,
    outputs,
    time_limit,
)

PRUNING_RATIO = 0.3
TOLERANCE = 1e-4
# What these compute from fewer channels can't be had from masks of layers' inputs.
INCOMPARABLE = (nn.MultiheadAttention, nn.GroupNorm, nn.LSTM)


def compare(network: Network, limit_s: int) -> Iterator[dict]:
    """Prunes a network with Torch-Pruning and tells whether that is right.

    Args:
        network: The network.
        limit_s: CPU seconds that pruning may take.

    Yields:
        Columns as they become known, so that a crash leaves those before it.
    """
    torch.manual_seed(0)
    model = network.build()
    size = network.size(model)
    dense = randomise(model, size)
    model = copy.deepcopy(dense)
    x = example((1, 3, size, size))
    yield {"tp_runs": "no", "tp_right": "no"}
    survivors = Survivors(model)
    try:
        with time_limit(limit_s), Usage() as usage:
            _prune(model, x, survivors, ignored_layers(network, model))
        yield {
            "tp_seconds": usage.seconds,
            "tp_params_ratio": round(n_params(model) / n_params(dense), 4),
        }
        images = example((2, 3, size, size), seed=1)
        pruned = outputs(model.eval(), images)
        is_smaller = n_params(model) < n_params(dense)
        yield {"tp_runs": "yes" if is_smaller else "prunes nothing"}
        yield _verdict(dense, survivors, pruned, images)
    except Exception as error:  # whatever Torch-Pruning raises
        yield {"tp_failure": describe_error(error)}


def _prune(
    model: nn.Module, x: Tensor, survivors: "Survivors", ignored: list[nn.Module]
) -> None:
    """Prunes the network in place, and notes what survives."""
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=PRUNING_RATIO, ignored_layers=ignored
    )
    groups = pruner.step(interactive=True)
    assert groups is not None, "an interactive step yields groups"
    for group in groups:
        survivors.note(pruner.DG, group)
        group.prune()


def _verdict(
    dense: nn.Module, survivors: "Survivors", pruned: Tensor, x: Tensor
) -> dict:
    """Whether the pruned network's outputs are those of the masked dense one."""
    error = difference(pruned, outputs(survivors.masked(dense), x))
    if error >= TOLERANCE and survivors.incomparable:
        return {
            "tp_right": "not comparable",
            "tp_failure": f"prunes {survivors.incomparable}",
        }
    return {
        "tp_right": "yes" if error < TOLERANCE else "no",
        "tp_error": f"{error:.1e}",
    }


def ignored_layers(network: Network, model: nn.Module) -> list[nn.Module]:
    """The layers that make the output.

    By their width, or the whole pyramid of a detector's backbone.

    Args:
        network: Says which family it is.
        model: The network.
    """
    if network.family == "detection":
        return [model.get_submodule("fpn")]
    width = 21 if network.family == "segmentation" else 1000
    layers: list[nn.Module] = []
    for module in model.modules():
        is_layer = isinstance(module, nn.Conv2d | nn.Linear)
        if is_layer and module.weight.shape[0] == width:
            layers.append(module)
    return layers


class Survivors:
    """Which of its original input channels every layer still has.

    From the indices that Torch-Pruning removes.

    Args:
        model: The network before pruning.

    Attributes:
        inputs: Convolution or linear layer to the input channels that it kept.
        normed: Layer norm to the channels that it kept.
        incomparable: A pruned layer that masks of inputs can't stand for; empty if
            there is none.
    """

    def __init__(self, model: nn.Module):
        self._names = {module: name for name, module in model.named_modules()}
        self.inputs: dict[str, list[int]] = {}
        self.normed: dict[str, list[int]] = {}
        self.incomparable = ""

    def note(self, graph: tp.DependencyGraph, group: tp.dependency.Group) -> None:
        """Takes in a group, before it prunes: its indices count what is left then.

        Args:
            graph: Torch-Pruning's.
            group: The group that is about to prune.
        """
        for dependency, indices in group.items:
            module = dependency.target.module
            gone = {getattr(index, "idx", index) for index in indices}
            # Operations without weights are in the graph too; they have no name.
            name = self._names.get(module, "")
            if isinstance(module, INCOMPARABLE):
                self.incomparable = type(module).__name__
            elif isinstance(module, nn.LayerNorm):
                _drop(self.normed, name, module.normalized_shape[-1], gone)
            elif _reads(graph, dependency, module):
                _drop(self.inputs, name, _n_inputs(module), gone)

    def masked(self, dense: nn.Module) -> nn.Module:
        """The dense network in which each layer sees only what its pruned twin does."""
        twin = copy.deepcopy(dense)
        for name, kept in self.inputs.items():
            module = twin.get_submodule(name)
            hide = _hide(kept, _n_inputs(module), _channel_axis(module))
            module.register_forward_pre_hook(hide)
        for name, kept in self.normed.items():
            twin.get_submodule(name).register_forward_hook(_norm_over(kept))
        return twin


def _reads(graph: tp.DependencyGraph, dependency: Any, module: nn.Module) -> bool:
    """Whether a dependency removes inputs of a layer that has its own."""
    if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return False
    is_depthwise = (
        getattr(module, "groups", 1) > 1 and module.groups == module.out_channels
    )
    return graph.is_in_channel_pruning_fn(dependency.handler) and not is_depthwise


def _drop(
    survivors: dict[str, list[int]], name: str, width: int, gone: set[int]
) -> None:
    """Takes the channels at some positions out of a layer's survivors."""
    left = survivors.get(name, list(range(width)))
    kept = []
    for position, channel in enumerate(left):
        if position not in gone:
            kept.append(channel)
    survivors[name] = kept


def _n_inputs(module: nn.Module) -> int:
    """The input channels of a convolution or linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, nn.modules.conv._ConvNd), "nothing else reads channels"
    return module.in_channels


def _channel_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _hide(kept: list[int], width: int, axis: int) -> Callable:
    """A hook that sets a layer's other inputs to zero."""
    visible = torch.zeros(width)
    visible[kept] = 1

    def hook(_: nn.Module, inputs: tuple) -> tuple:
        x = inputs[0]
        shape = [1] * x.ndim
        shape[axis] = width
        return (x * visible.view(shape), *inputs[1:])

    return hook


def _norm_over(kept: list[int]) -> Callable:
    """A hook that lets a layer norm run over some channels only."""

    def hook(module: nn.LayerNorm, inputs: tuple, output: Tensor) -> Tensor:
        # timm's and torchvision's LayerNorm2d has the channels in front.
        axis = 1 if type(module).__name__ == "LayerNorm2d" else -1
        x = inputs[0].movedim(axis, -1)[..., kept]
        y = output.movedim(axis, -1).clone()
        weight = None if module.weight is None else module.weight[kept]
        bias = None if module.bias is None else module.bias[kept]
        y[..., kept] = functional.layer_norm(x, (len(kept),), weight, bias, module.eps)
        return y.movedim(-1, axis)

    return hook
