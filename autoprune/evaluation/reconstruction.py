"""Weights of pruned layers that best reproduce the dense network's layer outputs.

He et al. 2017 ("Channel Pruning for Accelerating Very Deep Neural Networks"), section
3.1, eq. 4, as AMC uses it: a layer that lost input channels gets those weights for the
others that come nearest, by least squares, to its old outputs on sampled patches. Old
outputs are linear in the patches, so second moments are all that a candidate needs of
the data: they are measured once, and a candidate costs one small system of equations a
layer.

With G the second moments of a layer's inputs and W its dense weights, the weights V of
the kept inputs K solve G[K, K] V = (G W)[K]. Say that a linear layer computes
1 a + 2 b + 3 c from three channels, of which a and b are independent, with mean 0 and
variance 1, and c always equals a. Then G is [[1, 0, 1], [0, 1, 0], [1, 0, 1]], and
without c, V is (4, 2): a takes over what c did. Slicing would leave (1, 2).

Where we differ:
- Patches are those of the dense network, as by default in AMC's code, not of the layers
  pruned so far (section 3.2, eq. 5), which differ from candidate to candidate.
- A ridge pulls the weights towards the dense ones, for redundant inputs and few
  patches. Where nothing is removed nothing changes, and on the sampled patches no layer
  is further from its old outputs than if it were just sliced.
- Means are matched by the bias, which is solved for together with the weights. Right in
  front of a batch norm a layer without bias is solved up to a constant per output: the
  norm takes that away once its statistics are measured anew. Any other layer without
  bias has to match the means with its weights.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import UserError
from autoprune.evaluation.direct_norms import watch_direct_norms
from autoprune.evaluation.evaluate import BatchNorm
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Groups, positions, removal_mask
from autoprune.structure.slicing import KeptIndices, shared_copy

BATCH = 100
"""Images of one forward pass."""
PLAIN = (nn.Conv2d.forward, nn.Linear.forward)
"""What a layer's `forward` must be, so that it is known what the layer computes."""
LinearLayer = nn.Conv2d | nn.Linear


class Reconstruction:
    """Weights of pruned layers that best reproduce the dense network's layer outputs.

    Nothing changes after construction, so threads may share it.

    Args:
        model: The dense network; left as found.
        groups: Its trace.
        inputs: Normalised calibration images `(n, 3, height, width)`.
        samples_per_image: Patches per image and layer, at random but evenly spread.
        seed: Seed of their places.
        ridge: Pull towards the dense weights, as of this many more patches per input,
            independent and of mean variance.
        max_size: Most inputs per output of a layer, channels times kernel; memory grows
            with the square.

    Attributes:
        skipped: Weights that read prunable channels but are left sliced, each with the
            reason.

    Raises:
        UserError: If a number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        inputs: Tensor,
        samples_per_image: int = 10,
        seed: int = 0,
        ridge: float = 0.1,
        max_size: int = 4608,
    ):
        if samples_per_image < 1:
            raise UserError(
                "samples_per_image", f"must be at least 1, got {samples_per_image!r}"
            )
        # Written so that NaN fails as well.
        if not 0 <= ridge < math.inf:
            raise UserError("ridge", f"must be a finite number from 0, got {ridge!r}")
        self.skipped: dict[str, str] = {}
        self._groups = groups
        self._systems: dict[str, _System] = {}
        # With attention opened, as pruned networks have it: its projections are plain
        # layers then.
        dense = open_attention(shared_copy(model)).eval()
        batches = inputs.split(BATCH)
        moments = self._empty_moments(dense, max_size)
        generator = torch.Generator().manual_seed(seed)
        _measure(dense, moments.values(), batches, samples_per_image, generator)
        for name, measured in moments.items():
            # The trace saw so many uses of the weight; where the module ran less often,
            # the weight is also used without it, by something that isn't measured.
            n_uses = sum(layer.tensor == name for layer in groups.layers)
            if measured.n_calls == len(batches) * n_uses:
                self._systems[name] = measured.system(ridge)
            else:
                self.skipped[name] = "is used elsewhere too, or not by its module"

    def _empty_moments(self, dense: nn.Module, max_size: int) -> dict[str, "_Moments"]:
        """By name of the weight, for the layers that can be reconstructed."""
        # A dict, because a weight that reads several groups is to come once.
        names: dict[str, None] = {}
        for group in self._groups:
            for member in group.consumers:
                names[member.tensor] = None
        moments = {}
        for name in names:
            module = dense.get_submodule(_module_name(name))
            size = math.prod(self._groups.shapes[name][1:])
            if not name.endswith(".weight") or type(module).forward not in PLAIN:
                self.skipped[name] = "isn't the weight of a plain Conv2d or Linear"
            # Every conv group reads other inputs, and would need a system of its own.
            elif getattr(module, "groups", 1) > 1:
                self.skipped[name] = "belongs to a grouped convolution"
            elif size > max_size:
                self.skipped[name] = (
                    f"has {size} inputs per output, more than max_size={max_size}"
                )
            else:
                assert isinstance(module, LinearLayer), "its forward is theirs"
                products = torch.zeros(size + 1, size + 1, dtype=torch.float64)
                moments[name] = _Moments(module, products)
        return moments

    def apply(self, model: nn.Module, kept: KeptIndices) -> None:
        """Exchanges weights and biases of the layers of a sub-model that lost inputs.

        Recalibrate batch norm then. The layers get tensors of their own: what the
        sub-model shares with the dense network isn't written to.

        Args:
            model: The sub-model that `prune` or `Slicer.apply` made.
            kept: What it was made with.
        """
        for name, removed_on in self._removed_positions(kept).items():
            if 1 in removed_on:
                module = model.get_submodule(_module_name(name))
                assert isinstance(module, LinearLayer), "as in the dense network"
                self._systems[name].solve(module, removed_on.get(0), removed_on[1])

    def _removed_positions(self, kept: KeptIndices) -> dict[str, dict[int, Tensor]]:
        """Weight to axis to which of its positions go, bool; axes that lose none lack.

        Axis 0 holds the outputs of a layer, axis 1 its input channels.
        """
        gone: dict[str, dict[int, Tensor]] = {name: {} for name in self._systems}
        for group in self._groups:
            channels = removal_mask(group, kept)
            if not channels.any():
                continue
            for member in group.members:
                if member.tensor not in gone:
                    continue
                removed_on = gone[member.tensor]
                if member.axis not in removed_on:
                    length = self._groups.shapes[member.tensor][member.axis]
                    removed_on[member.axis] = torch.zeros(length, dtype=torch.bool)
                removed_on[member.axis][positions(member, channels)] = True
        return gone


def _module_name(tensor: str) -> str:
    """The module that a parameter belongs to: "layer1.conv" of "layer1.conv.weight"."""
    return tensor.rpartition(".")[0]


@dataclass(frozen=True)
class _System:
    """The normal equations of one layer.

    A candidate's are the rows and columns of the inputs that are left.

    Attributes:
        gram: Covariance of the inputs, or second moments where means matter, and the
            ridge, `(n_inputs, n_inputs)`.
        targets: `gram` times the dense weights, `(n_inputs, n_out)`.
        means: Of the inputs, `(n_inputs,)`.
        mean_outputs: `(n_out,)`.
    """

    gram: Tensor
    targets: Tensor
    means: Tensor
    mean_outputs: Tensor

    def solve(
        self, module: LinearLayer, outputs: Tensor | None, channels: Tensor
    ) -> None:
        """Gives a sliced layer its best weights.

        Args:
            module: The layer, changed in place.
            outputs: Which of the dense layer's outputs were removed, bool `(n_out,)`;
                None for none.
            channels: Which of its input channels were removed, bool `(n_in,)`.
        """
        # An input channel is as many inputs as the kernel has places.
        kernel_size = len(self.means) // len(channels)
        left = (~channels).repeat_interleave(kernel_size).nonzero()[:, 0]
        rows = slice(None) if outputs is None else ~outputs
        gram = self.gram.index_select(0, left).index_select(1, left)
        # Positive definite, thanks to the ridge, so this can't fail.
        factor = torch.linalg.cholesky(gram)
        weight = torch.cholesky_solve(self.targets[left][:, rows], factor).T
        _replace(module.weight, weight)
        # What the mean inputs give now, the bias completes to the old mean outputs.
        if module.bias is not None:
            _replace(module.bias, self.mean_outputs[rows] - weight @ self.means[left])


def _replace(parameter: Tensor, value: Tensor) -> None:
    """Gives a parameter new memory, in its old layout, with other values."""
    # Not in place: the dense network may share the old memory.
    parameter.data = torch.empty_like(parameter).copy_(value.reshape(parameter.shape))


@dataclass
class _Moments:
    """What is known of the patches that one layer reads.

    Attributes:
        module: The layer.
        products: Outer products of the patches, a 1 appended to each, summed;
            `(n_inputs + 1, n_inputs + 1)`. So the last row holds the sums of the
            inputs, and the last number how many patches there were.
        n_calls: How often the layer ran.
        n_normed: How many times its output went straight into a batch norm.
    """

    module: LinearLayer
    products: Tensor
    n_calls: int = 0
    n_normed: int = 0

    @torch.no_grad()
    def system(self, ridge: float) -> _System:
        """What is needed to solve for weights, in their precision."""
        n_patches = self.products[-1, -1]
        weight = self.module.weight
        bias = self.module.bias
        gram = self.products[:-1, :-1] / n_patches
        means = self.products[-1, :-1] / n_patches
        # Where a bias or a batch norm takes care of the means, deviations from them
        # are all that the weights have to reproduce.
        if bias is not None or self.n_normed == self.n_calls:
            gram -= means.outer(means)
        # No eigenvalue exceeds the trace: with at least this share of it on the
        # diagonal every part has a solution.
        share = max(ridge / n_patches, 10 * torch.finfo(weight.dtype).eps)
        gram.diagonal().add_(share * gram.trace().clamp_min(1e-12))
        matrix = weight.double().flatten(1)
        mean_outputs = matrix @ means + (0 if bias is None else bias)
        return _System(
            gram=gram.to(weight.dtype),
            targets=(gram @ matrix.T).to(weight.dtype),
            means=means.to(weight.dtype),
            mean_outputs=mean_outputs.to(weight.dtype),
        )


@torch.no_grad()
def _measure(
    dense: nn.Module,
    moments: Iterable[_Moments],
    batches: tuple[Tensor, ...],
    samples_per_image: int,
    generator: torch.Generator,
) -> None:
    """Fills the moments of layers in one pass over the images."""
    by_module = {entry.module: entry for entry in moments}
    n_images = 0

    def add_patches(module: LinearLayer, args: tuple, output: Tensor) -> None:
        patches = _patches(module, args[0], samples_per_image * n_images, generator)
        # In float64, because sums of products over many patches lose digits.
        patches = F.pad(patches.double(), (0, 1), value=1)
        entry = by_module[module]
        entry.products.addmm_(patches.T, patches)
        entry.n_calls += 1

    def count_normed(module: nn.Module, norm: nn.Module) -> None:
        assert isinstance(module, LinearLayer), "only such layers are watched"
        by_module[module].n_normed += 1

    norms = [module for module in dense.modules() if isinstance(module, BatchNorm)]
    # `dense` is a copy that is thrown away, so these hooks may stay.
    for module in by_module:
        module.register_forward_hook(add_patches)
    with watch_direct_norms(by_module, norms, count_normed, is_latest_only=True):
        for batch in batches:
            n_images = len(batch)
            dense(batch)


def _patches(
    module: LinearLayer, x: Tensor, n_patches: int, generator: torch.Generator
) -> Tensor:
    """Samples what a layer multiplies with its weight.

    All places are divided into equal stretches, and one place is drawn from each.

    Args:
        module: The layer.
        x: What it reads, `(n_images, n_channels, height, width)` or
            `(..., n_channels)`.
        n_patches: How many patches to sample; fewer where there are fewer places.
        generator: Draws the places.

    Returns:
        The patches, `(n_patches, n_inputs)`.
    """
    if isinstance(module, nn.Conv2d):
        windows = _windows(module, x)
        places = windows.shape[:3]
    else:
        windows = x.flatten(0, -2)
        places = windows.shape[:1]
    n_places = places.numel()
    n_patches = min(n_patches, n_places)
    offsets = torch.rand(n_patches, generator=generator, dtype=torch.float64)
    chosen = (torch.arange(n_patches) + offsets) * (n_places / n_patches)
    # Rounding may carry the last one beyond the end.
    chosen = chosen.long().clamp_max(n_places - 1)
    return windows[torch.unravel_index(chosen, places)].flatten(1)


def _windows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs under the kernel at each place of the output, a view.

    Its shape is `(n_images, rows, columns, n_channels, kernel height, kernel width)`.
    """
    # Two modules of PyTorch call the same mode differently.
    mode = conv.padding_mode.replace("zeros", "constant")
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    for axis in (0, 1):
        dilation = conv.dilation[axis]
        reach = dilation * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, conv.stride[axis])
        # Of a dilated kernel's reach only every second or third input is multiplied.
        x = x[..., ::dilation]
    return x.movedim(1, 3)
