"""Which networks are measured: allocations that cover a search space."""

import numpy as np

from autoprune.costs.search_space import SearchSpace

SPREAD = 0.2
"""Standard deviation of a group's share around the mean of its allocation."""


def spread_allocations(
    space: SearchSpace, n: int, generator: np.random.Generator
) -> np.ndarray:
    """Allocations from nearly dense to the least, each uneven in its own way.

    The mean shares are one from each of `n` equal parts between the least counts and
    all, so that budgets of any size have measured networks near them.

    Args:
        space: The allocations to choose from.
        n: How many.
        generator: What they are drawn with.

    Returns:
        Counts `(n, n_groups)`, in random order.
    """
    least = float((space.low / space.costs.dense).mean())
    parts = (np.arange(n) + generator.random(n)) / n
    means = least + (1 - least) * parts
    noise = generator.normal(0, SPREAD, (n, len(space.levels)))
    return nearest_allocations(space, 1 - generator.permutation(means)[:, None] - noise)


def neighbours(
    space: SearchSpace, kept: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """For each allocation one nearby.

    Args:
        space: The allocations to choose from.
        kept: Counts `(n, n_groups)`.
        generator: What they are drawn with.
    """
    sparsities = 1 - kept / space.costs.dense
    return nearest_allocations(
        space, sparsities + generator.normal(0, SPREAD / 2, kept.shape)
    )


def nearest_allocations(space: SearchSpace, sparsities: np.ndarray) -> np.ndarray:
    """The allocations of a space that are nearest to sparsities.

    Args:
        space: The allocations to choose from.
        sparsities: Shares of channels to remove, `(n, n_groups)`.

    Returns:
        Counts `(n, n_groups)`.
    """
    counts = np.empty(sparsities.shape, np.int64)
    for index in range(len(space.levels)):
        bounds = (space.low[index], space.high[index])
        counts[:, index] = space.nearest_count(index, sparsities[:, index], bounds)
    return counts
