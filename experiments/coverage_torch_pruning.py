"""The same builders with Torch-Pruning, as its README uses it: nothing is set by hand,
no layer but the last ignored.

Whether what it prunes is right is decided by masks that are built from the indices that
it removed: in a copy of the dense network every convolution and linear layer reads
zeros for the input channels that it lost, and every layer norm runs over the channels
that it kept.
"""

import copy
from collections.abc import Callable, Iterator

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.coverage_checks import (
    Usage,
    describe_error,
    difference,
    n_params,
    outputs,
    time_limit,
)
from experiments.coverage_networks import Network, example, randomise

PRUNING_RATIO = 0.3
TOLERANCE = 1e-4
# What these compute from fewer channels can't be had from masks of layers' inputs.
INCOMPARABLE = (nn.MultiheadAttention, nn.GroupNorm, nn.LSTM)


def compare(network: Network, limit_s: int) -> Iterator[dict]:
    """Yields columns as they become known, so that a crash leaves those before it."""
    torch.manual_seed(0)
    model = network.build()
    size = network.size(model)
    dense = randomise(model, size)
    model, x = copy.deepcopy(dense), example((1, 3, size, size))
    yield {"tp_runs": "no", "tp_right": "no"}
    survivors = Survivors(model)
    try:
        with time_limit(limit_s), Usage() as usage:
            _prune(model, x, survivors, ignored(network, model))
        yield {
            "tp_seconds": usage.seconds,
            "tp_params_ratio": round(n_params(model) / n_params(dense), 4),
        }
        pruned = outputs(model.eval(), example((2, 3, size, size), seed=1))
        yield {
            "tp_runs": "yes" if n_params(model) < n_params(dense) else "prunes nothing"
        }
        yield _verdict(dense, survivors, pruned, example((2, 3, size, size), seed=1))
    except Exception as error:  # whatever Torch-Pruning raises
        yield {"tp_failure": describe_error(error)}


def _prune(
    model: nn.Module, x: Tensor, survivors: "Survivors", ignored_layers: list[nn.Module]
) -> None:
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    options = {"pruning_ratio": PRUNING_RATIO, "ignored_layers": ignored_layers}
    pruner = tp.pruner.BasePruner(model, x, importance, **options)
    for group in pruner.step(interactive=True):
        survivors.note(pruner.DG, group)
        group.prune()


def _verdict(
    dense: nn.Module, survivors: "Survivors", pruned: Tensor, x: Tensor
) -> dict:
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


def ignored(network: Network, model: nn.Module) -> list[nn.Module]:
    """The layers that make the output: by their width, or the whole pyramid of a
    detector's backbone.
    """
    if network.family == "detection":
        return [model.fpn]
    width = 21 if network.family == "segmentation" else 1000
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    return [layer for layer in layers if layer.weight.shape[0] == width]


class Survivors:
    """Which of its original input channels every layer still has, from the indices that
    Torch-Pruning removes.

    Args:
        model: The network before pruning.
    """

    def __init__(self, model: nn.Module):
        self._names = {module: name for name, module in model.named_modules()}
        self.inputs: dict[str, list[int]] = {}
        self.normed: dict[str, list[int]] = {}
        self.incomparable = ""

    def note(self, graph: tp.DependencyGraph, group: tp.dependency.Group) -> None:
        """To be called with every group before it prunes: its indices count what is
        left at that time.
        """
        for dependency, indices in group.items:
            module = dependency.target.module
            gone = {getattr(index, "idx", index) for index in indices}
            name = self._names.get(module)
            if isinstance(module, INCOMPARABLE):
                self.incomparable = type(module).__name__
            elif isinstance(module, nn.LayerNorm):
                _drop(self.normed, name, module.normalized_shape[-1], gone)
            elif _reads(graph, dependency, module):
                _drop(self.inputs, name, _n_inputs(module), gone)

    def masked(self, dense: nn.Module) -> nn.Module:
        """The dense network in which every layer sees only what its pruned twin does."""
        twin = copy.deepcopy(dense)
        for name, kept in self.inputs.items():
            module = twin.get_submodule(name)
            module.register_forward_pre_hook(
                _hide(kept, _n_inputs(module), _channel_axis(module))
            )
        for name, kept in self.normed.items():
            twin.get_submodule(name).register_forward_hook(_norm_over(kept))
        return twin


def _reads(graph: tp.DependencyGraph, dependency, module: nn.Module) -> bool:
    if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return False
    is_depthwise = (
        getattr(module, "groups", 1) > 1 and module.groups == module.out_channels
    )
    return graph.is_in_channel_pruning_fn(dependency.handler) and not is_depthwise


def _drop(
    survivors: dict[str, list[int]], name: str, width: int, gone: set[int]
) -> None:
    left = survivors.get(name, list(range(width)))
    survivors[name] = [
        channel for position, channel in enumerate(left) if position not in gone
    ]


def _n_inputs(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _channel_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _hide(kept: list[int], width: int, axis: int) -> Callable:
    visible = torch.zeros(width)
    visible[kept] = 1

    def hook(_: nn.Module, inputs: tuple) -> tuple:
        x = inputs[0]
        shape = [1] * x.ndim
        shape[axis] = width
        return (x * visible.view(shape), *inputs[1:])

    return hook


def _norm_over(kept: list[int]) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        axis = 1 if type(module).__name__ == "LayerNorm2d" else -1
        x, y = inputs[0].movedim(axis, -1)[..., kept], output.movedim(axis, -1).clone()
        affine = [
            tensor if tensor is None else tensor[kept]
            for tensor in (module.weight, module.bias)
        ]
        y[..., kept] = F.layer_norm(x, (len(kept),), *affine, module.eps)
        return y.movedim(-1, axis)

    return hook
