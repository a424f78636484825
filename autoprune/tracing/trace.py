"""Tracing: one forward pass in which the network's own operations move channel labels.

No table of layer couplings and no list of architectures: what is added, concatenated,
reshaped or padded in the forward pass decides which channels belong together. Every
group found is then proven: pruned equals masked.
"""

import torch
from torch import Tensor, nn

from autoprune.costs.cost import CostTable
from autoprune.errors import UserError
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Groups, tensors_in
from autoprune.structure.slicing import shared_copy
from autoprune.tracing.dispatch import LabelDispatchMode, track_labels
from autoprune.tracing.grouping import derive
from autoprune.tracing.mac_coverage import both_axes_share, prunable_share
from autoprune.tracing.tracer import Tracer
from autoprune.tracing.verify import failing_groups


def trace(model: nn.Module, example: Tensor, verify: bool = True) -> Groups:
    """The groups of channels that can only be pruned together. The model is left as
    found.

    Args:
        model: Any network with one tensor input and float parameters.
        example: One input, `(batch, 3, height, width)`; only its first sample is used.
        verify: Prove every group numerically and pin those that fail. Without it, trust
            the labels.

    Raises:
        UserError: If the network can't run on the example, its path depends on the
            values of activations, or its parameters aren't finite.
    """
    twin = _private_copy(model)
    tracer = Tracer(twin)
    _run(tracer, example[:1].detach().to("cpu", torch.float32).contiguous())
    groups = derive(tracer)
    return (
        groups.with_pins(failing_groups(twin, groups, example[:1]))
        if verify
        else groups
    )


def _private_copy(model: nn.Module) -> nn.Module:
    # Channels-last tensors take other kernels (as_strided_), which say nothing about
    # channels.
    twin = (
        shared_copy(model)
        .eval()
        .cpu()
        .float()
        .to(memory_format=torch.contiguous_format)
    )
    for name, tensor in twin.state_dict().items():
        if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            raise UserError(
                "model",
                f"{name} holds NaN or infinite values; pruning needs a trained, "
                f"finite network",
            )
    return open_attention(twin.requires_grad_(False))


def _run(tracer: Tracer, example: Tensor) -> None:
    """The forward pass. The input's channels and the output's are pinned."""
    try:
        with torch.no_grad(), track_labels(tracer, example), LabelDispatchMode(tracer):
            output = tracer.model(example)
    except UserError:
        raise
    except Exception as error:  # whatever the user's forward raises
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            "model",
            f"tracing failed in {tracer.where}: {type(error).__name__}: {reason}",
        ) from error
    for tensor in tensors_in(output):
        tracer.book.pin(tracer.labels(tensor), "feeds the network's output")


def describe(groups: Groups) -> dict:
    """A trace as plain data, for `autoprune trace --json`.

    `prunable_macs_share` is the share of the MACs in layers of which a prunable group
    touches an axis, `both_axes_macs_share` in those that shrink on both,
    `removable_macs_share` what goes with one channel left of each group.
    """
    costs = CostTable(groups)
    entries = [
        {
            "name": group.name,
            "channels": group.channels,
            "prunable": group.pinned is None,
            "pinned": group.pinned,
            "macs_share": group.macs_share,
            "members": [
                {"tensor": m.tensor, "axis": m.axis, "role": m.role}
                for m in group.members
            ],
        }
        for group in groups.all
    ]
    return {
        "macs": costs.macs(costs.dense),
        "params": costs.params(costs.dense),
        "prunable_macs_share": prunable_share(groups),
        "both_axes_macs_share": both_axes_share(groups),
        "removable_macs_share": 1
        - costs.macs(costs.dense * 0 + 1) / max(1, costs.macs(costs.dense)),
        "groups": entries,
        "unsupported": list(groups.unsupported),
    }
