"""Whole layers as what is removed: residual blocks that give way to the identity.

Which blocks can go is measured, not read off class names: with its parameters at zero,
a residual block hands its input on, so that the network around it still fits together
without it.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
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
"""Layers that make a module worth being called a block."""


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
    """The blocks of `model` that the identity can replace, in the model's order.

    A block is a child of an `nn.Sequential` that holds two layers with weights or more,
    is called once, makes of one tensor one of the same shape, and hands on what reaches
    it on `example` once all its parameters are zero. For x + conv2(relu(conv1(x))) that
    is x + 0; conv2(relu(conv1(x))) alone gives 0 and is none. A ReLU after the sum is
    no obstacle where the input is never negative.

    Of blocks inside blocks the outermost counts. A plain `nn.Sequential` has no
    shortcut of its own, so that its children are looked at, not it; and what the
    network knows by two names is left alone.

    Args:
        model: Any network with one tensor input; it is left as found.
        example: One input, `(1, 3, height, width)`; of several, the first is used.
    """
    # In training mode dropout would change what a block hands on.
    twin = shared_copy(model).eval()
    blocks: list[Block] = []
    for name, (given, macs) in _record_calls(twin, example[:1]).items():
        is_inside = any(name.startswith(f"{outer.name}.") for outer in blocks)
        if not is_inside and _hands_input_on(twin.get_submodule(name), given):
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
    if example is None:
        known = _candidates(model)
    else:
        known = [block.name for block in removable_blocks(model, example)]
    for name in names:
        if name not in known:
            advice = "this network has none; prune its channels instead"
            # Where no name is alike, any shows what names look like.
            offered = nearest_names(name, known) or known
            if offered:
                advice = f"did you mean {offered[0]!r}?"
            raise UserError("names", f"{name!r} is not a removable block; {advice}")
    return _replace_by_identity(copy.deepcopy(model), names)


def block_importance(
    model: nn.Module, blocks: Sequence[Block], images: Images
) -> dict[str, float]:
    """How far each block's removal alone moves the network's answers; higher is kept.

    The divergence KL(whole || without the block) in nats, 0 or more, mean over
    `images`. Batch norm takes its statistics from the images in both networks, so that
    a block that does nothing counts for nothing.

    Args:
        model: The whole network; it is left as found.
        blocks: Those to rate, of `removable_blocks`.
        images: What the network is asked about.

    Returns:
        The blocks' names to their importance, in the order given.
    """
    names = [block.name for block in blocks]
    return _measure_damage(model, names, _record_answers(model, images))


def select_blocks_to_remove(
    model: nn.Module, example: Tensor, images: Images, target_macs: float
) -> list[str]:
    """The blocks to remove until at most `target_macs` are left, the first to go first.

    Greedy: the next to go is the block that adds the least damage per MAC to what is
    gone already, measured anew after each removal and held against the whole network
    throughout. Blocks for which there is room again in the end, the largest first,
    stay; so none of those removed could.

    For example, 30 MACs have to go, and three blocks of 10, 10 and 30 MACs do a damage
    of 0.1, 0.2 and 0.9 nats: the first goes (0.01 a MAC). Without it the second brings
    the damage to 0.5 and the third to 0.7, that is 0.4 / 10 and 0.6 / 30 more; so the
    third goes, which is 40 MACs. Then the first returns, since 30 are enough.

    Args:
        model: The whole network; it is left as found.
        example: Inputs, `(batch, 3, height, width)`.
        images: What the damage is measured on.
        target_macs: Multiply-accumulates of one sample.

    Returns:
        Names of blocks.

    Raises:
        UserError: If more MACs are left even without all removable blocks.
    """
    # Blocks will be replaced in this copy, which shares the weights.
    model = shared_copy(model)
    # A block saves the same whatever else is gone, since shapes stay.
    saved = {block.name: block.macs for block in removable_blocks(model, example)}
    macs = _count_macs(model, example)
    _check_reachable(target_macs, macs, saved)
    eval_batches = _record_answers(model, images)
    damage_so_far = 0.0
    removed: list[str] = []
    while macs > target_macs:
        remaining = [name for name in saved if name not in removed]
        damage = _measure_damage(model, remaining, eval_batches)
        per_mac = {
            name: (damage[name] - damage_so_far) / saved[name] for name in remaining
        }
        name = min(per_mac, key=per_mac.__getitem__)
        removed.append(name)
        model = _replace_by_identity(model, [name])
        macs -= saved[name]
        damage_so_far = damage[name]
    # A small block that went early may be more than was needed in the end.
    for name in sorted(removed, key=saved.__getitem__, reverse=True):
        if macs + saved[name] <= target_macs:
            removed.remove(name)
            macs += saved[name]
    return removed


def _check_reachable(target_macs: float, macs: int, saved: Mapping[str, int]) -> None:
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
    """Modules in an `nn.Sequential` that could be blocks, outer ones first."""
    modules = list(model.named_modules(remove_duplicate=False))
    n_names = Counter(id(module) for _, module in modules)
    names = []
    for name, module in modules:
        # The network itself has the empty name. What has two names would be replaced
        # under one of them only.
        if not name or n_names[id(module)] > 1 or not _could_be_block(module):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.Sequential):
            names.append(name)
    return names


def _could_be_block(module: nn.Module) -> bool:
    """Whether it holds two layers with weights, and has a forward pass of its own."""
    # Subclasses of nn.Sequential may add a shortcut.
    is_plain = type(module).forward is nn.Sequential.forward
    n_weighted = sum(isinstance(layer, Weighted) for layer in module.modules())
    return not is_plain and n_weighted >= 2


@dataclass
class _Call:
    """A call of a module that may be a block.

    Attributes:
        given: The one tensor that it was called with; None for any other call.
        flops_before: Floating-point operations of the network up to the call.
        macs: Multiply-accumulates between its entry and its exit.
        keeps_shape: Whether it made of one tensor one of the same shape.
    """

    given: Tensor | None
    flops_before: int
    macs: int = 0
    keeps_shape: bool = False


def _record_calls(model: nn.Module, example: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Finds the modules that are called once and keep the shape of one tensor.

    The MACs between a block's entry and its exit are those that go with it, as nothing
    after it changes its shape.

    Args:
        model: The network; it is left as found.
        example: One input.

    Returns:
        Names of possible blocks, outer ones first, to what each is given and its MACs.
    """
    model = shared_copy(model)
    counter = FlopCounterMode(display=False)
    calls: dict[str, list[_Call]] = {}

    def enter(name: str, module: nn.Module, args: tuple, options: dict) -> None:
        given = None
        if len(args) == 1 and not options and isinstance(args[0], Tensor):
            # Cloned, since the block may change its input in place.
            given = args[0].clone()
        call = _Call(given, counter.get_total_flops())
        calls.setdefault(name, []).append(call)

    def leave(name: str, module: nn.Module, args: tuple, output: object) -> None:
        call = calls[name][-1]
        # A multiply-accumulate is two operations.
        call.macs = (counter.get_total_flops() - call.flops_before) // 2
        if call.given is not None and isinstance(output, Tensor):
            call.keeps_shape = output.shape == call.given.shape

    names = _candidates(model)
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
        module.register_forward_hook(partial(leave, name))
    _count_forward(model, example, counter)
    possible = {}
    for name in names:
        if len(calls.get(name, [])) != 1:
            continue
        (call,) = calls[name]
        if call.given is not None and call.keeps_shape:
            possible[name] = (call.given, call.macs)
    return possible


@torch.no_grad()
def _hands_input_on(block: nn.Module, given: Tensor) -> bool:
    """Whether the block, with its parameters at zero, returns what it is given."""
    silent = copy.deepcopy(block)
    for parameter in silent.parameters():
        parameter.zero_()
    for name, buffer in silent.named_buffers():
        # Batch norm without parameters subtracts its mean from the zeros.
        if name.endswith("running_mean"):
            buffer.zero_()
    # Zeros prove nothing: blocks without a shortcut return them as well.
    return bool(given.any()) and torch.equal(silent(given.clone()), given)


def _replace_by_identity(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Replaces the named blocks in place."""
    # Those inside others first, while their names still lead somewhere.
    for name in sorted(names, reverse=True):
        model.set_submodule(name, nn.Identity())
    return model


def _n_params_only_in(model: nn.Module, name: str) -> int:
    """Parameters of a module that no other part of the model uses."""
    # By identity: a weight that two layers share has two names.
    elsewhere = set()
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if not key.startswith(f"{name}."):
            elsewhere.add(id(parameter))
    n_params = 0
    for parameter in model.get_submodule(name).parameters():
        if id(parameter) not in elsewhere:
            n_params += parameter.numel()
    return n_params


def _count_macs(model: nn.Module, example: Tensor) -> int:
    """What PyTorch counts for one sample in eval mode."""
    counter = FlopCounterMode(display=False)
    _count_forward(shared_copy(model).eval(), example[:1], counter)
    return counter.get_total_flops() // 2


@torch.no_grad()
def _count_forward(model: nn.Module, example: Tensor, counter: FlopCounterMode) -> None:
    """Counts a forward pass; attention in the model is opened, in place."""
    # As products, since fused attention isn't counted.
    with counter, sdpa_kernel(SDPBackend.MATH):
        open_attention(model)(example)


def _record_answers(model: nn.Module, images: Images) -> EvalBatches:
    """The images with the answers that `model` gives on batch statistics."""
    eval_batches = EvalBatches(images)
    twin = shared_copy(model)
    with on_batch_statistics(twin):
        # Without bfloat16: what one block changes may be less than its rounding.
        eval_batches.set_soft_targets(twin, "off")
    return eval_batches


def _measure_damage(
    model: nn.Module, names: Sequence[str], eval_batches: EvalBatches
) -> dict[str, float]:
    """Divergence from the recorded answers when each block alone leaves `model`.

    Args:
        model: The network as far as it is left; it isn't changed.
        names: Blocks to leave out, one at a time.
        eval_batches: Images with the whole network's answers.

    Returns:
        Names to nats.
    """
    damage = {}
    for name in names:
        shorter = _replace_by_identity(shared_copy(model), [name])
        with on_batch_statistics(shorter):
            damage[name] = evaluate(shorter, eval_batches, "off").loss
    return damage
