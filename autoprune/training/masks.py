"""Pruning finer than channels: masks over weights, rows, columns, kernels or filters,
and N of M.

Masks leave the network's shapes as they are. Dense kernels multiply zeros as fast as
anything else, so nothing runs faster here; the non-zero MACs that `Masks.costs` counts
are what sparse hardware or a sparse format could save.
"""

import re
from collections.abc import Callable, Mapping
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
from autoprune.evaluation.importance import lamp_scores
from autoprune.runs import write_atomically
from autoprune.structure.groups import Groups
from autoprune.training.loop import TrainingCallback

PATTERNS: dict[str, tuple[int, ...]] = {
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
        tensors = model.state_dict()
        for name, kept in self.kept.items():
            tensors[name].masked_fill_(~kept, 0)

    @property
    def sparsity(self) -> float:
        """Share of the masked weights' elements that is removed."""
        return 1 - sum(int(kept.sum()) for kept in self.kept.values()) / sum(
            kept.numel() for kept in self.kept.values()
        )

    def costs(self, groups: Groups) -> dict[str, int]:
        """Non-zero "macs" and "params" of one sample; those of what isn't masked count
        in full.
        """
        table, positions = CostTable(groups), groups.applied
        removed = {name: int((~kept).sum()) for name, kept in self.kept.items()}
        return {
            "macs": table.macs({})
            - sum(n * positions[name] for name, n in removed.items()),
            "params": table.params({}) - sum(removed.values()),
        }

    def save(self, path: Path) -> None:
        """Writes the masks as safetensors, a byte an element."""
        tensors = {
            name: kept.to(torch.uint8).contiguous() for name, kept in self.kept.items()
        }
        write_atomically(path, lambda partial: save_file(tensors, partial))

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> "Masks":
        """What `save` wrote.

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
        own = {name: tensor.shape for name, tensor in model.state_dict().items()}
        strangers = [
            name for name, kept in tensors.items() if own.get(name) != kept.shape
        ]
        if strangers:
            raise UserError(
                "run",
                f"{str(path)!r} is for another network ({strangers[0]} doesn't "
                f"fit); prune anew",
            )
        return cls({name: kept.bool() for name, kept in tensors.items()})


class KeepMasks(TrainingCallback):
    """Masked weights are zero after every step, whatever momentum and decay make of
    them.

    Args:
        masks: For the network that is trained.
    """

    def __init__(self, masks: Masks):
        self.masks = masks

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Zeroes what is masked."""
        self.masks.apply(model)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Zeroes what the optimizer has moved."""
        self.masks.apply(model)


def _l1(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean |w| of each unit: a mean, so that units of different size compare."""
    return weight.abs() if not axes else weight.abs().mean(axes, keepdim=True)


def _l2(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Root of the mean square of each unit."""
    return weight.abs() if not axes else weight.square().mean(axes, keepdim=True).sqrt()


def _lamp(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Lee et al. 2021, eq. 6: a unit's square as a share of all squares in its layer
    that aren't smaller.
    """
    squares = _l2(weight, axes).square()
    return lamp_scores(squares.flatten().double()).view_as(squares)


def _random(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The control: scores that depend on nothing but the seed."""
    return torch.rand_like(_l1(weight, axes))


UNIT_SCORES: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "l1": _l1,
    "l2": _l2,
    "lamp": _lamp,
    "random": _random,
}
"""Criterion to scores of a weight's units, whose axes have length 1; higher is kept."""


def _by_rank(scores: Tensor) -> Tensor:
    """A unit's place in its layer, in (0, 1): one threshold then takes the same share
    of every layer.
    """
    places = scores.flatten().argsort(stable=True).argsort(stable=True)
    return ((places.double() + 0.5) / places.numel()).view_as(scores)


SCORE_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "global": lambda scores: scores,
    "uniform": _by_rank,
}
"""Agent to what makes scores of different layers comparable: nothing, or their place in
the layer.
"""


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
    """The units of least score are removed until the network has at most `target`
    non-zero MACs or parameters.

    All weights of convolutions and linear layers take part, the head included; each
    keeps its best unit, so none is cut off. The removed unit with the highest score
    would exceed the target if it stayed.

    Args:
        model: The dense network; left as found.
        groups: Its trace.
        pattern: A key of `PATTERNS`.
        target: What may be left.
        metric: What is counted, a key of `Masks.costs`: "macs" or "params".
        criterion: A key of `UNIT_SCORES`.
        agent: A key of `SCORE_TRANSFORMS`.
        seed: Of the criterion `random`.

    Raises:
        UserError: If a name is unknown, or the target can't be reached.
    """
    check_mask_options(pattern, criterion, agent)
    weights = _weights(model, groups)
    counts = {"macs": groups.applied, "params": dict.fromkeys(weights, 1)}
    check_known("metric", metric, counts, "budget")
    with seeded(seed):
        scores = {
            n: SCORE_TRANSFORMS[agent](UNIT_SCORES[criterion](w, _axes(pattern, w)))
            .double()
            .contiguous()
            for n, w in weights.items()
        }
    for unit_scores in scores.values():
        unit_scores.view(-1)[unit_scores.argmax()] = torch.inf
    unit_costs = {
        name: weights[name].numel() // s.numel() * counts[metric][name]
        for name, s in scores.items()
    }
    every = torch.cat([s.flatten() for s in scores.values()])
    costs = torch.cat(
        [torch.full((s.numel(),), unit_costs[name]) for name, s in scores.items()]
    )
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[
        _fewest(
            every, costs, CostTable(groups).metrics[metric]({}) - target, metric, target
        )
    ] = True
    parts = gone.split([s.numel() for s in scores.values()])
    kept = {
        n: ~part.view_as(s).expand_as(weights[n])
        for (n, s), part in zip(scores.items(), parts, strict=True)
    }
    return _as_stored(kept, groups)


def _fewest(
    scores: Tensor, costs: Tensor, excess: int, metric: str, target: int
) -> Tensor:
    """The units, from the least score up, that cost at least `excess` together, and no
    more of them than needed.
    """
    order = scores.argsort(stable=True)
    order = order[torch.isfinite(scores[order])]
    saved = costs[order].cumsum(0)
    if excess <= 0:
        return order[:0]
    if not len(saved) or saved[-1] < excess:
        floor = target + excess - (int(saved[-1]) if len(saved) else 0)
        raise UserError(
            "budget",
            f"masks of this granularity leave at least {metric}={floor}, "
            f"asked were {target}",
        )
    return order[: int(torch.searchsorted(saved, excess)) + 1]


def n_of_m_masks(
    model: nn.Module, groups: Groups, n: int, m: int
) -> tuple[Masks, list[str]]:
    """Of every `m` consecutive inputs of a layer, at each output and kernel position,
    the `n` largest are kept.

    Returns:
        The masks, and the names of the weights that are left whole because `m` doesn't
        divide their inputs.

    Raises:
        UserError: Unless 1 <= n < m.
    """
    if not 1 <= n < m:
        raise UserError("granularity", f"N:M needs 1 <= N < M, got {n}:{m}; e.g. 2:4")
    weights = _weights(model, groups)
    whole = [name for name, weight in weights.items() if weight.shape[1] % m]
    kept = {
        name: _n_of_m(weight, n, m)
        for name, weight in weights.items()
        if name not in whole
    }
    if not kept:
        raise UserError(
            "granularity", f"no layer's inputs are a multiple of {m}; use a smaller M"
        )
    return _as_stored(kept, groups), whole


def _n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    parts = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, m))
    kept = torch.zeros_like(parts, dtype=torch.bool).scatter_(
        -1, parts.topk(n, -1).indices, True
    )
    return kept.flatten(-2).movedim(-1, 1)


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """(2, 4) for "2:4"; None for what isn't of that form."""
    match = re.fullmatch(r"(\d+):(\d+)", granularity)
    return (int(match[1]), int(match[2])) if match else None


def check_mask_options(pattern: str, criterion: str, agent: str) -> None:
    """Raises a `UserError` unless masks of a granularity can be made so; N:M keeps the
    largest weights everywhere.
    """
    scores = ("l1",)
    if n_of_m(pattern) is None:
        scores = UNIT_SCORES
        check_known("granularity", pattern, PATTERNS)
    for argument, value, known in (
        ("criterion", criterion, scores),
        ("agent", agent, SCORE_TRANSFORMS),
    ):
        if value not in known:
            listed = " or ".join(known)
            raise UserError(
                argument,
                f"masks of granularity {pattern} go by {listed}, got {value!r}",
            )


def _axes(pattern: str, weight: Tensor) -> tuple[int, ...]:
    return tuple(axis for axis in PATTERNS[pattern] if axis < weight.ndim)


def _weights(model: nn.Module, groups: Groups) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, whatever they are called, outputs
    first, then inputs.
    """
    parameters, inputs = dict(model.named_parameters()), _input_axes(groups)
    return {
        name: parameters[name].detach().movedim(inputs.get(name, 1), 1)
        for name in groups.applied
    }


def _as_stored(kept: Mapping[str, Tensor], groups: Groups) -> Masks:
    """Masks whose axes are those of the network's tensors, from axes as `_weights`
    gives them.
    """
    inputs = _input_axes(groups)
    return Masks(
        {name: mask.movedim(1, inputs.get(name, 1)) for name, mask in kept.items()}
    )


def _input_axes(groups: Groups) -> dict[str, int]:
    """Weight to the axis of its inputs; those of depthwise layers, which have none, are
    left out.
    """
    return {
        member.tensor: member.axis for group in groups.all for member in group.consumers
    }
