"""The proof that a group was traced right: with the same channels, the pruned network equals the masked one."""

import copy

import torch
from torch import Tensor, nn

from autoprune.groups import Group, Groups
from autoprune.pruning import Slicer, mask

# float64 agrees to about 1e-13; a wrong index or a channel kept alive by its bias shows at 1e-3 and above.
TOLERANCE = 1e-6


def failing_groups(model: nn.Module, groups: Groups, example: Tensor) -> dict[str, str]:
    """Groups whose pruned network isn't the masked one, each with the reason. The model is left as found.

    Every parameter and buffer is drawn at random for the check, so that zeros of a trained network hide nothing, and
    masking has to change the output.
    """
    twin = _randomised(model)
    example = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).double()
    slicer, generator = Slicer(twin, groups), torch.Generator().manual_seed(1)
    with torch.no_grad():
        dense = twin(example)
        reasons = {group.name: _failure(group, groups, twin, slicer, example, dense, generator) for group in groups}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _failure(group: Group, groups: Groups, twin, slicer: Slicer, example, dense, generator) -> str | None:
    n_kept = max(1, group.channels // 2)
    kept = {group.name: torch.randperm(group.channels, generator=generator)[:n_kept].sort().values}
    try:
        pruned = slicer.apply(kept)(example)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        return f"the pruned network doesn't run: {str(error).splitlines()[0]}"
    masked = mask(twin, groups, kept)(example)
    scale = masked.abs().max()
    if (masked - dense).abs().max() <= TOLERANCE * scale:
        return "masking it doesn't change the output"
    error = ((pruned - masked).abs().max() / scale).item()
    return None if error < TOLERANCE else f"pruned and masked network differ by {error:.1e}"


def _randomised(model: nn.Module) -> nn.Module:
    twin, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(2)
    for name, tensor in twin.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 25
            tensor.normal_(0, fan_in**-0.5, generator=generator)
    return twin
