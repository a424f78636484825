"""Weights of pruned layers that best reproduce what the layers computed in the dense
network, by least squares.

He et al. 2017 ("Channel Pruning for Accelerating Very Deep Neural Networks"), section
3.1, eq. 4, as AMC uses it: a layer that lost input channels gets those weights for the
others that come nearest to its old outputs on sampled patches. Old outputs are linear
in the patches, so second moments are all that a candidate needs of the data: they are
measured once, and a candidate costs one small system of equations a layer.

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
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Groups, positions, removed
from autoprune.structure.slicing import KeptIndices, shared_copy

BATCH = 100
"""Images of one forward pass."""
PLAIN = nn.Conv2d.forward, nn.Linear.forward


class Reconstruction:
    """Weights of pruned layers that best reproduce the dense network's layer outputs
    from the kept inputs.

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
        if not 0 <= ridge < math.inf:
            raise UserError("ridge", f"must be a finite number from 0, got {ridge!r}")
        self.skipped: dict[str, str] = {}
        self._groups, self._systems = groups, {}
        dense, batches = open_attention(shared_copy(model)).eval(), inputs.split(BATCH)
        moments = self._empty_moments(dense, max_size)
        _measure(
            dense,
            moments.values(),
            batches,
            samples_per_image,
            torch.Generator().manual_seed(seed),
        )
        for name, measured in moments.items():
            if measured.calls == len(batches) * sum(
                layer.tensor == name for layer in groups.layers
            ):
                self._systems[name] = measured.system(ridge)
            else:
                self.skipped[name] = "is used elsewhere too, or not by its module"

    def _empty_moments(self, dense: nn.Module, max_size: int) -> dict[str, "_Moments"]:
        """By name of the weight, for the layers that can be reconstructed."""
        moments = {}
        for name in dict.fromkeys(
            member.tensor for group in self._groups for member in group.consumers
        ):
            module, size = (
                dense.get_submodule(name.rpartition(".")[0]),
                math.prod(self._groups.shapes[name][1:]),
            )
            if not name.endswith(".weight") or type(module).forward not in PLAIN:
                self.skipped[name] = "isn't the weight of a plain Conv2d or Linear"
            elif getattr(module, "groups", 1) > 1:
                self.skipped[name] = "belongs to a grouped convolution"
            elif size > max_size:
                self.skipped[name] = (
                    f"has {size} inputs per output, more than max_size={max_size}"
                )
            else:
                moments[name] = _Moments(
                    module, torch.zeros(size + 1, size + 1, dtype=torch.float64)
                )
        return moments

    def apply(self, model: nn.Module, kept: KeptIndices) -> None:
        """Exchanges weights and biases of the layers of a sub-model that lost inputs;
        recalibrate batch norm then.

        The layers get tensors of their own: what the sub-model shares with the dense
        network isn't written to.

        Args:
            model: The sub-model that `prune` or `Slicer.apply` made.
            kept: What it was made with.
        """
        gone: dict[str, dict[int, Tensor]] = {name: {} for name in self._systems}
        for group in self._groups:
            channels = removed(group, kept)
            for member in group.members if channels.any() else ():
                if member.tensor in gone:
                    none = torch.zeros(
                        self._groups.shapes[member.tensor][member.axis],
                        dtype=torch.bool,
                    )
                    gone[member.tensor].setdefault(member.axis, none)[
                        positions(member, channels)
                    ] = True
        for name, axes in gone.items():
            if 1 in axes:
                self._systems[name].solve(
                    model.get_submodule(name.rpartition(".")[0]), axes.get(0), axes[1]
                )


@dataclass(frozen=True)
class _System:
    """The normal equations of one layer; a candidate's are the rows and columns of what
    is left.

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
        self, module: nn.Module, outputs: Tensor | None, channels: Tensor
    ) -> None:
        """Gives a sliced layer its best weights; removed outputs, if any, and removed
        input channels are marked.
        """
        kernel_size = len(self.means) // len(channels)
        left = (~channels).repeat_interleave(kernel_size).nonzero()[:, 0]
        rows = slice(None) if outputs is None else ~outputs
        factor = torch.linalg.cholesky(
            self.gram.index_select(0, left).index_select(1, left)
        )
        weight = torch.cholesky_solve(self.targets[left][:, rows], factor).T
        _replace(module.weight, weight)
        if module.bias is not None:
            _replace(module.bias, self.mean_outputs[rows] - weight @ self.means[left])


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = torch.empty_like(parameter).copy_(value.reshape(parameter.shape))


@dataclass
class _Moments:
    """What is known of the patches that one layer reads.

    Attributes:
        module: The layer.
        products: Outer products of the patches, a 1 appended to each, summed;
            `(n_inputs + 1, n_inputs + 1)`.
        calls: How often the layer ran; `normed` times its output went straight into a
            batch norm.
    """

    module: nn.Module
    products: Tensor
    calls: int = 0
    normed: int = 0

    @torch.no_grad()
    def system(self, ridge: float) -> _System:
        """What is needed to solve for weights, in their precision."""
        n_patches, weight, bias = (
            self.products[-1, -1],
            self.module.weight,
            self.module.bias,
        )
        gram, means = (
            self.products[:-1, :-1] / n_patches,
            self.products[-1, :-1] / n_patches,
        )
        if bias is not None or self.normed == self.calls:
            gram -= means.outer(means)
        # No eigenvalue exceeds the trace: with at least this share of it on the
        # diagonal every part has a solution.
        share = max(ridge / n_patches, 10 * torch.finfo(weight.dtype).eps)
        gram.diagonal().add_(share * gram.trace().clamp_min(1e-12))
        matrix = weight.double().flatten(1)
        mean_outputs = matrix @ means + (0 if bias is None else bias)
        return _System(
            *(x.to(weight.dtype) for x in (gram, gram @ matrix.T, means, mean_outputs))
        )


@torch.no_grad()
def _measure(
    dense: nn.Module,
    moments: Iterable[_Moments],
    batches: tuple[Tensor, ...],
    samples: int,
    generator: torch.Generator,
) -> None:
    """One forward pass, in which the layers collect their moments; `dense` keeps the
    hooks.
    """
    of_module, latest = {one.module: one for one in moments}, (None, None, 0)

    def read(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal latest
        one = of_module[module]
        patches = F.pad(
            _patches(module, args[0], samples * n_images, generator).double(),
            (0, 1),
            value=1,
        )
        one.products.addmm_(patches.T, patches)
        one.calls += 1
        latest = one, output, output._version

    def norm(module: nn.Module, args: tuple) -> None:
        one, output, version = latest
        if (
            args[0] is output and output._version == version
        ):  # and not rectified in place
            one.normed += 1

    for module in dense.modules():
        if module in of_module:
            module.register_forward_hook(read)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(norm)
    for batch in batches:
        n_images = len(batch)
        dense(batch)


def _patches(
    module: nn.Module, x: Tensor, n: int, generator: torch.Generator
) -> Tensor:
    """Up to `n` of what a layer multiplies with its weight, one from each of equal
    stretches, `(n, n_inputs)`.
    """
    windows = _windows(module, x) if isinstance(module, nn.Conv2d) else x.flatten(0, -2)
    places = windows.shape[: 3 if isinstance(module, nn.Conv2d) else 1]
    n = min(n, places.numel())
    chosen = (
        torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)
    ) * (places.numel() / n)
    return windows[
        torch.unravel_index(chosen.long().clamp_max(places.numel() - 1), places)
    ].flatten(1)


def _windows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs under the kernel, a view `(n, rows, columns, n_channels, kernel
    height, kernel width)`.
    """
    x = F.pad(
        x,
        conv._reversed_padding_repeated_twice,
        conv.padding_mode.replace("zeros", "constant"),
    )
    for axis in (0, 1):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, conv.stride[axis])[..., :: conv.dilation[axis]]
    return x.movedim(1, 3)
