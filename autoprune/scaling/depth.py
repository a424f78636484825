"""Whole layers as what is removed: residual blocks that give way to the identity.

Which blocks can go is measured, not read off class names: with its parameters at zero,
a residual block hands its input on, so that the network around it still fits together
without it.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoprune.data.datasets import Images
from autoprune.errors import UserError, nearest_names
from autoprune.evaluation.evaluate import EvalBatches, evaluate, on_batch_statistics
from autoprune.structure.attention import open_attention
from autoprune.structure.slicing import shared_copy

Weighted = nn.modules.conv._ConvNd | nn.Linear


@dataclass(frozen=True)
class Block:
    """A part of the network that the identity can replace.

    Attributes:
        name: The module's name.
        macs: Multiply-accumulates of one sample that go with it.
        n_params: Parameters that go with it.
    """

    name: str
    macs: int
    n_params: int


def removable_blocks(model: nn.Module, example: Tensor) -> list[Block]:
    """The blocks of `model` that can be replaced by the identity, in the model's order;
    it is left as found.

    A block is a child of an `nn.Sequential` that holds two layers with weights or more,
    is called once, makes of one tensor one of the same shape, and hands on what reaches
    it on `example` once all its parameters are zero. A ReLU after the sum is no
    obstacle where the input is never negative. Of blocks inside blocks the outermost
    counts. A plain `nn.Sequential` has no shortcut of its own, so that its children are
    looked at, not it; and what the network knows by two names is left alone.

    Args:
        model: Any network with one tensor input.
        example: One input, `(1, 3, height, width)`; of several, the first is used.
    """
    twin, blocks = shared_copy(model).eval(), []
    for name, (seen, macs) in _calls(twin, example[:1]).items():
        is_inside = any(name.startswith(f"{outer.name}.") for outer in blocks)
        if not is_inside and _hands_on(twin.get_submodule(name), seen):
            blocks.append(Block(name, macs, _n_params_only_in(twin, name)))
    return blocks


def remove_blocks(
    model: nn.Module, names: Sequence[str], example: Tensor | None = None
) -> nn.Module:
    """A copy of `model` in which the identity stands in for the named blocks.

    Args:
        model: The whole network.
        names: Of blocks that `removable_blocks` gives.
        example: Inputs on which the names are checked as `removable_blocks` does; None
            for names from a plan, of which only is checked that they are layers in an
            `nn.Sequential` that could be blocks.

    Raises:
        UserError: If a name isn't that of a removable block; the nearest that is gets
            offered.
    """
    known = (
        _candidates(model)
        if example is None
        else [block.name for block in removable_blocks(model, example)]
    )
    for name in names:
        if name not in known:
            near = nearest_names(name, known) or known[:1]
            advice = (
                f"did you mean {near[0]!r}?"
                if near
                else "this network has none; prune its channels instead"
            )
            raise UserError("names", f"{name!r} is not a removable block; {advice}")
    return _without(copy.deepcopy(model), names)


def block_importance(
    model: nn.Module, blocks: Sequence[Block], images: Images
) -> dict[str, float]:
    """How far each block's removal alone moves the network's answers, in nats, 0 or
    more; higher is kept.

    The divergence KL(whole || without the block), mean over `images`. Batch norm takes
    its statistics from the images in both networks, so that a block that does nothing
    counts for nothing. The model is left as found.
    """
    return _damage(model, [block.name for block in blocks], _answered(model, images))


def shallower(
    model: nn.Module, example: Tensor, images: Images, target_macs: float
) -> list[str]:
    """The blocks to remove until `model` has at most `target_macs`, in the order of
    their removal.

    Greedy: the next to go is the block that adds the least damage per MAC to what is
    gone already, measured anew after each removal and held against the whole network
    throughout. Blocks for which there is room again in the end, the largest first,
    stay; so none of those removed could.

    Args:
        model: The whole network; it is left as found.
        example: Inputs, `(batch, 3, height, width)`.
        images: What the damage is measured on.
        target_macs: Multiply-accumulates of one sample.

    Raises:
        UserError: If more MACs are left even without all removable blocks.
    """
    model = shared_copy(model)
    saved = {block.name: block.macs for block in removable_blocks(model, example)}
    macs = _macs(model, example)
    _check_reachable(target_macs, macs, saved)
    eval_batches, damage_so_far, removed = _answered(model, images), 0.0, []
    while macs > target_macs:
        damage = _damage(
            model, [name for name in saved if name not in removed], eval_batches
        )
        name = min(
            damage, key=lambda name: (damage[name] - damage_so_far) / saved[name]
        )
        removed.append(name)
        model, macs, damage_so_far = (
            _without(model, [name]),
            macs - saved[name],
            damage[name],
        )
    for name in sorted(removed, key=saved.get, reverse=True):
        if macs + saved[name] <= target_macs:
            removed.remove(name)
            macs += saved[name]
    return removed


def _check_reachable(target_macs: float, macs: int, saved: dict[str, int]) -> None:
    floor = macs - sum(saved.values())
    if target_macs < floor:
        raise UserError(
            "target_macs",
            f"{target_macs} is below the reachable floor; without its "
            f"{len(saved)} removable blocks the "
            f"network has {floor} MACs ({floor / macs:.1%}); give at least that, or "
            f"prune channels as well",
        )


def _candidates(model: nn.Module) -> list[str]:
    """Modules in an `nn.Sequential` that could be blocks, outer ones before what they
    hold.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    n_names = Counter(id(module) for _, module in modules)
    names = [
        name
        for name, module in modules
        if name and n_names[id(module)] == 1 and _could_be_block(module)
    ]
    return [
        name
        for name in names
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Sequential)
    ]


def _could_be_block(module: nn.Module) -> bool:
    is_plain = type(module).forward is nn.Sequential.forward
    return (
        not is_plain
        and sum(isinstance(layer, Weighted) for layer in module.modules()) >= 2
    )


def _calls(model: nn.Module, example: Tensor) -> dict[str, tuple[Tensor, int]]:
    """For each possible block that is called once and makes of one tensor one of the
    same shape: that tensor, and the MACs between the block's entry and its exit, which
    are those that go with it, as nothing after it changes its shape.
    """
    model, counter, calls = shared_copy(model), FlopCounterMode(display=False), {}

    def enter(name: str, _, args: tuple, options: dict) -> None:
        is_tensor = len(args) == 1 and not options and isinstance(args[0], Tensor)
        # Cloned, since the block may change its input in place.
        calls.setdefault(name, []).append(
            (args[0].clone() if is_tensor else None, -counter.get_total_flops())
        )

    def leave(name: str, _, args: tuple, output: object) -> None:
        seen, flops = calls[name][-1]
        is_same = (
            seen is not None
            and isinstance(output, Tensor)
            and output.shape == seen.shape
        )
        calls[name][-1] = (
            seen if is_same else None,
            (flops + counter.get_total_flops()) // 2,
        )

    names = _candidates(model)
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
        module.register_forward_hook(partial(leave, name))
    _count(model, example, counter)
    once = {name: found[0] for name, found in calls.items() if len(found) == 1}
    return {
        name: once[name] for name in names if name in once and once[name][0] is not None
    }


@torch.no_grad()
def _hands_on(block: nn.Module, seen: Tensor) -> bool:
    """Whether the block, with its parameters at zero, returns what it is given."""
    silent = copy.deepcopy(block)
    means = [
        tensor
        for name, tensor in silent.named_buffers()
        if name.endswith("running_mean")
    ]
    for tensor in (
        *silent.parameters(),
        *means,
    ):  # batch norm without parameters subtracts its mean from the zeros
        tensor.zero_()
    # Zeros prove nothing: blocks without a shortcut return them as well.
    return bool(seen.any()) and torch.equal(silent(seen.clone()), seen)


def _without(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Replaces the named blocks in place; those inside others first, while their names
    still lead somewhere.
    """
    for name in sorted(names, reverse=True):
        model.set_submodule(name, nn.Identity())
    return model


def _n_params_only_in(model: nn.Module, name: str) -> int:
    parameters = model.named_parameters(remove_duplicate=False)
    elsewhere = {
        id(parameter) for key, parameter in parameters if not key.startswith(f"{name}.")
    }
    return sum(
        parameter.numel()
        for parameter in model.get_submodule(name).parameters()
        if id(parameter) not in elsewhere
    )


def _macs(model: nn.Module, example: Tensor) -> int:
    """What PyTorch counts for one sample in eval mode."""
    counter = FlopCounterMode(display=False)
    _count(shared_copy(model).eval(), example[:1], counter)
    return counter.get_total_flops() // 2


@torch.no_grad()
def _count(model: nn.Module, example: Tensor, counter: FlopCounterMode) -> None:
    """Counts a forward pass. Attention is opened, in place, and runs as products, since
    fused ones aren't counted.
    """
    with counter, sdpa_kernel(SDPBackend.MATH):
        open_attention(model)(example)


def _answered(model: nn.Module, images: Images) -> EvalBatches:
    """Questions with the answers that `model` gives on batch statistics."""
    eval_batches, twin = EvalBatches(images), shared_copy(model)
    with on_batch_statistics(twin):
        eval_batches.set_soft_targets(twin, "off")
    return eval_batches


def _damage(
    model: nn.Module, names: Sequence[str], eval_batches: EvalBatches
) -> dict[str, float]:
    """Divergence from the answers that the questions hold when each named block alone
    leaves `model`.
    """
    damage = {}
    for name in names:
        shorter = _without(shared_copy(model), [name])
        with on_batch_statistics(shorter):
            damage[name] = evaluate(shorter, eval_batches, "off").loss
    return damage
