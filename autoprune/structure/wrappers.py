"""Networks as people hold them: what wraps one is taken off, what hides one is refused.

A network trained on several GPUs or compiled is wrapped in another module, which
changes the names of all its tensors. Others can't be pruned as they are: their weights
aren't there yet, or are made anew from other tensors before each pass.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autoprune.errors import UserError
from autoprune.structure.attention import is_instance_of

COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
"""What `torch.compile` makes of a module."""
WRAPPERS: dict[str, str] = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    COMPILED: "_orig_mod",
}
"""Full name of a class that wraps a network, to the attribute that holds it."""


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside of its wrappers, the same object.

    Args:
        model: A network, compiled, parallel or averaged perhaps.

    Raises:
        UserError: If it can't be pruned as it is; the message says what to do.
    """
    is_wrapped = True
    while is_wrapped:
        is_wrapped = False
        for known, attribute in WRAPPERS.items():
            if isinstance(model, nn.Module) and is_instance_of(model, known):
                model = getattr(model, attribute)
                is_wrapped = True
    if not isinstance(model, nn.Module):
        raise UserError(
            "model",
            f"must be a network, a torch.nn.Module; got {type(model).__name__}",
        )
    for name, module in model.named_modules():
        for check in CHECKS:
            reason = check(module)
            if reason is not None:
                # The network itself has an empty name.
                raise UserError("model", f"{name or 'the network'} {reason}")
    return model


def run_uncompiled(model: nn.Module) -> nn.Module:
    """Lets compiled modules inside a network run as they were written, in place.

    Compiled code would be made anew for each width that is tried.

    Args:
        model: A copy of the network.

    Returns:
        The same network; names of tensors stay.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_instance_of(child, COMPILED):
                setattr(module, name, _Uncompiled(child.get_submodule("_orig_mod")))
    return model


class _Uncompiled(nn.Module):
    """Stands in for a compiled module: the same names, the code as it was written.

    Args:
        original: What was compiled.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self._orig_mod = original

    def __getattr__(self, name: str) -> Any:
        """Attributes are those of the original, as a compiled module has it."""
        if name == "_orig_mod":
            return super().__getattr__(name)
        return getattr(self._orig_mod, name)

    def forward(self, *inputs: object, **keywords: object) -> object:
        """As the original's."""
        return self._orig_mod(*inputs, **keywords)


def computed_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors that modules have kept from a forward pass, with what led to them.

    Python can't copy these; they are no parameters, and the next pass makes them anew.

    Args:
        model: The network.
    """
    found = []
    for module in model.modules():
        for tensor in _tensors_within(vars(module)):
            if not tensor.is_leaf:
                found.append(tensor)
    return found


def _tensors_within(value: object) -> Iterator[Tensor]:
    """The tensors in dicts, lists, tuples and sets, nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_within(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_within(item)


def _script(module: nn.Module) -> str | None:
    """TorchScript, whose code takes its widths for constants."""
    if not isinstance(module, torch.jit.ScriptModule):
        return None
    return (
        "is TorchScript, which can't be pruned; pass the Python network that it was "
        "made from"
    )


def _exported(module: nn.Module) -> str | None:
    """The module of a `torch.export` program, which has no code to run anew."""
    if not is_instance_of(module, "torch.fx.graph_module.GraphModule"):
        return None
    # Such a module replaces its methods `train` and `eval` by refusals.
    if "eval" not in vars(module):
        return None
    return (
        "comes from torch.export, which takes its widths for constants; pass the "
        "Python network that it was made from"
    )


def _sharded(module: nn.Module) -> str | None:
    """A network of which each process holds a part."""
    name = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
    if not is_instance_of(module, name):
        return None
    return (
        "is sharded over processes; load its full state dict into the network as it "
        "was before FullyShardedDataParallel"
    )


def _quantized(module: nn.Module) -> str | None:
    """Weights that are packed integers."""
    if not type(module).__module__.startswith("torch.ao.nn.quantized"):
        return None
    return "is quantised already; prune the float network, then quantise it"


def _without_weights(module: nn.Module) -> str | None:
    """A lazy module, or one whose weights are nowhere."""
    for tensor in [*module._parameters.values(), *module._buffers.values()]:
        if is_lazy(tensor):
            return (
                f"({type(module).__name__}) has no weights yet; run the network once "
                f"on an example, `model(example)`, before it is pruned"
            )
        if tensor is not None and tensor.is_meta:
            return "has no weights (it is on the meta device); load them first"
    return None


def _recomputed(module: nn.Module) -> str | None:
    """A hook that makes a weight anew before each pass."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, torch_prune.BasePruningMethod):
            return (
                f"has a mask of torch.nn.utils.prune on its {hook._tensor_name!r}; "
                f"make it permanent with torch.nn.utils.prune.remove(module, "
                f'"{hook._tensor_name}")'
            )
        if isinstance(hook, WeightNorm):
            return (
                f"has the old weight_norm on its {hook.name!r}; take it off with "
                f'torch.nn.utils.remove_weight_norm(module, "{hook.name}"), or use '
                f"torch.nn.utils.parametrizations.weight_norm"
            )
        if isinstance(hook, SpectralNorm):
            return (
                f"has the old spectral_norm on its {hook.name!r}; take it off with "
                f'torch.nn.utils.remove_spectral_norm(module, "{hook.name}"), or use '
                f"torch.nn.utils.parametrizations.spectral_norm"
            )
    return None


CHECKS: tuple[Callable[[nn.Module], str | None], ...] = (
    _script,
    _exported,
    _sharded,
    _quantized,
    _without_weights,
    _recomputed,
)
"""Each says of a module why it can't be pruned as it is, or None."""
