"""Running a network so that every operation also moves its inputs' labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.structure.groups import tensors_in
from autoprune.structure.inputs import Inputs
from autoprune.structure.labels import CONSTANT, broadcast_labels
from autoprune.tracing.calls import Call
from autoprune.tracing.randomness import is_random
from autoprune.tracing.rules.contractions import (
    attention,
    batched_product,
    linear,
)
from autoprune.tracing.rules.convolutions import convolution, deformable_convolution
from autoprune.tracing.rules.movements import (
    copy,
    indexing,
    movement,
    reshape,
    slicing,
    split,
)
from autoprune.tracing.rules.recurrent import cell, recurrent, whole_operation
from autoprune.tracing.rules.table import apply_rule, rule_for
from autoprune.tracing.tracer import Tracer

MOVING_RULES = (movement, reshape, copy, split, slicing, indexing)
"""Rules of operations that compute nothing: their outputs take no memory of their own,
or none that lasts."""
MULTIPLYING_RULES = (
    convolution,
    deformable_convolution,
    linear,
    batched_product,
    attention,
    recurrent,
    cell,
)
"""Rules of operations that cost multiply-accumulates."""


@contextmanager
def track_labels(tracer: Tracer, inputs: Inputs) -> Iterator[None]:
    """Labels the inputs' channels and tells the tracer which module is running.

    The model itself isn't touched.

    Args:
        tracer: The notebook of the run.
        inputs: What the network gets; floats are `(batch, channels, ...)`. Labels
            become attributes of these tensors.
    """
    for number, tensor in enumerate(inputs.tensors()):
        # Integers are token ids or positions, which have no channels.
        if tensor.is_floating_point():
            _label_input(tracer, tensor, number)

    def enter(module: nn.Module, inputs: object) -> None:
        tracer.enter_module(module)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        tracer.leave_module()

    # Global hooks, so that the model's modules keep their own.
    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    # The fused attention path is one operation, which would hide all inside it.
    is_fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fastpath_enabled)
        for hook in hooks:
            hook.remove()


def _label_input(tracer: Tracer, tensor: Tensor, number: int) -> None:
    """Labels one input; its channels are pinned.

    Args:
        tracer: The notebook of the run.
        tensor: `(batch, channels, ...)`; one of fewer axes has no channels.
        number: Which of the inputs it is.
    """
    if tensor.ndim < 2:
        labels = torch.full((), CONSTANT, dtype=torch.int64).expand(tensor.shape)
        tracer.label(tensor, labels)
        return
    # Images have three channels, whatever is pruned.
    channels = tracer.book.new_labels(tensor.shape[1], ("input", number))
    tracer.label(tensor, broadcast_labels(channels, 1, tensor.shape))
    tracer.book.pin(channels, "is the network's input")


class LabelDispatchMode(TorchDispatchMode):
    """Executes every operation and applies its rule.

    PyTorch calls `__torch_dispatch__` for each ATen operation that runs inside the
    `with` block, below autograd, whichever Python function it came from. A subclass may
    override `execute` to compute something else at full width, as masking does.

    Args:
        tracer: The notebook of the run.
    """

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer
        self._whole_operations = _WholeOperations(self)
        self._is_inside_whole = False

    def __enter__(self) -> "LabelDispatchMode":
        """Runs what follows under the mode."""
        self._whole_operations.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends that."""
        super().__exit__(*error)
        self._whole_operations.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one operation, then moves labels from its inputs to its outputs."""
        # PyTorch passes None where there are no keyword arguments.
        kwargs = kwargs or {}
        if self._is_inside_whole:
            return func(*args, **kwargs)
        out = self.execute(func, args, kwargs)
        call = Call(self.tracer, func, args, kwargs, out)
        # Labels are nobody else's business; other modes would cost most of the time.
        with no_dispatch():
            self._move_labels(call)
            self._follow_noise(call)
        return out

    def run_whole(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        """Runs an operation that consists of others, which move no labels.

        Args:
            func: The ATen overload.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._is_inside_whole = True
        try:
            out = self.execute(func, args, kwargs)
        finally:
            self._is_inside_whole = False
        with no_dispatch():
            self._move_labels(Call(self.tracer, func, args, kwargs, out))
        return out

    def execute(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        """What the operation computes.

        Args:
            func: The ATen overload.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        return func(*args, **kwargs)

    def _move_labels(self, call: Call) -> None:
        """Applies the operation's rule and notes which activations are alive with it.

        Operations on constants alone, such as the making of a mask, are passed over.
        """
        tracer = self.tracer
        tensors = list(call.tensors())
        # Of the outputs only the first: batch norm returns statistics as well, which
        # are empty in evaluation mode.
        for tensor in [*tensors, *tensors_in(call.out)[:1]]:
            if not tensor.numel():
                return  # a slice of nothing tells nothing
        activations = []
        has_parameter = False
        for tensor in tensors:
            if tracer.is_activation(tensor):
                activations.append(tensor)
            if tracer.views(tensor):
                has_parameter = True
        # What is multiplied counts, whether or not channels are involved.
        is_multiplying = rule_for(call.func) in MULTIPLYING_RULES
        if not (activations or has_parameter or is_multiplying):
            return
        rule = apply_rule(call)
        # What only moves data needs no memory for long, and counts where it is read.
        if activations and rule not in MOVING_RULES:
            tracer.operations.append(self._alive_labels(activations, call.out))

    def _follow_noise(self, call: Call) -> None:
        """Marks what an operation drew, or computed from what was drawn before.

        An activation with noise is an activation.
        """
        tracer = self.tracer
        if not is_random(call.func) and not any(map(tracer.is_noise, call.tensors())):
            return
        for out in tensors_in(call.out):
            if not (tracer.is_activation(out) or tracer.views(out)):
                tracer.mark_noise(out)

    def _alive_labels(self, inputs: list[Tensor], out: object) -> list[Tensor]:
        """Labels of an operation's inputs and outputs, each tensor counted once.

        An operation in place returns one of its inputs, and `x * x` has one input.
        """
        alive: dict[int, Tensor] = {}
        for tensor in [*inputs, *tensors_in(out)]:
            if self.tracer.is_activation(tensor):
                alive[id(tensor)] = tensor
        return [self.tracer.labels(tensor) for tensor in alive.values()]


class _WholeOperations(TorchFunctionMode):
    """Catches functions of `torch` that PyTorch takes apart before dispatch.

    Args:
        dispatch: The mode that runs them as one operation each.
    """

    def __init__(self, dispatch: LabelDispatchMode):
        super().__init__()
        self.dispatch = dispatch

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls a function, or runs the operation that stands for it."""
        kwargs = kwargs or {}
        overload = whole_operation(func, args)
        if overload is None:
            return func(*args, **kwargs)
        return self.dispatch.run_whole(overload, args, kwargs)
