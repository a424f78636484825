"""Other people's ways to score a candidate, and what each costs in seconds.

Contenders of `bench_search.py`:

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
from autoprune.pipeline.context import RunContext
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune, top_channels

AMC_IMAGES = 5_000
EAGLEEYE_IMAGES = 10_000
EAGLEEYE_CALIBRATION = 12_800
EAGLEEYE_BATCH = 128
BATCH_SIZES = (50, 100, 250, 500)
"""Batches of which AMC's and EagleEye's evaluation get the fastest."""
PROBE_IMAGES = 1_000
"""Images on which that is found out."""

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
    def from_context(cls, context: RunContext, share_run: float) -> "Ground":
        """The network and images of a run's context.

        Args:
            context: Its proxy split has `EAGLEEYE_IMAGES`.
            share_run: As the attribute.
        """
        calibration = normalize(context.splits.train.pixels[:EAGLEEYE_CALIBRATION])
        return cls(
            context.model,
            context.groups,
            context.importance,
            context.splits.proxy.inputs,
            calibration,
            share_run,
        )

    def sliced(self, kept: KeptCounts) -> nn.Module:
        """A new network with the most important channels, in eval mode."""
        pruned = prune(self.model, self.groups, top_channels(self.importance, kept))
        return pruned.eval().to(memory_format=torch.channels_last)

    def macs_ratio(self, pruned: nn.Module) -> float:
        """MACs of a pruned network over the dense one's, counted while they run."""
        example = self.inputs[:1]
        return round(macs_of(pruned, example) / macs_of(self.model, example), 4)


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
    threads = f"1x{torch.get_num_threads()}"
    single = [allocations[:1] for allocations in drawn]
    batch = fastest_batch(ground, drawn[0][0])
    return {
        "torch_pruning": Contender(
            images=images,
            batch=images,
            precision="float32",
            threads=threads,
            drawn=by_layer,
            seconds=one_by_one(torch_pruning, ground, images),
        ),
        "amc_style": Contender(
            images=AMC_IMAGES,
            batch=batch,
            precision="float32",
            threads=threads,
            drawn=single,
            seconds=one_by_one(amc_style, ground, batch),
            share_run=ground.share_run,
        ),
        "eagleeye_style": Contender(
            images=EAGLEEYE_CALIBRATION + EAGLEEYE_IMAGES,
            batch=batch,
            precision="float32",
            threads=threads,
            drawn=single,
            seconds=one_by_one(eagleeye_style, ground, batch),
            share_run=ground.share_run,
        ),
    }


def one_by_one(
    score: Callable[..., float], *fixed: object
) -> Callable[[Sequence[KeptCounts]], float]:
    """The mean seconds of several candidates, scored one after the other.

    Args:
        score: Seconds of one candidate, which is its last argument.
        *fixed: Its arguments before that.
    """

    def seconds(allocations: Sequence[KeptCounts]) -> float:
        return mean(score(*fixed, kept) for kept in allocations)

    return seconds


def amc_style(ground: Ground, batch: int, kept: KeptCounts) -> float:
    """Seconds of AMC's evaluation of one allocation.

    Args:
        ground: Network and images.
        batch: Images a batch.
        kept: The allocation.
    """
    started = time.perf_counter()
    model = ground.sliced(kept)
    slicing = time.perf_counter() - started
    inputs = ground.inputs[:AMC_IMAGES]
    return slicing + _time_passes(model, inputs, batch, ground.share_run)


def eagleeye_style(ground: Ground, batch: int, kept: KeptCounts) -> float:
    """Seconds of EagleEye's evaluation of one allocation.

    Args:
        ground: Network and images.
        batch: Images a batch of those that are scored.
        kept: The allocation.
    """
    started = time.perf_counter()
    model = ground.sliced(kept)
    slicing = time.perf_counter() - started
    adapting = _time_passes(
        model.train(), ground.calibration, EAGLEEYE_BATCH, ground.share_run
    )
    inputs = ground.inputs[:EAGLEEYE_IMAGES]
    scoring = _time_passes(model.eval(), inputs, batch, ground.share_run)
    return slicing + adapting + scoring


def torch_pruning(ground: Ground, images: int, kept: KeptCounts) -> float:
    """Seconds of an evaluation with Torch-Pruning of one allocation.

    Args:
        ground: Network and images.
        images: How many are scored, in one batch.
        kept: An allocation of `cut_by_layer`'s groups.
    """
    started = time.perf_counter()
    model = prune_with_torch_pruning(ground, kept)
    pruning = time.perf_counter() - started
    return pruning + _time_passes(model, ground.inputs[:images], images)


def prune_with_torch_pruning(ground: Ground, kept: KeptCounts) -> nn.Module:
    """A copy of the dense network, pruned by Torch-Pruning.

    Args:
        ground: Network and images.
        kept: Layer to the outputs that it has left.
    """
    model = copy.deepcopy(ground.model)
    ratios = {}
    for name, count in kept.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor), "layers that produce channels have one"
        # Torch-Pruning rounds what is left down, hence the half.
        ratios[layer] = 1 - (count + 0.5) / len(weight)
    ignored = []
    for module in model.modules():
        is_plain_conv = isinstance(module, nn.Conv2d) and module.groups == 1
        is_producing = isinstance(module, nn.Linear) or is_plain_conv
        if is_producing and module not in ratios:
            ignored.append(module)
    pruner = tp.pruner.BasePruner(
        model,
        ground.inputs[:1],
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio_dict=ratios,
        ignored_layers=ignored,
    )
    pruner.step()
    return model.to(memory_format=torch.channels_last)


def cut_by_layer(groups: Groups) -> Groups:
    """The groups that one layer alone produces, such as a block's inner channels.

    The others are pinned.

    Torch-Pruning takes the others too, but where shortcuts are padded with zeros, as in
    CIFAR ResNets with option A, it miscounts the channels, and the network that it
    leaves can't run.
    """
    shared = []
    for group in groups:
        producers = {m.tensor for m in group.members if m.role == "produce"}
        if len(producers) > 1:
            shared.append(group.name)
    return groups.with_pins(dict.fromkeys(shared, "several layers produce it"))


def fastest_batch(ground: Ground, kept: KeptCounts) -> int:
    """Of `BATCH_SIZES` the one at which a pruned network scores images fastest.

    The better of two tries each.

    Args:
        ground: Network and images.
        kept: The network's allocation.
    """
    model = ground.sliced(kept)
    inputs = ground.inputs[:PROBE_IMAGES]
    fastest = dict.fromkeys(BATCH_SIZES, math.inf)
    for _ in range(2):
        for size in BATCH_SIZES:
            fastest[size] = min(fastest[size], _time_passes(model, inputs, size))
    return min(BATCH_SIZES, key=lambda size: fastest[size])


@torch.no_grad()
def _time_passes(
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
    """MACs of a network, counted while it runs.

    Args:
        model: The network.
        example: One input.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2
