"""Which images go into which part of a dataset: at random, but in fair shares by class.

Parts that are drawn without regard to classes often hold no image of a rare one: with
12 of 252, every other seed leaves a part of 16 images blind to them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def shuffled(n: int, seed: int) -> Tensor:
    """The numbers from 0 to n - 1 in random order, int64 `(n,)`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def stratified_parts(
    labels: Tensor, sizes: Mapping[str, int], reserves: Mapping[str, int], seed: int
) -> dict[str, Tensor]:
    """Positions of the images of each part, disjoint, and of the rest.

    A part takes images of each class in proportion to what is left of it, and at least
    one of every class that can spare one, as long as it has room for as many classes.
    Within a class, and between classes in equal need, a random order decides.

    Args:
        labels: Of all images, int64 `(n_images,)`.
        sizes: Part to the number of its images, in the order in which they choose;
            together at most `n_images`.
        reserves: Part to how many images of each class it leaves to those that choose
            later, as far as it can be filled without them.
        seed: Of the random order.

    Returns:
        Part to its positions, int64, in an order of which every start has fair shares;
        and "rest" to what is left, in random order.
    """
    left = shuffled(len(labels), seed)
    parts = {}
    for part, size in sizes.items():
        order = _fair_order(labels[left], reserves[part])
        parts[part] = left[order[:size]]
        # By a mask, so that what is left stays in random order.
        is_left = torch.ones(len(left), dtype=torch.bool)
        is_left[order[:size]] = False
        left = left[is_left]
    return parts | {"rest": left}


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """All positions in an order of which every start has fair shares of the classes.

    Args:
        labels: Of the images, int64 `(n_images,)`.
        seed: Of the random order within classes.

    Returns:
        int64 `(n_images,)`.
    """
    order = shuffled(len(labels), seed)
    return order[_fair_order(labels[order], reserve=0)]


def _fair_order(labels: Tensor, reserve: int) -> Tensor:
    """In which order images are taken.

    Args:
        labels: Of the images, `(n_images,)`.
        reserve: How many of each class come after all others.

    Returns:
        Positions, int64 `(n_images,)`.
    """
    _, classes = torch.unique(labels, return_inverse=True)
    counts = torch.bincount(classes)
    # How many of its class come before each image: a stable sort brings classes
    # together and keeps the order within each.
    by_class = classes.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(classes)
    rank[by_class] = torch.arange(len(classes)) - starts[classes[by_class]]
    # The k-th image of n of a class is due at the share (k + 1/2) / n of all images.
    # That is how Webster's method fills a parliament, for all sizes at once.
    due = (rank + 0.5) / counts[classes]
    is_spare = rank < counts[classes] - reserve
    # Before all shares one image of each class; after them what is to be left.
    due[is_spare & (rank == 0)] = 0
    due[~is_spare] += 1
    return due.argsort(stable=True)
