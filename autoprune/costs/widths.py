"""Multiples of channels that suit the kernels of an engine, group by group.

An engine computes so many channels at a time, its tile, and leaves its fastest kernels
where widths don't fit. A network with half of the MACs and odd widths can be slower
than the whole one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import le
from types import MappingProxyType

import torch

from autoprune.costs.budget import SingleBudget
from autoprune.costs.cost import CostTable
from autoprune.costs.levels import levels_of_group
from autoprune.costs.search_space import SearchSpace
from autoprune.structure.groups import Groups, Member

ENOUGH_LEVELS = 3
"""How many levels a group needs at least, all of its channels among them."""
ENOUGH_LEVELS_DEPTHWISE = 2
"""The same for channels that a depthwise or grouped convolution holds.

Their kernels have no path for widths that don't fit, where others pad.
"""
GROUPED = ("depthwise", "grouped")
"""Kinds of layers in which a channel reads a few others and no more."""
CELL_STEP = 2
"""Multiple of attention's heads and of their width.

Neither is the length of an axis: that is their product.
"""


@dataclass(frozen=True)
class Tile:
    """How many channels an engine computes at a time.

    Attributes:
        channels: Their number; kernels are fastest at its multiples.
        engine: Which engine, such as "onnxruntime".
        processor: The instructions that make it so, such as "AVX-512".
    """

    channels: int
    engine: str
    processor: str


PROCESSORS = {"AVX512": ("AVX-512", 16), "AVX2": ("AVX2", 8)}
"""A processor's instructions, as PyTorch names them, to their usual name and to the
float32 numbers in one of their vectors.

ONNX Runtime blocks channels by as many (NCHWc; `NchwcBlockSize` in
onnxruntime/core/mlas/lib/platform.cpp: 16 where there is AVX-512F, else 8), and oneDNN,
which PyTorch and OpenVINO convolve with, computes as many output channels in a vector
whatever the layout (`simd_w` in src/cpu/x64/jit_brgemm_conv_utils.cpp).
"""
OTHER_PROCESSORS = ("128 bits", 4)
"""The same of processors that have neither: all have vectors of 128 bits."""


def tile_of_processor() -> Tile:
    """The tile of engines that block channels by the vectors of this machine's CPU."""
    instructions = torch.backends.cpu.get_cpu_capability()
    processor, channels = PROCESSORS.get(instructions, OTHER_PROCESSORS)
    return Tile(channels, "torch", processor)


def suited_multiples(
    groups: Groups,
    tile: int,
    max_sparsity: float = 0.9,
    min_width: Mapping[str, int] = MappingProxyType({}),
    n_levels: int = ENOUGH_LEVELS,
) -> dict[str, int]:
    """The multiple of each prunable group that suits a tile.

    With it the lengths of the group's axes are multiples of the tile, or of the largest
    divisor of the tile that leaves the group enough levels. With a tile of 16 a group
    of 64 channels keeps 16, 32, 48 or 64, one of 24 keeps 8, 16 or 24, and one of 16
    keeps 4, 8, 12 or 16. Where a depthwise or grouped convolution holds the channels,
    two levels are enough. Channels that hold several positions of an axis count for as
    many: 32 channels of 4 positions each, as in a convolution of 32 groups, go by
    fours.

    Where heads of attention and their width share an axis, both go by twos.

    Args:
        groups: A trace.
        tile: How many channels an engine computes at a time.
        max_sparsity: Largest share of a group's channels that may go.
        min_width: Group to the fewest channels that it keeps; 1 for those left out.
        n_levels: How many levels are enough where no depthwise or grouped convolution
            holds the channels.

    Returns:
        Prunable group to its multiple.
    """
    kinds = {layer.tensor: layer.kind for layer in groups.layers}
    cells = {name for pair in groups.cells for name in pair}
    multiples = {}
    for group in groups:
        if group.name in cells:
            multiples[group.name] = CELL_STEP
            continue
        least = min_width.get(group.name, 1)
        members = [member for member in group.members if member.tensor in kinds]
        is_grouped = any(kinds[member.tensor] in GROUPED for member in members)
        enough = min(n_levels, ENOUGH_LEVELS_DEPTHWISE) if is_grouped else n_levels
        for multiple in _multiples_of(members, tile):
            multiples[group.name] = multiple
            levels = levels_of_group(group.channels, multiple, least, max_sparsity)
            if len(levels) >= enough:
                break
    return multiples


def finest_needed(
    suited: Callable[[int], dict[str, int]],
    tile: int,
    costs: CostTable,
    budget: SingleBudget,
    max_sparsity: float,
    min_width: Mapping[str, int],
) -> dict[str, int]:
    """Multiples for the largest divisor of a tile with which a budget can be met.

    Coarse widths raise the least that a network can cost. Where no divisor will do, the
    multiples are those for 1, and `SearchSpace.check` says what else is in the way.

    Args:
        suited: From a tile to multiples, such as `suited_multiples`.
        tile: How many channels the engine computes at a time.
        costs: The network's cost table.
        budget: The tightest budget. Metrics that the costs don't know take no part.
        max_sparsity: Largest share of a group's channels that may go.
        min_width: Group to the fewest channels that it keeps.

    Returns:
        Prunable group to its multiple.
    """
    # What a metric that isn't known yet can come down to, nobody can say here.
    parts = [part for part in budget.parts if part.metric in costs.metrics]
    multiples = {}
    for divisor in _divisors(tile):
        multiples = suited(divisor)
        space = SearchSpace(
            costs,
            round_to=multiples,
            max_sparsity=max_sparsity,
            min_width=min_width,
        )
        floors = [costs.metrics[part.metric](space.low) for part in parts]
        targets = [part.target(costs) for part in parts]
        if all(map(le, floors, targets)):
            break
    return multiples


def _divisors(number: int) -> Iterator[int]:
    """The divisors of a number, largest first."""
    for divisor in range(number, 0, -1):
        if number % divisor == 0:
            yield divisor


def _multiples_of(members: Sequence[Member], tile: int) -> Iterator[int]:
    """Counts of channels that fill all axes with a tile, with half of it, and so on.

    Args:
        members: Where a group's channels sit in the weights.
        tile: How many channels an engine computes at a time.
    """
    n_positions = {member.index.shape[1] for member in members}
    for divisor in _divisors(tile):
        counts = [divisor // math.gcd(divisor, n) for n in n_positions]
        # The least common multiple of nothing is 1.
        yield math.lcm(*counts)
