"""Which batch norms read what a layer made exactly as the layer made it.

Between such a layer and its norm nothing happens, so that what is done to the layer's
output by channel can be undone, or absorbed, by the norm.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def watch_direct_norms(
    layers: Iterable[nn.Module],
    norms: Iterable[nn.Module],
    report: Callable[[nn.Module, nn.Module], None],
    is_latest_only: bool = False,
) -> Iterator[None]:
    """Reports, during forward passes, each norm that reads a layer's untouched output.

    Of `bn1(conv1(x))` the pair conv1, bn1 is reported; of `bn1(conv1(x) + x)` nothing
    is, nor of `bn1(relu_(conv1(x)))`: there the tensor is the same, but was written to.

    Args:
        layers: The layers whose outputs are followed.
        norms: The norms whose inputs are looked at.
        report: Is called with layer and norm, once for each time the norm runs.
        is_latest_only: Look only for the output of the layer that ran last, and so hold
            one output in memory instead of all.

    Yields:
        Nothing; the hooks are removed at the end.
    """
    # By identity of the output. The output is held here, so that no other tensor can
    # get its id.
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}

    def remember(layer: nn.Module, args: tuple, output: Tensor) -> None:
        # A pass of a large network would else hold all of its activations.
        if is_latest_only:
            made.clear()
        # PyTorch counts how often a tensor was written to in place.
        made[id(output)] = (layer, output, output._version)

    def compare(norm: nn.Module, args: tuple) -> None:
        entry = made.get(id(args[0]))
        if entry is None:
            return
        layer, output, version = entry
        if output._version == version:
            report(layer, norm)

    hooks = [layer.register_forward_hook(remember) for layer in layers]
    hooks += [norm.register_forward_pre_hook(compare) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
