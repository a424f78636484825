"""Tracing: one forward pass in which the network's own operations move channel labels.

No table of layer couplings and no list of architectures: what is added, concatenated,
reshaped or padded in the forward pass decides which channels belong together. Every
group is then proven: the pruned network equals the masked one.
"""

from typing import Any

import torch
from torch import nn

from autoprune.costs.cost import CostTable
from autoprune.errors import UserError, first_line
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Group, Groups, tensors_in
from autoprune.structure.inputs import Example, Inputs
from autoprune.structure.slicing import copy_buffers, shared_copy
from autoprune.structure.wrappers import run_uncompiled, unwrap
from autoprune.tracing.dispatch import LabelDispatchMode, track_labels
from autoprune.tracing.grouping import derive_groups
from autoprune.tracing.mac_coverage import both_axes_share, prunable_share
from autoprune.tracing.randomness import fixed_randomness
from autoprune.tracing.size_notes import NotingMode
from autoprune.tracing.sizes import Demand, sized_attributes
from autoprune.tracing.tracer import Tracer
from autoprune.tracing.training_mode import (
    AttributeReads,
    depends_on_mode,
    merge_training,
    training_tracer,
    watch_reads,
)
from autoprune.tracing.unread_attributes import note_boundaries
from autoprune.tracing.verify import prove


def trace(model: nn.Module, example: Example, verify: bool = True) -> Groups:
    """Finds the groups of channels that can only be pruned together.

    The model is left as found.

    Args:
        model: Any network with float parameters; wrappers such as those of several GPUs
            and of `torch.compile` are taken off.
        example: One input, `(batch, 3, height, width)`; or a tuple or list of
            positional inputs, or a dict of inputs by keyword. Of a batch only the first
            sample is used, see `Inputs.first_sample`; costs are those of what is used.
        verify: Prove every group numerically and pin those that fail. Without it, trust
            the labels.

    Returns:
        The prunable groups and the pinned ones, each of those with its reason.

    Raises:
        UserError: If the network can't run on the example, its path depends on the
            values of activations, its parameters aren't finite, or it is held in a form
            that can't be pruned, such as TorchScript.
    """
    twin = _private_copy(unwrap(model))
    inputs = Inputs.from_example(example)
    inputs.check_fits(twin)
    tracer = Tracer(twin)
    # Channels don't depend on how many images there are.
    sample = inputs.first_sample().in_float32()
    with watch_reads(twin) as reads, note_boundaries(tracer) as boundaries:
        demands = _run_forward(tracer, sample)
    more_demands = None
    if depends_on_mode(twin, reads):
        more_demands = _add_training(tracer, inputs, reads)
    demands += more_demands or []
    groups = derive_groups(tracer, demands, boundaries, reads)
    if not verify:
        return groups
    verdict = prove(twin, groups, sample, more_demands is not None)
    # What fails keeps all its channels.
    return groups.with_pins(verdict.failing).with_least(verdict.least)


def _private_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode, its attention modules open."""
    twin = run_uncompiled(shared_copy(model)).eval().cpu().float()
    copy_buffers(twin)
    # Channels-last tensors take other kernels (as_strided_), which say nothing about
    # channels.
    twin = twin.to(memory_format=torch.contiguous_format)
    for name, tensor in twin.state_dict().items():
        # Buffers may be empty, and then have neither a least nor a greatest value.
        if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            raise UserError(
                "model",
                f"{name} holds NaN or infinite values; pruning needs a trained, "
                f"finite network",
            )
    return open_attention(twin.requires_grad_(False))


def _add_training(
    tracer: Tracer, inputs: Inputs, reads: AttributeReads
) -> list[Demand] | None:
    """Adds what the network does in training mode alone.

    Args:
        tracer: That of the evaluation pass.
        inputs: The example.
        reads: The attributes that evaluation has read; those of training are added.

    Returns:
        The sizes that the code asked for, or None where it did nothing more.
    """
    training = training_tracer(tracer)
    try:
        with watch_reads(training.model) as training_reads:
            demands = _run_forward(training, inputs.first_sample().in_float32())
    except UserError as error:
        reason = error.reason.partition(";")[0]
        tracer.notes.append(
            f"the training mode can't be traced with this example ({reason}), so what "
            f"runs in training only keeps its shape"
        )
        return None
    reads |= training_reads
    return demands if merge_training(tracer, training) else None


def _run_forward(tracer: Tracer, inputs: Inputs) -> list[Demand]:
    """Runs the forward pass; the inputs' channels and the output's are pinned.

    Args:
        tracer: The notebook of the run.
        inputs: The network's inputs, one sample of each.

    Returns:
        The sizes that the code asked for, in order.
    """
    sizes = NotingMode(tracer)
    try:
        with (
            torch.no_grad(),
            fixed_randomness(),
            track_labels(tracer, inputs),
            sized_attributes(tracer.model, sizes),
            LabelDispatchMode(tracer),
            sizes,
        ):
            output = inputs.run(tracer.model)
    except UserError:
        raise
    except Exception as error:  # whatever the user's forward raises
        raise UserError(
            "model",
            f"tracing failed in {tracer.current_module}: "
            f"{type(error).__name__}: {first_line(error)}",
        ) from error
    outputs = tensors_in(output)
    if not outputs:
        raise UserError(
            "model",
            f"its forward pass returns no tensor, but {type(output).__name__}; return "
            f"tensors, alone or in tuples, lists, dicts or dataclasses",
        )
    for tensor in outputs:
        tracer.book.pin(tracer.labels(tensor), "feeds the network's output")
    return sizes.demands


def describe(groups: Groups) -> dict[str, Any]:
    """A trace as plain data, for `autoprune trace --json`.

    `prunable_macs_share` is the share of the MACs in layers of which a prunable group
    touches an axis, `both_axes_macs_share` in those that shrink on both,
    `removable_macs_share` what goes with one channel left of each group.
    """
    costs = CostTable(groups)
    dense_macs = costs.macs(costs.dense)
    # No group can go altogether.
    one_channel_each = costs.dense * 0 + 1
    # A network may have no layer that multiplies.
    removable_share = 1 - costs.macs(one_channel_each) / max(1, dense_macs)
    return {
        "macs": dense_macs,
        "params": costs.params(costs.dense),
        "prunable_macs_share": prunable_share(groups),
        "both_axes_macs_share": both_axes_share(groups),
        "removable_macs_share": removable_share,
        "groups": [_describe_group(group) for group in groups.all],
        "unsupported": list(groups.unsupported),
    }


def _describe_group(group: Group) -> dict[str, Any]:
    members = []
    for member in group.members:
        members.append(
            {"tensor": member.tensor, "axis": member.axis, "role": member.role}
        )
    return {
        "name": group.name,
        "channels": group.channels,
        "prunable": group.pinned is None,
        "pinned": group.pinned,
        "macs_share": group.macs_share,
        "members": members,
    }
