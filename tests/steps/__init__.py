"""The steps of which random networks are composed: plain data first, then a module
each.

A step's fields list their choices, the simplest first, so that shrinking ends with
defaults and a printed step shows only what differs from them. Every step can follow
every other: what doesn't fit is adapted, never refused, so that any list of steps is a
network.
"""

from steps.base import Step
from steps.layers import (
    Act,
    Attention,
    Conv,
    ConvNeXt,
    Depthwise,
    Flatten,
    Linear,
    Matmul,
    Modulate,
    Norm,
    Residual,
    Scale,
    Siamese,
    SpatialGate,
    SqueezeExcite,
    Transposed,
    Twice,
)
from steps.moves import (
    AcrossChannels,
    Add,
    Broadcast,
    ChannelOrder,
    ChannelPad,
    Concat,
    Gated,
    Maxout,
    Pad,
    PixelShuffle,
    Pool,
    Shuffle,
    SpaceMoves,
    Split,
    Upsample,
    Write,
)
from steps.weights import Blur, Computed, OtherRank, Recurrent, ToMap

STEPS: tuple[type[Step], ...] = (
    Conv, Conv, Conv, Conv, Residual, Add, Add, Concat, Depthwise, Act, Norm, Split, Pool, Upsample, SqueezeExcite,
    Linear, Flatten, Transposed, Twice, Siamese, Shuffle, PixelShuffle, Pad, Scale, Broadcast, Modulate, Gated,
    ConvNeXt, SpatialGate, Maxout, ChannelPad, SpaceMoves, Attention, ChannelOrder, AcrossChannels, Write, Matmul,
    Computed, Computed, Blur, Recurrent, ToMap, OtherRank,
)  # fmt: skip
"""Simplest first; those that networks are mostly made of come several times."""

ANY_VALUE = (Linear, ToMap)
"""Steps whose first operand may be a vector as well as a map; a modulation's second
may, too.
"""
