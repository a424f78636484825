"""The proof that a group was traced right: with the same channels, the pruned network equals the masked one."""

import copy

import torch
from torch import Tensor, nn

from autoprune.groups import Group, Groups, tensors_in
from autoprune.pruning import Slicer, mask

# float64 agrees to about 1e-13, float32 to 1e-5; a wrong index or a channel kept alive by its bias shows at 1e-3 and
# above.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# ReLUs that happen to be off hide their channels, both hidden units of a small squeeze-and-excitation block in one draw
# of four; other weights bring them out.
DRAWS = 8
UNCHANGED = "masking it doesn't change the output"


def failing_groups(model: nn.Module, groups: Groups, example: Tensor) -> dict[str, str]:
    """Groups whose pruned network isn't the masked one, each with the reason. The model is left as found.

    Every parameter and buffer is drawn at random for the check, so that zeros of a trained network hide nothing, and
    masking has to change the output.
    """
    reasons, undecided = {}, list(groups)
    for seed in range(DRAWS):
        if undecided:
            reasons |= _reasons(model, groups, undecided, example.shape, seed)
            undecided = [group for group in undecided if reasons[group.name] == UNCHANGED]
    return {name: reason for name, reason in reasons.items() if reason is not None}


@torch.no_grad()
def _reasons(model: nn.Module, groups: Groups, undecided: list[Group], shape, seed: int) -> dict[str, str | None]:
    generator = torch.Generator().manual_seed(seed)
    twin = _randomised(model, generator)
    example = torch.randn(shape, generator=generator).double()
    try:
        dense = _flat(twin(example))
    except RuntimeError:  # a forward pass that insists on float32
        twin, example = twin.float(), example.float()
        dense = _flat(twin(example))
    slicer = Slicer(twin, groups)
    return {group.name: _failure(group, groups, twin, slicer, example, dense, generator) for group in undecided}


def _failure(group: Group, groups: Groups, twin, slicer: Slicer, example, dense, generator) -> str | None:
    tolerance = TOLERANCE[example.dtype]
    order = torch.randperm(group.channels, generator=generator)
    for half in order.split(-(-group.channels // 2)):
        kept = {group.name: half.sort().values}
        try:
            pruned = _flat(slicer.apply(kept)(example))
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            return f"the pruned network doesn't run: {str(error).splitlines()[0]}"
        masked = _flat(mask(twin, groups, kept)(example))
        if pruned.shape != masked.shape:
            return "pruning it changes the shape of the output"
        scale = masked.abs().max()
        if (masked - dense).abs().max() > tolerance * scale:
            error = ((pruned - masked).abs().max() / scale).item()
            return None if error < tolerance else f"pruned and masked network differ by {error:.1e}"
    return UNCHANGED


def _flat(output: object) -> Tensor:
    """Every tensor that a network returned, as one vector."""
    return torch.cat([tensor.flatten().double() for tensor in tensors_in(output)])


def _randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    twin = copy.deepcopy(model).double()
    for name, tensor in twin.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 25
            tensor.normal_(0, fan_in**-0.5, generator=generator)
    return twin
