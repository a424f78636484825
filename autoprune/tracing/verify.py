"""The proof of a trace: with the same channels, pruned and masked network are equal."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import first_line
from autoprune.structure.groups import Group, Groups, named_tensors, tensors_in
from autoprune.structure.inputs import Inputs
from autoprune.structure.slicing import Slicer, shared_copy
from autoprune.tracing.masking import Masked
from autoprune.tracing.randomness import fixed_randomness
from autoprune.tracing.training_mode import set_mode

# float64 agrees to about 1e-13, float32 to 1e-5; a wrong index or a channel kept alive
# by its bias shows at 1e-3 and above.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference that passes, relative to the largest output."""
MAX_FLOAT64_PARAMETERS = 50_000_000
"""Larger networks are checked in float32 and pruned once, to bound time and memory."""
LARGE = 1_000_000
"""Elements from which tensors of one shape share their random values."""
# ReLUs that happen to be off hide their channels, for instance both hidden units of a
# small squeeze-and-excitation block; other weights bring them out.
DRAWS = 8
"""How many draws of weights a group gets to show that masking it changes something."""
FEW = (1, 2, 4, 8, 16)
"""Channels left of each group in a last trial, the first with which the network runs.

Code that does otherwise below some width, as `max(4, n // 8)` does, shows it there.
"""
NOT_RUNNING = "the pruned network doesn't run"
UNCHANGED = "masking it doesn't change the output"
UNREPEATABLE = "the network answers the same input differently each time"
NOT_FINITE = "the network's output isn't finite"


class Verdict(NamedTuple):
    """What a proof has found.

    Attributes:
        failing: Name of a group to what is wrong with pruning it.
        least: Fewest channels of each other group with which the network ran.
    """

    failing: dict[str, str]
    least: int


def prove(
    model: nn.Module, groups: Groups, inputs: Inputs, with_training: bool = False
) -> Verdict:
    """Finds the groups whose pruned network isn't the masked one.

    Every parameter and buffer is drawn at random for the check, so that zeros of a
    trained network hide nothing, and masking has to change the output. All groups are
    pruned at once, each to a random part of its channels, then to the other part; where
    that fails, halving the set finds the groups that do.

    Args:
        model: The network, its attention open; it is left as found.
        groups: Its trace.
        inputs: An example, for the shapes of floats; integers stay.
        with_training: Whether the training mode has to be right as well.

    Returns:
        The groups that fail, and how narrow the others may become.
    """
    draw = partial(_Check, model, groups, inputs, with_training)
    check = draw(seed=0)
    if not len(groups) or check.joint_failure(groups) is None:
        return Verdict({}, check.least)
    if check.failure({}) != UNCHANGED:
        # A network with a memory, say: nothing would show that a group is right.
        reason = UNREPEATABLE if check.dense.isfinite().all() else NOT_FINITE
        return Verdict({group.name: reason for group in groups}, 1)
    # Nearly all that fails doesn't run, which a forward pass for each group tells.
    failing: dict[str, str] = {}
    for group in groups:
        first_part, _ = check.random_parts([group])
        output = check.try_pruning(first_part)
        if isinstance(output, str):
            failing[group.name] = output
    running = [group for group in groups if group.name not in failing]
    failing.update(_find_failing_halves(check, draw, running))
    # What is left passes by itself, but may fail together.
    sound = [group for group in groups if group.name not in failing]
    failure = check.joint_failure(sound)
    while sound and failure is not None and failure != UNCHANGED:
        last = _first_failing(check, sound)
        failing[sound[last].name] = f"together with other groups, {failure}"
        del sound[last]
        failure = check.joint_failure(sound)
    return Verdict(failing, check.least)


def _find_failing_halves(
    check: "_Check", draw: Callable[..., "_Check"], groups: list[Group]
) -> dict[str, str]:
    """Halves a set of groups as long as pruning all of it fails.

    Args:
        check: A draw of weights.
        draw: Makes another one of a seed.
        groups: Those in question.

    Returns:
        The single groups that are left to fail, each with its reason.
    """
    if not groups:
        return {}
    failure = check.joint_failure(groups)
    if failure is None:
        return {}
    # Halves that pass may still fail together; `prove` looks at that later.
    if len(groups) > 1:
        middle = len(groups) // 2
        failing = _find_failing_halves(check, draw, groups[:middle])
        failing.update(_find_failing_halves(check, draw, groups[middle:]))
        return failing
    for seed in range(1, DRAWS):
        if failure == UNCHANGED:
            failure = draw(seed=seed).joint_failure(groups)
    return {} if failure is None else {groups[0].name: failure}


def _first_failing(check: "_Check", groups: list[Group]) -> int:
    """Position of the first group that can't be pruned together with those before it.

    A bisection: it assumes that a set with a failing subset fails.

    Args:
        check: A draw of weights.
        groups: They fail together.
    """
    low = 0
    high = len(groups)
    while high - low > 1:
        middle = (low + high) // 2
        if check.joint_failure(groups[:middle]) in (None, UNCHANGED):
            low = middle
        else:
            high = middle
    return low


class _Check:
    """One draw of random weights and of random inputs.

    Args:
        model: The network; it is left as found.
        groups: Its trace.
        inputs: An example, for the shapes of floats; integers stay.
        with_training: Whether the training mode's outputs count as well.
        seed: Of the draw.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        inputs: Inputs,
        with_training: bool,
        seed: int,
    ):
        self.modes = (False, True) if with_training else (False,)
        # With how few channels of each group the last joint trial ran.
        self.least = 1
        n_parameters = 0
        for tensor in named_tensors(model).values():
            n_parameters += tensor.numel()
        self.is_large = n_parameters > MAX_FLOAT64_PARAMETERS
        self.dtype = torch.float32 if self.is_large else torch.float64
        # SFC64 is the fastest of numpy's generators, and there is much to draw.
        self.random = np.random.Generator(np.random.SFC64(seed))
        self.groups = groups
        self.tolerance = TOLERANCE[self.dtype]
        self.twin = copy_with_random_weights(model, self.random, self.dtype)
        self.inputs = inputs.change(self._draw_input)
        try:
            self.dense = self._output(self.twin)
        except RuntimeError:  # a forward pass that insists on float32
            self.twin = self.twin.float()
            self.inputs = self.inputs.in_float32()
            self.tolerance = TOLERANCE[torch.float32]
            self.dense = self._output(self.twin)

    def _draw_input(self, tensor: Tensor) -> Tensor:
        """Random values in the shape of a float input; others as they are."""
        if not tensor.is_floating_point():
            return tensor
        values = self.random.standard_normal(tuple(tensor.shape))
        return torch.from_numpy(values).to(self.dtype)

    @torch.no_grad()
    def _output(self, model: nn.Module) -> Tensor:
        """Every tensor that a network returns, in all modes, as one vector."""
        tensors = []
        for is_training in self.modes:
            set_mode(model, is_training)
            # What is said of narrow networks, such as a deviation over one channel,
            # doesn't concern the user's.
            with fixed_randomness(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                output = self.inputs.run(model)
            for tensor in tensors_in(output):
                tensors.append(tensor.flatten().double())
        return torch.cat(tensors)

    def random_parts(
        self, groups: Iterable[Group]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cuts each group's channels in two at random, a quarter at least on each side.

        Sizes differ from group to group: with equal ones, groups that must keep equally
        many would pass.

        Returns:
            Group to one part of its channels, and to the other.
        """
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        for group in groups:
            order = torch.from_numpy(self.random.permutation(group.channels))
            fewest = max(1, group.channels // 4)
            most = group.channels - fewest
            size = int(self.random.integers(fewest, most, endpoint=True))
            # Both parts, so that every channel is removed once and kept once.
            first[group.name] = order[:size].sort().values
            second[group.name] = order[size:].sort().values
        return first, second

    def random_ends(self, groups: Iterable[Group]) -> dict[str, Tensor]:
        """The first or the last channels of each group, a random number of them.

        That shows best where the code cuts at a fixed place.
        """
        kept = {}
        for group in groups:
            n_removed = 0
            if group.channels > 1:
                n_removed = int(self.random.integers(1, group.channels))
            channels = torch.arange(group.channels)
            if self.random.random() < 0.5:
                kept[group.name] = channels[n_removed:]
            else:
                kept[group.name] = channels[: group.channels - n_removed]
        return kept

    def joint_failure(self, groups: Iterable[Group]) -> str | None:
        """What is wrong with pruning all groups at once, or None.

        They are pruned to a random part, to the other, to one end, and to as few
        channels as they run with: to one, else to two, and so on.
        """
        # All are drawn even if the first fails, so that later draws don't depend on it.
        trials = [*self.random_parts(groups), self.random_ends(groups)]
        if self.is_large:
            return self.failure(trials[0])
        # The first failure says enough, and each trial runs the network twice.
        for kept in trials:
            failure = self.failure(kept)
            if failure is not None:
                return failure
        failure: str | None = None
        for n_left in FEW:
            self.least = n_left
            failure = self.failure(_few_of_each(groups, n_left), may_be_undefined=True)
            # A deviation over one weight raises, say, which is no wrong answer.
            if failure is None or not failure.startswith(NOT_RUNNING):
                return failure
        return failure

    def try_pruning(self, kept: dict[str, Tensor]) -> Tensor | str:
        """What the pruned network returns, or why it doesn't run."""
        try:
            slicer = Slicer(self.twin, self.groups, borrow=True)
            return self._output(slicer.apply(kept))
        # Whatever the network's own code raises for sizes that it doesn't expect.
        except Exception as error:
            return f"{NOT_RUNNING}: {_what_was_raised(error)}"

    def failure(
        self, kept: dict[str, Tensor], may_be_undefined: bool = False
    ) -> str | None:
        """What is wrong with pruning to these channels, or None.

        Args:
            kept: Group to the channels that it keeps.
            may_be_undefined: Whether both networks may answer with NaN in the same
                places, as a deviation over a single channel is.
        """
        pruned = self.try_pruning(kept)
        if isinstance(pruned, str):
            return pruned
        try:
            masked = self._output(Masked(self.twin, self.groups, kept))
        except Exception as error:
            return f"its masked network doesn't run: {_what_was_raised(error)}"
        if pruned.shape != masked.shape:
            return "pruning it changes the shape of the output"
        dense = self.dense
        if may_be_undefined:
            is_defined = ~(pruned.isnan() & masked.isnan())
            if not is_defined.any():
                return None
            pruned = pruned[is_defined]
            masked = masked[is_defined]
            dense = dense[is_defined]
        scale = masked.abs().max()
        # Where nobody reads the channels, equality would prove nothing.
        if (masked - dense).abs().max() <= self.tolerance * scale:
            return UNCHANGED
        error = ((pruned - masked).abs().max() / scale).item()
        # NaN fails too.
        if error < self.tolerance:
            return None
        return f"pruned and masked network differ by {error:.1e}"


def _few_of_each(groups: Iterable[Group], n_left: int) -> dict[str, Tensor]:
    """Channels from the middle of each group; all of one that has no more."""
    kept = {}
    for group in groups:
        n = min(n_left, group.channels)
        first = min(group.channels // 2, group.channels - n)
        kept[group.name] = torch.arange(first, first + n)
    return kept


def _what_was_raised(error: Exception) -> str:
    """A line about an error of the network's own code."""
    if isinstance(error, RuntimeError | ValueError) and str(error):
        return first_line(error)
    # The message of a `KeyError` is the key alone.
    return f"{type(error).__name__}: {first_line(error)}"


def copy_with_random_weights(
    model: nn.Module, generator: np.random.Generator, dtype: torch.dtype
) -> nn.Module:
    """A copy with random weights; integers stay.

    They are tame enough that activations neither vanish nor explode. Tensors of one
    kind and shape that are large share their values: drawing each would take longer,
    and more memory, than running the network. Nothing hides behind that, since every
    layer keeps other channels.

    Args:
        model: The network; it is left as found.
        generator: Where the values come from.
        dtype: Of the copy's parameters and buffers, float64 or float32.
    """
    twin = shared_copy(model)
    drawn: dict[tuple[bool, torch.Size], Tensor] = {}
    for name, tensor in named_tensors(twin).items():
        if not tensor.is_floating_point():
            continue
        # Scales of norms too: around zero they would erase what they scale.
        is_scale = tensor.ndim == 1 and name.endswith("weight")
        is_positive = name.endswith("running_var") or is_scale
        kind = (is_positive, tensor.shape)
        if kind not in drawn or tensor.numel() < LARGE:
            drawn[kind] = _draw_values(is_positive, tensor.shape, generator, dtype)
        tensor.data = drawn[kind]
    return twin


def _draw_values(
    is_positive: bool,
    shape: torch.Size,
    generator: np.random.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Uniform values: from 0.5 to 1.5 if positive, else around zero.

    The variance around zero is 1 / fan-in, so that a layer keeps the scale of its
    input; for vectors, such as biases, it is 0.04.
    """
    number = np.float64 if dtype == torch.float64 else np.float32
    values = torch.from_numpy(generator.random(tuple(shape), number))
    if is_positive:
        return values.add_(0.5)
    variance = 1 / max(1, shape[1:].numel()) if len(shape) > 1 else 0.04
    # A uniform distribution of width 1 has the variance 1 / 12.
    return values.sub_(0.5).mul_((12 * variance) ** 0.5)
