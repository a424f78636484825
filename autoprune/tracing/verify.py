"""The proof that a network was traced right: with the same channels, the pruned network
equals the masked one.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.structure.groups import Group, Groups, own_tensors, tensors_in
from autoprune.structure.slicing import Slicer, shared_copy
from autoprune.tracing.masking import Masked

# float64 agrees to about 1e-13, float32 to 1e-5; a wrong index or a channel kept alive
# by its bias shows at 1e-3 and above.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
MAX_FLOAT64_PARAMETERS = 50_000_000
"""Larger networks are checked in float32 and pruned once, to bound time and memory."""
LARGE = 1_000_000
# ReLUs that happen to be off hide their channels, both hidden units of a small
# squeeze-and-excitation block in one draw of four; other weights bring them out.
DRAWS = 8
UNCHANGED = "masking it doesn't change the output"


def failing_groups(model: nn.Module, groups: Groups, example: Tensor) -> dict[str, str]:
    """Groups whose pruned network isn't the masked one, each with the reason. The model
    is left as found.

    Every parameter and buffer is drawn at random for the check, so that zeros of a
    trained network hide nothing, and masking has to change the output. All groups are
    pruned at once, each to a random part of its channels, then to the other part; where
    that fails, halving the set finds the groups that do.

    Args:
        model: The network, its attention open.
        groups: Its trace.
        example: An input, for its shape.
    """
    draw = partial(_Check, model, groups, example)
    check = draw(seed=0)
    if not len(groups) or check.joint_failure(groups) is None:
        return {}
    # Nearly all that fails doesn't run, which a forward pass for each group tells.
    trials = {group.name: check.trial(check.parts([group])[0]) for group in groups}
    failing = {
        name: failure for name, failure in trials.items() if isinstance(failure, str)
    }
    failing |= _failing_apart(
        check, draw, [group for group in groups if group.name not in failing]
    )
    sound = [group for group in groups if group.name not in failing]
    while (failure := check.joint_failure(sound)) not in (None, UNCHANGED):
        last = _last_straw(check, sound)
        failing[sound[last].name] = f"together with other groups, {failure}"
        del sound[last]
    return failing


def _failing_apart(
    check: "_Check", draw: Callable[..., "_Check"], groups: list[Group]
) -> dict[str, str]:
    """Groups that can't be pruned, found by halving the set as long as pruning all of
    it fails.
    """
    if not groups:
        return {}
    failure = check.joint_failure(groups)
    if failure is None:
        return {}
    if len(groups) > 1:
        middle = len(groups) // 2
        return _failing_apart(check, draw, groups[:middle]) | _failing_apart(
            check, draw, groups[middle:]
        )
    for seed in range(1, DRAWS):
        if failure == UNCHANGED:
            failure = draw(seed=seed).joint_failure(groups)
    return {} if failure is None else {groups[0].name: failure}


def _last_straw(check: "_Check", groups: list[Group]) -> int:
    """Position of the first group that can't be pruned together with those before it."""
    low, high = 0, len(groups)
    while high - low > 1:
        middle = (low + high) // 2
        passes = check.joint_failure(groups[:middle]) in (None, UNCHANGED)
        low, high = (middle, high) if passes else (low, middle)
    return low


class _Check:
    """One draw of random weights and one random input."""

    def __init__(self, model: nn.Module, groups: Groups, example: Tensor, seed: int):
        n_parameters = sum(tensor.numel() for tensor in own_tensors(model).values())
        dtype = (
            torch.float64 if n_parameters <= MAX_FLOAT64_PARAMETERS else torch.float32
        )
        self.is_large = dtype == torch.float32
        self.random = np.random.Generator(np.random.SFC64(seed))
        self.groups, self.tolerance = groups, TOLERANCE[dtype]
        self.twin = randomised(model, self.random, dtype)
        self.example = torch.from_numpy(
            self.random.standard_normal(tuple(example.shape))
        ).to(dtype)
        try:
            self.dense = self._output(self.twin)
        except RuntimeError:  # a forward pass that insists on float32
            self.twin, self.example, self.tolerance = (
                self.twin.float(),
                self.example.float(),
                TOLERANCE[torch.float32],
            )
            self.dense = self._output(self.twin)

    @torch.no_grad()
    def _output(self, model: nn.Module) -> Tensor:
        """Every tensor that a network returns, as one vector."""
        return torch.cat(
            [tensor.flatten().double() for tensor in tensors_in(model(self.example))]
        )

    def parts(self, groups: Iterable[Group]) -> list[dict[str, Tensor]]:
        """Each group's channels cut in two at random, a quarter at least on either
        side.

        Sizes differ from group to group: with equal ones, groups that must keep equally
        many would pass.
        """
        kept: list[dict[str, Tensor]] = [{}, {}]
        for group in groups:
            order = torch.from_numpy(self.random.permutation(group.channels))
            fewest = max(1, group.channels // 4)
            size = int(
                self.random.integers(fewest, group.channels - fewest, endpoint=True)
            )
            for part, channels in zip(
                kept, order.split([size, group.channels - size]), strict=True
            ):
                part[group.name] = channels.sort().values
        return kept

    def ends(self, groups: Iterable[Group]) -> dict[str, Tensor]:
        """The first or the last channels of each group, which shows best where the code
        cuts at a fixed place.
        """
        kept = {}
        for group in groups:
            first = (
                int(self.random.integers(1, group.channels))
                if group.channels > 1
                else 0
            )
            channels = torch.arange(group.channels)
            kept[group.name] = (
                channels[first:]
                if self.random.random() < 0.5
                else channels[: group.channels - first]
            )
        return kept

    def joint_failure(self, groups: Iterable[Group]) -> str | None:
        """What is wrong with pruning all of `groups` at once to a random part, to the
        other, or to one end, or None.
        """
        kept = [*self.parts(groups), self.ends(groups)][: 1 if self.is_large else 3]
        return next(
            (failure for part in kept if (failure := self.failure(part)) is not None),
            None,
        )

    def trial(self, kept: dict[str, Tensor]) -> Tensor | str:
        """What the pruned network returns, or why it doesn't run."""
        try:
            return self._output(Slicer(self.twin, self.groups, borrow=True).apply(kept))
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            return f"the pruned network doesn't run: {next(iter(str(error).splitlines()), type(error).__name__)}"

    def failure(self, kept: dict[str, Tensor]) -> str | None:
        """What is wrong with pruning to `kept`, or None."""
        pruned = self.trial(kept)
        if isinstance(pruned, str):
            return pruned
        masked = self._output(Masked(self.twin, self.groups, kept))
        if pruned.shape != masked.shape:
            return "pruning it changes the shape of the output"
        scale = masked.abs().max()
        if (masked - self.dense).abs().max() <= self.tolerance * scale:
            return UNCHANGED
        error = ((pruned - masked).abs().max() / scale).item()
        return (
            None
            if error < self.tolerance
            else f"pruned and masked network differ by {error:.1e}"
        )


def randomised(
    model: nn.Module, generator: np.random.Generator, dtype: torch.dtype
) -> nn.Module:
    """A copy with random weights, tame enough that activations neither vanish nor
    explode; integers stay.

    Tensors of one kind and shape that are large share their values: drawing each would
    take longer, and more memory, than running the network. Nothing hides behind that,
    since every layer keeps other channels.
    """
    twin, drawn = shared_copy(model), {}
    for name, tensor in own_tensors(twin).items():
        if tensor.is_floating_point():
            is_positive = name.endswith("running_var") or (
                tensor.ndim == 1 and name.endswith("weight")
            )
            kind = is_positive, tensor.shape
            if kind not in drawn or tensor.numel() < LARGE:
                drawn[kind] = _drawn(is_positive, tensor.shape, generator, dtype)
            tensor.data = drawn[kind]
    return twin


def _drawn(
    is_positive: bool,
    shape: torch.Size,
    generator: np.random.Generator,
    dtype: torch.dtype,
) -> Tensor:
    values = torch.from_numpy(
        generator.random(
            tuple(shape), np.float64 if dtype == torch.float64 else np.float32
        )
    )
    if is_positive:
        return values.add_(0.5)
    variance = 1 / max(1, shape[1:].numel()) if len(shape) > 1 else 0.04
    return values.sub_(0.5).mul_((12 * variance) ** 0.5)
