"""Tracing: one forward pass in which the network's own operations move channel labels.

No table of layer couplings and no list of architectures: what is added, concatenated, reshaped or padded in the forward
pass decides which channels belong together. Every group found is then proven: pruned equals masked.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.cost import CostTable
from autoprune.errors import UserError
from autoprune.groups import Activation, Group, Groups, Layer, Member, own_tensors, tensors_in
from autoprune.labels import LabelBook, along, spread, varying_axes
from autoprune.rules import Call, ParameterView, movement, reshape, rule_for, same
from autoprune.verify import failing_groups

LABELS, VIEW = "_autoprune_labels", "_autoprune_view"


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
    tracer.run(example[:1].detach().to("cpu", torch.float32).contiguous())
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


@dataclass
class Tracer:
    """Collects, during one forward pass, which labels meet which axis of which tensor."""

    model: nn.Module
    book: LabelBook = field(default_factory=LabelBook)
    layers: list[Layer] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    uses: dict[tuple[str, int], tuple[Tensor, str]] = field(default_factory=dict)
    operations: list[list[Tensor]] = field(default_factory=list)
    bare: dict[str, Tensor] = field(default_factory=dict)
    _path: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name, tensor in own_tensors(self.model).items():
            axes = (spread(torch.arange(size), axis, tensor.shape) for axis, size in enumerate(tensor.shape))
            self.see(tensor, ParameterView(name, tuple(axes)))

    def run(self, example: Tensor) -> None:
        """The forward pass. The input's channels and the output's are pinned."""
        inputs = self.book.new(example.shape[1])
        self.label(example, spread(inputs, 1, example.shape))
        self.book.pin(inputs, "is the network's input")
        # The fused attention path is one operation that hides everything inside.
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        hooks = self._follow_modules()
        try:
            with torch.no_grad(), _LabelMode(self):
                output = self.model(example)
        except Exception as error:  # whatever the user's forward raises
            where = self._path[-1] if self._path else "the model"
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(f"model: tracing failed in {where}: {type(error).__name__}: {reason}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for hook in hooks:
                hook.remove()
        for tensor in tensors_in(output):
            self.book.pin(self.labels(tensor), "feeds the network's output")
        self._settle_bare_parameters()

    def _follow_modules(self) -> list:
        names = {module: name or type(module).__name__ for name, module in self.model.named_modules()}
        enter = lambda module, _: self._path.append(names.get(module, type(module).__name__))  # noqa: E731
        leave = lambda *_: self._path.pop() and None  # noqa: E731
        return [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]

    def place(self, operation) -> str:
        """An operation and the module that runs it, for messages."""
        name = operation.overloadpacket.__name__
        return f"{name} in {self._path[-1]}" if self._path else name

    def label(self, tensor: Tensor | list | tuple, labels: Tensor | list | tuple) -> None:
        """Attaches labels to an activation, or to each of several."""
        if isinstance(tensor, Tensor):
            setattr(tensor, LABELS, labels)
        else:
            for one, its in zip(tensor, labels, strict=True):
                self.label(one, its)

    def see(self, tensor: Tensor, view: ParameterView) -> None:
        """Marks a tensor as a parameter or a view of one."""
        setattr(tensor, VIEW, view)

    def parameter(self, tensor: Tensor) -> ParameterView | None:
        """The parameter behind a tensor, unless it is an activation."""
        return getattr(tensor, VIEW, None)

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether the tensor carries labels."""
        return hasattr(tensor, LABELS)

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of an activation, one an element for a bare parameter, 0 for constants; shaped like the tensor."""
        if self.is_activation(tensor):
            return getattr(tensor, LABELS)
        view = self.parameter(tensor)
        if view is None:
            return torch.zeros((), dtype=torch.int64).expand(tensor.shape)
        if view.name not in self.bare:
            shape = [int(index.max()) + 1 for index in view.index]
            self.bare[view.name] = self.book.new(int(np.prod(shape))).view(shape)
        return self.bare[view.name][view.index]

    def use(self, tensor: str, axis: int, labels: Tensor, role: str) -> None:
        """Records that `labels` meet an axis of a parameter; a second use (a shared module) joins both."""
        known = self.uses.get((tensor, axis))
        if known is not None:
            self.book.join(known[0], labels)
        else:
            self.uses[tensor, axis] = labels, role

    def _settle_bare_parameters(self) -> None:
        """A bare parameter's channels lie along the one axis on which its elements stayed apart."""
        roots = self.book.roots()
        for name, labels in self.bare.items():
            joined = torch.from_numpy(roots[labels.numpy()])
            axes = varying_axes(joined)
            if len(axes) == 1:
                line = tuple(slice(None) if axis == axes[0] else 0 for axis in range(labels.ndim))
                self.use(name, axes[0], joined[line], "follow")
            elif axes:
                self.book.pin(labels, f"parameter {name} varies along several axes")


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
