"""What must hold for a network of any recipe, measured: pruned equals masked, costs are
exact, nothing else changes.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from nets import SIZE, counted_macs, difference, images, outputs, random_kept
from recipes import Recipe, build
from torch import Tensor, nn

from autoprune.costs.cost import CostTable
from autoprune.structure.groups import Groups, positions, removal_mask
from autoprune.structure.slicing import prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace
from experiments.coverage_tools import zero_removed

TOLERANCE = 1e-9
CHANGED = 1e-9
NUDGE = 1e-3
"""Large against rounding, too small to bring an activation to life that happens to be
off.
"""

KeptIndices = dict[str, Tensor]


@dataclass
class Findings:
    """What checking one network found.

    Attributes:
        prunable: Number of prunable groups.
        pinned: The reasons of the others.
        error: The largest difference between pruned and masked, relative to the largest
            output.
        failures: What didn't hold, in words; empty is a pass.
    """

    prunable: int = 0
    pinned: list[str] = field(default_factory=list)
    error: float = 0.0
    failures: list[str] = field(default_factory=list)


def check(recipe: Recipe, max_single: int = 4) -> Findings:
    """Every contract on the network of a recipe; exceptions are failures as well.

    Args:
        recipe: The network.
        max_single: Groups to prune alone, after all of them jointly.
    """
    findings = Findings()
    try:
        model = build(recipe)
        before = copy.deepcopy(model.state_dict())
        groups = trace(model, images(1, SIZE).double())
        findings.prunable, findings.pinned = (
            len(groups),
            [group.pinned for group in groups.pinned],
        )
        for kept in allocations(groups, max_single):
            check_allocation(model, groups, kept, findings)
            if not any(step.sees_channels_together for step in recipe.steps):
                check_zeroed(model, groups, kept, findings)
        if not all(
            torch.equal(before[name], tensor)
            for name, tensor in model.state_dict().items()
        ):
            findings.failures.append("the model has changed")
    except Exception as error:
        findings.failures.append(
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
    return findings


def allocations(groups: Groups, max_single: int) -> Iterable[KeptIndices]:
    """All groups jointly, twice, one channel of each, and single groups."""
    if len(groups):
        yield from (random_kept(groups, seed) for seed in range(2))
        yield {group.name: torch.tensor([group.channels - 1]) for group in groups}
    for group in list(groups)[:: max(1, len(groups) // max_single)]:
        order = torch.randperm(
            group.channels, generator=torch.Generator().manual_seed(group.channels)
        )
        yield {group.name: order[: max(1, group.channels // 2)].sort().values}


def check_allocation(
    model: nn.Module,
    groups: Groups,
    kept: KeptIndices,
    findings: Findings,
    size: int = SIZE,
) -> None:
    """Adds to `findings` what one allocation of a float64 network says."""
    pruned, counts = (
        prune(model, groups, kept),
        {name: len(channels) for name, channels in kept.items()},
    )
    x = images(2, size, torch.float64)
    masked = outputs(mask(model, groups, kept), x)
    error = difference(outputs(pruned, x), masked)
    findings.error = max(findings.error, error)
    if not error < TOLERANCE:
        findings.failures.append(
            f"pruned and masked differ by {error:.1e} for {_listed(kept)}"
        )
    if difference(outputs(model, x), masked) < CHANGED and not is_ignored(
        model, groups, kept, x
    ):
        findings.failures.append(f"masking changes nothing for {_listed(kept)}")
    costs = CostTable(groups)
    for metric, predicted, counted in (
        ("macs", costs.macs(counts), counted_macs(pruned, size)),
        (
            "params",
            costs.params(counts),
            sum(parameter.numel() for parameter in pruned.parameters()),
        ),
    ):
        if predicted != counted:
            findings.failures.append(
                f"{metric} {predicted} predicted, {counted} counted for {_listed(kept)}"
            )


def check_zeroed(
    model: nn.Module, groups: Groups, kept: KeptIndices, findings: Findings
) -> None:
    """Compares with a reference that follows no labels: weights that read a removed
    channel are zero.
    """
    x = images(2, SIZE, torch.float64)
    error = difference(
        outputs(prune(model, groups, kept), x),
        outputs(zero_removed(model, groups, kept), x),
    )
    if not error < TOLERANCE:
        findings.failures.append(
            f"pruned and zeroed differ by {error:.1e} for {_listed(kept)}"
        )


def is_ignored(model: nn.Module, groups: Groups, kept: KeptIndices, x: Tensor) -> bool:
    """Whether the output is the same when the layers that produce the removed channels
    compute something else.
    """
    other = copy.deepcopy(model)
    tensors, noise = other.state_dict(), torch.Generator().manual_seed(0)
    for group in groups:
        for member in group.members:
            if member.role == "produce":
                gone = positions(member, removal_mask(group, kept))
                rows = tensors[member.tensor].index_select(member.axis, gone)
                rows += NUDGE * torch.randn(
                    rows.shape, generator=noise, dtype=rows.dtype
                )
                tensors[member.tensor].index_copy_(member.axis, gone, rows)
    return difference(outputs(other, x), outputs(model, x)) < CHANGED


def _listed(kept: KeptIndices) -> str:
    return ", ".join(f"{name}={channels.tolist()}" for name, channels in kept.items())
