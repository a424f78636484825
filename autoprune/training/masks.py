"""Pruning finer than channels: masks over weights, rows, columns, kernels or filters.

Also N:M masks, which keep N of every M inputs.

Masks leave the network's shapes as they are. Dense kernels multiply zeros as fast as
anything else, so nothing runs faster here; the non-zero MACs that `Masks.costs` counts
are what sparse hardware or a sparse format could save.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import seeded
from autoprune.errors import UserError, check_known
from autoprune.files import write_atomically
from autoprune.structure.groups import Groups
from autoprune.training.loop import TrainingCallback
from autoprune.training.unit_scores import SCORE_TRANSFORMS, UNIT_SCORES, Axes

PATTERNS: dict[str, Axes] = {
    "weight": (),
    "row": (3,),
    "column": (2,),
    "kernel": (2, 3),
    "filter": (1, 2, 3),
}
"""Granularity to the axes of a convolution's weight `(n_out, n_in, height, width)`
along which its units lie: a row is `weight[o, i, y, :]`, a column `weight[o, i, :, x]`.
A linear weight has no kernel axes, so there a row, a column and a kernel are single
weights. Weights that keep their inputs first, those of transposed convolutions and of
`x @ weight`, are turned round before they are cut.
"""


@dataclass(frozen=True)
class Masks:
    """Which elements of a network's weights are kept.

    Attributes:
        kept: Name of a weight to bool of its shape, true where it stays.
    """

    kept: Mapping[str, Tensor]

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Zeroes what is removed, in place."""
        # The network's own memory, not a copy.
        tensors = model.state_dict()
        for name, kept in self.kept.items():
            tensors[name].masked_fill_(~kept, 0)

    @property
    def sparsity(self) -> float:
        """Share of the masked weights' elements that is removed."""
        n_kept = 0
        n_elements = 0
        for kept in self.kept.values():
            n_kept += int(kept.sum())
            n_elements += kept.numel()
        return 1 - n_kept / n_elements

    def costs(self, groups: Groups) -> dict[str, int]:
        """Non-zero "macs" and "params" of one sample; what isn't masked counts in full.

        A weight that is applied at 64 positions of the output saves 64 MACs where it is
        zero, and 1 parameter.
        """
        table = CostTable(groups)
        n_positions = groups.positions_per_weight
        macs = int(table.macs({}))
        params = int(table.params({}))
        for name, kept in self.kept.items():
            n_removed = int((~kept).sum())
            macs -= n_removed * n_positions[name]
            params -= n_removed
        return {"macs": macs, "params": params}

    def save(self, path: Path) -> None:
        """Writes the masks as safetensors, a byte an element."""
        tensors = {}
        for name, kept in self.kept.items():
            # Turned-round masks are views, which the format refuses.
            tensors[name] = kept.to(torch.uint8).contiguous()
        write_atomically(path, lambda partial: save_file(tensors, partial))

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> "Masks":
        """Reads what `save` wrote.

        Args:
            path: The file.
            model: The network that the masks are for; left as found.

        Returns:
            The masks.

        Raises:
            UserError: If the file is missing or damaged, or is for another network.
        """
        if not path.is_file():
            raise UserError(
                "run", f"no masks {str(path)!r}; write them with: autoprune prune RUN"
            )
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                "run",
                f"{str(path)!r} is damaged ({error}); write it with: autoprune "
                f"prune RUN",
            ) from error
        weights = model.state_dict()
        masks = {}
        for name, kept in tensors.items():
            # Names alone prove nothing: a wider network of the same kind has them too.
            if name not in weights or weights[name].shape != kept.shape:
                raise UserError(
                    "run",
                    f"{str(path)!r} is for another network ({name} doesn't "
                    f"fit); prune anew",
                )
            masks[name] = kept.bool()
        return cls(masks)


class KeepMasks(TrainingCallback):
    """Keeps masked weights at zero, whatever momentum and weight decay make of them.

    Their gradients may stay: zeroing the weights after every step undoes them.

    Args:
        masks: For the network that is trained.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Zeroes what is masked.

        Args:
            model: The network that will be trained.
            n_steps: Not used.
            config: Not used.
        """
        self.masks.apply(model)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Zeroes what the optimizer has moved.

        Args:
            model: The network.
            step: Not used.
        """
        self.masks.apply(model)


def ranked_masks(
    model: nn.Module,
    groups: Groups,
    pattern: str,
    target: int,
    metric: str = "macs",
    criterion: str = "l1",
    agent: str = "global",
    seed: int = 0,
) -> Masks:
    """Removes the units of least score until a target is met.

    All weights of convolutions and linear layers take part, the head included; each
    keeps its best unit, so none is cut off. The removed unit with the highest score
    would exceed the target if it stayed.

    Args:
        model: The dense network; left as found.
        groups: Its trace.
        pattern: A key of `PATTERNS`.
        target: How much of the metric may be left.
        metric: What is counted, a key of `Masks.costs`: "macs" or "params".
        criterion: A key of `UNIT_SCORES`.
        agent: A key of `SCORE_TRANSFORMS`.
        seed: Of the criterion `random`.

    Returns:
        The masks.

    Raises:
        UserError: If a name is unknown, or the target can't be reached.
    """
    check_mask_options(pattern, criterion, agent)
    weights = _weights(model, groups)
    # Of one element; a unit costs that for each of its elements.
    element_costs = {
        "macs": groups.positions_per_weight,
        "params": dict.fromkeys(weights, 1),
    }
    check_known("metric", metric, element_costs, "budget")

    # Seeded for all layers together, so that no two draw the same.
    with seeded(seed):
        scores = _scores(weights, pattern, criterion, agent)
    unit_costs = []
    for name, layer_scores in scores.items():
        size = weights[name].numel() // layer_scores.numel()
        cost = size * element_costs[metric][name]
        unit_costs.append(torch.full((layer_scores.numel(),), cost))

    # The units of all layers in one row, so that they compete with each other.
    n_units = [layer_scores.numel() for layer_scores in scores.values()]
    all_scores = torch.cat([part.flatten() for part in scores.values()])
    excess = CostTable(groups).metrics[metric]({}) - target
    units = _units_to_remove(all_scores, torch.cat(unit_costs), excess, metric, target)
    is_removed = torch.zeros(len(all_scores), dtype=torch.bool)
    is_removed[units] = True

    kept = {}
    parts = is_removed.split(n_units)
    for (name, layer_scores), part in zip(scores.items(), parts, strict=True):
        # All elements of a unit stay or go with it.
        kept[name] = ~part.view_as(layer_scores).expand_as(weights[name])
    return _as_stored(kept, groups)


def _scores(
    weights: Mapping[str, Tensor], pattern: str, criterion: str, agent: str
) -> dict[str, Tensor]:
    """Scores of every layer's units, float64, infinite for the best one of each."""
    score = UNIT_SCORES[criterion]
    transform = SCORE_TRANSFORMS[agent]
    scores = {}
    for name, weight in weights.items():
        layer_scores = transform(score(weight, _unit_axes(pattern, weight)))
        layer_scores = layer_scores.double().contiguous()
        # The best unit stays, however low the whole layer scores.
        layer_scores.view(-1)[layer_scores.argmax()] = torch.inf
        scores[name] = layer_scores
    return scores


def _units_to_remove(
    scores: Tensor, costs: Tensor, excess: int, metric: str, target: int
) -> Tensor:
    """Indices of the units of least score that together cost at least `excess`.

    No more of them than needed. With scores 3, 1, 2, costs 10, 20, 30 and an excess of
    45, these are units 1 and 2, which cost 50.

    Raises:
        UserError: If even all units of finite score cost less.
    """
    order = scores.argsort(stable=True)
    # An infinite score says that the unit has to stay.
    order = order[torch.isfinite(scores[order])]
    if excess <= 0:
        return order[:0]
    saved = costs[order].cumsum(0)
    most = int(saved[-1]) if len(saved) else 0
    if most < excess:
        floor = target + excess - most
        raise UserError(
            "budget",
            f"masks of this granularity leave at least {metric}={floor}, "
            f"asked were {target}",
        )
    # The unit with which the excess is reached goes too.
    return order[: int(torch.searchsorted(saved, excess)) + 1]


def n_of_m_masks(
    model: nn.Module, groups: Groups, n: int, m: int
) -> tuple[Masks, list[str]]:
    """Keeps the `n` largest of every `m` consecutive inputs of a layer.

    Each output and each position of the kernel has its own: of inputs 0.1, -0.9, 0.3
    and 0.2, 2:4 keeps -0.9 and 0.3.

    Args:
        model: The dense network; left as found.
        groups: Its trace.
        n: How many are kept.
        m: Of how many.

    Returns:
        The masks, and the names of the weights that are left whole because `m` doesn't
        divide their inputs.

    Raises:
        UserError: Unless 1 <= n < m, and if all weights would be left whole.
    """
    if not 1 <= n < m:
        raise UserError("granularity", f"N:M needs 1 <= N < M, got {n}:{m}; e.g. 2:4")
    kept = {}
    whole = []
    for name, weight in _weights(model, groups).items():
        # A rest of fewer than m inputs would make a mask that no N:M format holds.
        if weight.shape[1] % m:
            whole.append(name)
        else:
            kept[name] = _largest_of_m(weight, n, m)
    if not kept:
        raise UserError(
            "granularity", f"no layer's inputs are a multiple of {m}; use a smaller M"
        )
    return _as_stored(kept, groups), whole


def _largest_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Marks the `n` largest |w| of every `m` along axis 1, in the weight's shape."""
    # The inputs go last to be cut into blocks, and back again.
    blocks = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, m))
    largest = blocks.topk(n, -1).indices
    kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, largest, True)
    return kept.flatten(-2).movedim(-1, 1)


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """(2, 4) for "2:4"; None for what isn't of that form."""
    match = re.fullmatch(r"(\d+):(\d+)", granularity)
    if match is None:
        return None
    return int(match[1]), int(match[2])


def check_mask_options(pattern: str, criterion: str, agent: str) -> None:
    """Checks that masks of a granularity can be made by a criterion and an agent.

    Args:
        pattern: A key of `PATTERNS`, or N:M.
        criterion: A key of `UNIT_SCORES`.
        agent: A key of `SCORE_TRANSFORMS`.

    Raises:
        UserError: If they can't; the message names what is allowed.
    """
    # N:M keeps the largest weights everywhere, so there is no criterion to choose.
    criteria = ["l1"]
    if n_of_m(pattern) is None:
        criteria = list(UNIT_SCORES)
        check_known("granularity", pattern, PATTERNS)
    _check_option("criterion", criterion, criteria, pattern)
    _check_option("agent", agent, list(SCORE_TRANSFORMS), pattern)


def _check_option(argument: str, value: str, known: list[str], pattern: str) -> None:
    """Raises a `UserError` unless the value is known."""
    if value not in known:
        listed = " or ".join(known)
        raise UserError(
            argument,
            f"masks of granularity {pattern} go by {listed}, got {value!r}",
        )


def _unit_axes(pattern: str, weight: Tensor) -> Axes:
    """The axes of a pattern that a weight has; a linear one has no kernel's."""
    return tuple(axis for axis in PATTERNS[pattern] if axis < weight.ndim)


def _weights(model: nn.Module, groups: Groups) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, outputs first, then inputs.

    They come from the trace, not by name: a weight may be called anything.
    """
    parameters = dict(model.named_parameters())
    input_axes = _input_axes(groups)
    weights = {}
    for name in groups.positions_per_weight:
        weights[name] = parameters[name].detach().movedim(input_axes.get(name, 1), 1)
    return weights


def _as_stored(kept: Mapping[str, Tensor], groups: Groups) -> Masks:
    """Masks with the axes of the network's tensors, made from axes as in `_weights`."""
    input_axes = _input_axes(groups)
    masks = {}
    for name, mask in kept.items():
        masks[name] = mask.movedim(1, input_axes.get(name, 1))
    return Masks(masks)


def _input_axes(groups: Groups) -> dict[str, int]:
    """Weight to the axis of its inputs; left out are depthwise layers, without one."""
    axes = {}
    # Pinned groups too: their channels stay, but single weights may go.
    for group in groups.all:
        for member in group.consumers:
            axes[member.tensor] = member.axis
    return axes
