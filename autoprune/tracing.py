"""Tracing: one forward pass in which the network's own operations move channel labels.

No table of layer couplings and no list of architectures: what is added, concatenated, reshaped or padded in the forward
pass decides which channels belong together. Every group found is then proven: pruned equals masked.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.cost import CostTable
from autoprune.errors import UserError
from autoprune.groups import Activation, Group, Groups, Member, own_tensors, tensors_in
from autoprune.labels import along, spread, varying_axes
from autoprune.rules import movement, reshape, rule_for, same
from autoprune.tracer import Call, Tracer
from autoprune.verify import failing_groups


def trace(model: nn.Module, example: Tensor, verify: bool = True) -> Groups:
    """The groups of channels that can only be pruned together. The model is left as found.

    Args:
        model: Any network with one tensor input and float parameters.
        example: One input, `(batch, 3, height, width)`; only its first sample is used.
        verify: Prove every group numerically and pin those that fail. Without it, trust the labels.

    Raises:
        UserError: If the network can't run on the example, or its parameters aren't finite.
    """
    twin = _private_copy(model)
    tracer = Tracer(twin)
    _run(tracer, example[:1].detach().to("cpu", torch.float32).contiguous())
    groups = _derive(tracer)
    for name, reason in failing_groups(twin, groups, example[:1]).items() if verify else ():
        groups = _pinned(groups, name, reason)
    return groups


def _private_copy(model: nn.Module) -> nn.Module:
    # Channels-last tensors take other kernels (as_strided_), which say nothing about channels.
    twin = copy.deepcopy(model).eval().cpu().float().to(memory_format=torch.contiguous_format)
    for name, tensor in twin.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"model: {name} holds NaN or infinite values; pruning needs a trained, finite network")
    return twin.requires_grad_(False)


def _run(tracer: Tracer, example: Tensor) -> None:
    """The forward pass. The input's channels and the output's are pinned."""
    inputs = tracer.book.new(example.shape[1])
    tracer.label(example, spread(inputs, 1, example.shape))
    tracer.book.pin(inputs, "is the network's input")
    try:
        with torch.no_grad(), _module_path(tracer), _open_attention(), _LabelMode(tracer):
            output = tracer.model(example)
    except Exception as error:  # whatever the user's forward raises
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"model: tracing failed in {tracer.where}: {type(error).__name__}: {reason}") from error
    for tensor in tensors_in(output):
        tracer.book.pin(tracer.labels(tensor), "feeds the network's output")
    tracer.settle_bare_parameters()


@contextmanager
def _module_path(tracer: Tracer) -> Iterator[None]:
    """Tells the tracer which module is running; global hooks, so that the model itself isn't touched."""
    hooks = (
        nn.modules.module.register_module_forward_pre_hook(lambda module, _: tracer.entered(module)),
        nn.modules.module.register_module_forward_hook(lambda *_: tracer.left()),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _open_attention() -> Iterator[None]:
    """The fused attention path is one operation that hides everything inside."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _LabelMode(TorchDispatchMode):
    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        call, tracer = Call(self.tracer, func, args, kwargs or {}, out), self.tracer
        tensors = list(call.tensors())
        active = [tensor for tensor in tensors if tracer.is_activation(tensor)]
        if active or any(tracer.parameter(tensor) is not None for tensor in tensors):
            rule = rule_for(func)
            rule(call)
            if active and rule not in (movement, reshape, same):
                alive = {id(tensor): tensor for tensor in [*active, *tensors_in(out)] if tracer.is_activation(tensor)}
                tracer.operations.append([tracer.labels(tensor) for tensor in alive.values()])
        return out


def _derive(tracer: Tracer) -> Groups:
    """Channels with the same pattern of members form a group."""
    roots = tracer.book.roots()
    reasons = tracer.book.reasons(roots)
    uses = list(tracer.uses.items())
    used = [roots[labels.numpy()] for _, (labels, _) in uses]
    places: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for use, line in enumerate(used):
        for position, root in enumerate(line):
            if root:
                places[root][use].append(position)
    families = defaultdict(list)
    for root in sorted(places):
        pattern = tuple((use, len(at)) for use, at in places[root].items())
        families[pattern, reasons.get(root)].append(root)

    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(tracer.model).items()}
    groups, names = [], set()
    group_of: dict[int, str] = {}
    for (pattern, reason), members in families.items():
        found = tuple(
            Member(*uses[use][0], uses[use][1][1], torch.tensor([places[root][use] for root in members]))
            for use, _ in pattern
        )
        group = Group(_name(found, names), len(members), found, reason or _unprunable(found, len(members)))
        names.add(group.name)
        groups.append(group)
        if group.pinned is None:
            group_of.update(dict.fromkeys(members, group.name))
    parameters = frozenset(name for name, _ in tracer.model.named_parameters())
    operations = tuple(tuple(_activation(labels, roots, group_of) for labels in alive) for alive in tracer.operations)
    result = Groups(tuple(groups), tuple(tracer.layers), shapes, parameters, operations, tuple(tracer.unsupported))
    return replace(result, all=tuple(replace(group, macs_share=_macs_share(group, result)) for group in groups))


def _name(members: tuple[Member, ...], taken: set[str]) -> str:
    first = next((m for m in members if m.role == "produce"), members[0])
    name = first.tensor.rpartition(".")[0] if first.tensor.endswith((".weight", ".bias")) else first.tensor
    unique = name = name if first.role != "consume" else f"{name}:input"
    suffix = 2
    while unique in taken:
        unique, suffix = f"{name}#{suffix}", suffix + 1
    return unique


def _unprunable(members: tuple[Member, ...], n_channels: int) -> str | None:
    roles = {member.role for member in members}
    if "produce" not in roles:
        return "no layer of the network produces it"
    if "consume" not in roles:
        return "no layer reads it"
    return "is a single channel" if n_channels < 2 else None


def _activation(labels: Tensor, roots: np.ndarray, group_of: dict[int, str]) -> Activation:
    axes = varying_axes(labels)
    if len(axes) != 1:
        return Activation(labels.numel(), 1, {})
    line = roots[along(labels, axes[0]).numpy()]
    counts = zip(*np.unique(line, return_counts=True), strict=True)
    kept_by = {group_of[int(root)]: int(count) for root, count in counts if int(root) in group_of}
    return Activation(labels.numel() // len(line), len(line), kept_by)


def _macs_share(group: Group, groups: Groups) -> float:
    touched = {member.tensor for member in group.members}
    macs = [(layer.tensor, layer.positions * int(np.prod(groups.shapes[layer.tensor]))) for layer in groups.layers]
    return sum(cost for tensor, cost in macs if tensor in touched) / max(1, sum(cost for _, cost in macs))


def _pinned(groups: Groups, name: str, reason: str) -> Groups:
    return replace(groups, all=tuple(replace(g, pinned=reason) if g.name == name else g for g in groups.all))


def describe(groups: Groups) -> dict:
    """A trace as plain data, for `autoprune trace --json`.

    `prunable_macs_share` is the share of the MACs in layers of which a prunable group touches an axis.
    """
    costs = CostTable(groups)
    touched = {member.tensor for group in groups for member in group.members}
    macs = [
        (layer.tensor in touched, layer.positions * int(np.prod(groups.shapes[layer.tensor])))
        for layer in groups.layers
    ]
    entries = [
        {
            "name": group.name,
            "channels": group.channels,
            "prunable": group.pinned is None,
            "pinned": group.pinned,
            "macs_share": group.macs_share,
            "members": [{"tensor": m.tensor, "axis": m.axis, "role": m.role} for m in group.members],
        }
        for group in groups.all
    ]
    return {
        "macs": costs.macs(costs.dense),
        "params": costs.params(costs.dense),
        "prunable_macs_share": sum(cost for prunable, cost in macs if prunable) / max(1, sum(cost for _, cost in macs)),
        "groups": entries,
        "unsupported": list(groups.unsupported),
    }
