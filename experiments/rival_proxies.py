"""Other people's ways to score a candidate, and what each costs in seconds: contenders
of `bench_search.py`.

- `amc_style` (He et al. 2018): slice the weights, no recalibration, 5,000 images.
- `eagleeye_style` (Li et al. 2020): slice, 100 batches of 128 in training mode to adapt
  batch norm, then 10,000 images.
- `torch_pruning` (Fang et al. 2023): copy the network, derive the dependency graph,
  prune by L1 to the widths asked, then as many images as this project's proxy takes.

All score one candidate after the other in float32 on all of torch's threads. They are
given more than their own code has: the slicing of AMC and EagleEye is this project's,
images lie in memory, normalised and channels last, and counting right answers isn't
timed.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoprune.data.datasets import normalize
from autoprune.evaluation.importance import Importance
from autoprune.pipeline.context import Workspace
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune, top_channels

AMC_IMAGES = 5_000
EAGLEEYE_IMAGES, EAGLEEYE_CALIBRATION, EAGLEEYE_BATCH = 10_000, 12_800, 128
BATCH_SIZES = (50, 100, 250, 500)
PROBE_IMAGES = 1_000

KeptCounts = Mapping[str, int]
Draws = Sequence[Sequence[KeptCounts]]
"""For each repetition its allocations."""


@dataclass(frozen=True)
class Ground:
    """What all contenders share.

    Attributes:
        model: The dense network; never changed.
        groups: Its trace.
        importance: L1 scores per group.
        inputs: Normalised images to score; a contender takes the first ones.
        calibration: Normalised images for batch norm.
        share_run: Share in (0, 1] of AMC's and EagleEye's batches that are run; seconds
            are scaled up to all.
    """

    model: nn.Module
    groups: Groups
    importance: Importance
    inputs: Tensor
    calibration: Tensor
    share_run: float = 1.0

    @classmethod
    def of(cls, workspace: Workspace, share_run: float) -> "Ground":
        """The network and images of a workspace whose proxy split has
        `EAGLEEYE_IMAGES`.
        """
        calibration = normalize(workspace.splits.train.pixels[:EAGLEEYE_CALIBRATION])
        inputs, importance = workspace.splits.proxy.inputs, workspace.importance
        return cls(
            workspace.model,
            workspace.groups,
            importance,
            inputs,
            calibration,
            share_run,
        )

    def sliced(self, kept: KeptCounts) -> nn.Module:
        """A new network with the most important channels, in eval mode."""
        pruned = prune(self.model, self.groups, top_channels(self.importance, kept))
        return pruned.eval().to(memory_format=torch.channels_last)

    def macs_ratio(self, pruned: nn.Module) -> float:
        """MACs of a pruned network over those of the dense one, counted while they run."""
        return round(
            macs_of(pruned, self.inputs[:1]) / macs_of(self.model, self.inputs[:1]), 4
        )


@dataclass(frozen=True)
class Contender:
    """A way to score candidates.

    Attributes:
        images: Images that pass through the network for one candidate.
        batch: Images a batch of those that are scored.
        precision: "float32" or "bf16".
        threads: Candidates at once x threads of each.
        drawn: The allocations of each repetition.
        seconds: From the allocations of a repetition to the seconds per candidate.
        share_run: Share of the batches that is really run.
    """

    images: int
    batch: int
    precision: str
    threads: str
    drawn: Draws
    seconds: Callable[[Sequence[KeptCounts]], float]
    share_run: float = 1.0


def rivals(
    ground: Ground, images: int, drawn: Draws, by_layer: Draws
) -> dict[str, Contender]:
    """The contenders of this module by name.

    Args:
        ground: Network and images.
        images: What Torch-Pruning's network scores, in one batch.
        drawn: Allocations for AMC and EagleEye, which score the first of each
            repetition.
        by_layer: Allocations of the groups that `cut_by_layer` leaves, for
            Torch-Pruning.
    """
    threads, single = (
        f"1x{torch.get_num_threads()}",
        [allocations[:1] for allocations in drawn],
    )
    batch = fastest_batch(ground, drawn[0][0])
    # Name to images, batch, allocations, share that is run, and the seconds of one
    # candidate.
    table = {
        "torch_pruning": (images, images, by_layer, 1.0, torch_pruning),
        "amc_style": (AMC_IMAGES, batch, single, ground.share_run, amc_style),
        "eagleeye_style": (
            EAGLEEYE_CALIBRATION + EAGLEEYE_IMAGES,
            batch,
            single,
            ground.share_run,
            eagleeye_style,
        ),
    }
    return {
        name: Contender(
            images,
            batch,
            "float32",
            threads,
            some,
            one_by_one(score, ground, batch),
            share_run,
        )
        for name, (images, batch, some, share_run, score) in table.items()
    }


def one_by_one(
    score: Callable[..., float], *fixed: object
) -> Callable[[Sequence[KeptCounts]], float]:
    """The mean seconds of several candidates, each scored with the `fixed` arguments
    before it.
    """
    return lambda allocations: mean(score(*fixed, kept) for kept in allocations)


def amc_style(ground: Ground, batch: int, kept: KeptCounts) -> float:
    """Seconds of AMC's evaluation of one allocation."""
    started = time.perf_counter()
    model = ground.sliced(kept)
    return (
        time.perf_counter()
        - started
        + _passes(model, ground.inputs[:AMC_IMAGES], batch, ground.share_run)
    )


def eagleeye_style(ground: Ground, batch: int, kept: KeptCounts) -> float:
    """Seconds of EagleEye's evaluation of one allocation."""
    started = time.perf_counter()
    model = ground.sliced(kept)
    slicing = time.perf_counter() - started
    adapting = _passes(
        model.train(), ground.calibration, EAGLEEYE_BATCH, ground.share_run
    )
    return (
        slicing
        + adapting
        + _passes(
            model.eval(), ground.inputs[:EAGLEEYE_IMAGES], batch, ground.share_run
        )
    )


def torch_pruning(ground: Ground, images: int, kept: KeptCounts) -> float:
    """Seconds of an evaluation with Torch-Pruning of one allocation of `cut_by_layer`'s
    groups.
    """
    started = time.perf_counter()
    model = pruned_by_torch_pruning(ground, kept)
    return (
        time.perf_counter() - started + _passes(model, ground.inputs[:images], images)
    )


def pruned_by_torch_pruning(ground: Ground, kept: KeptCounts) -> nn.Module:
    """A copy of the dense network in which the layers named have so many outputs left."""
    model = copy.deepcopy(ground.model)
    layers = {model.get_submodule(name): count for name, count in kept.items()}
    # Torch-Pruning rounds what is left down, hence the half.
    ratios = {
        layer: 1 - (count + 0.5) / len(layer.weight) for layer, count in layers.items()
    }
    producing = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    ]
    options = {
        "pruning_ratio_dict": ratios,
        "ignored_layers": [m for m in producing if m not in layers],
    }
    tp.pruner.BasePruner(
        model, ground.inputs[:1], tp.importance.GroupMagnitudeImportance(p=1), **options
    ).step()
    return model.to(memory_format=torch.channels_last)


def cut_by_layer(groups: Groups) -> Groups:
    """The groups that one layer alone produces, such as a block's inner channels; the
    others are pinned.

    Torch-Pruning takes the others too, but where shortcuts are padded with zeros, as in
    CIFAR ResNets with option A, it miscounts the channels, and the network that it
    leaves can't run.
    """
    producers = {
        group.name: {m.tensor for m in group.members if m.role == "produce"}
        for group in groups
    }
    shared = [name for name, tensors in producers.items() if len(tensors) > 1]
    return groups.with_pins(dict.fromkeys(shared, "several layers produce it"))


def fastest_batch(ground: Ground, kept: KeptCounts) -> int:
    """Of `BATCH_SIZES` the one at which a pruned network scores images fastest, the
    better of two tries each.
    """
    model, inputs = ground.sliced(kept), ground.inputs[:PROBE_IMAGES]
    tries = [
        {size: _passes(model, inputs, size) for size in BATCH_SIZES} for _ in range(2)
    ]
    return min(BATCH_SIZES, key=lambda size: min(seconds[size] for seconds in tries))


@torch.no_grad()
def _passes(
    model: nn.Module, inputs: Tensor, batch: int, share_run: float = 1.0
) -> float:
    """Seconds in which all inputs pass through `model`, in the mode that it is in."""
    batches = inputs.split(batch)
    run = batches[: math.ceil(len(batches) * share_run)]
    started = time.perf_counter()
    for part in run:
        model(part)
    return (time.perf_counter() - started) * len(batches) / len(run)


def macs_of(model: nn.Module, example: Tensor) -> int:
    """MACs of a network on one input, counted while it runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2
