"""Running a network while labels follow its operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.structure.groups import tensors_in
from autoprune.structure.labels import broadcast_labels
from autoprune.tracing.rules.contractions import (
    attention,
    batched_product,
    convolution,
    linear,
)
from autoprune.tracing.rules.movements import (
    cut,
    indexed,
    movement,
    reshape,
    same,
    split,
)
from autoprune.tracing.rules.table import apply_rule, rule_for
from autoprune.tracing.tracer import Call, Tracer

MOVING = (movement, reshape, same, split, cut, indexed)
"""Rules of operations that compute nothing."""
COUNTED = (convolution, linear, batched_product, attention)


@contextmanager
def track_labels(tracer: Tracer, example: Tensor) -> Iterator[None]:
    """Labels the input's channels and tells the tracer which module is running, without
    touching the model.
    """
    inputs = tracer.book.new(example.shape[1], "input")
    tracer.label(example, broadcast_labels(inputs, 1, example.shape))
    tracer.book.pin(inputs, "is the network's input")
    # Global hooks, so that the model's modules keep their own; the fused attention path
    # would hide all inside it.
    hooks = (
        nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: tracer.entered(module)
        ),
        nn.modules.module.register_module_forward_hook(lambda *_: tracer.left()),
    )
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for hook in hooks:
            hook.remove()


class LabelDispatchMode(TorchDispatchMode):
    """Executes every operation and applies its rule."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, tracer = self.execute(func, args, kwargs or {}), self.tracer
        call = Call(tracer, func, args, kwargs or {}, out)
        tensors = list(call.tensors())
        active = [tensor for tensor in tensors if tracer.is_activation(tensor)]
        if not all(tensor.numel() for tensor in [*tensors, *tensors_in(out)[:1]]):
            return out  # a slice of nothing tells nothing
        # What is multiplied counts, whether or not channels are involved.
        if (
            active
            or rule_for(func) in COUNTED
            or any(tracer.parameter(tensor) is not None for tensor in tensors)
        ):
            rule = apply_rule(call)
            if active and rule not in MOVING:
                alive = {
                    id(tensor): tensor
                    for tensor in [*active, *tensors_in(out)]
                    if tracer.is_activation(tensor)
                }
                tracer.operations.append(
                    [tracer.labels(tensor) for tensor in alive.values()]
                )
        return out

    def execute(self, func, args: tuple, kwargs: dict) -> object:
        """What the operation computes."""
        return func(*args, **kwargs)
