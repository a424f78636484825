"""The counts that a channel group may keep: its levels."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from autoprune.errors import UserError


def levels_of_group(
    channels: int, round_to: int, min_width: int, max_sparsity: float
) -> np.ndarray:
    """The counts that a group may keep, int64, ascending.

    15 channels rounded to 4 at a largest sparsity of 0.5 give 8, 12 and 15.

    Args:
        channels: How many the group has; all of them are always a level.
        round_to: The other levels are multiples of it.
        min_width: Fewest channels to keep, all if the group has fewer.
        max_sparsity: Largest share of the channels that may go.
    """
    # Without the margin, 10 channels at 0.7 would have to keep 4, since 10 * (1 - 0.7)
    # is a little more than 3 in floating point.
    by_sparsity = math.ceil(channels * (1 - max_sparsity) - 1e-9)
    fewest = max(1, min_width, by_sparsity)
    first = math.ceil(fewest / round_to) * round_to
    # Where no multiple is large enough, all channels are the only level.
    return np.unique([*range(first, channels, round_to), channels]).astype(np.int64)


def tabulate_next_levels(levels: Sequence[np.ndarray]) -> np.ndarray:
    """Writes down which level follows each level.

    Args:
        levels: For each group its levels, ascending.

    Returns:
        By group and count the next larger level, int64 `(n_groups, widest + 1)`. The
        largest level is followed by itself; counts that are no levels have a 0.
    """
    widest = max((group[-1] for group in levels), default=0)
    # By count rather than by a level's number, so that counts needn't be looked up.
    table = np.zeros((len(levels), widest + 1), np.int64)
    for index, group in enumerate(levels):
        table[index, group] = np.append(group[1:], group[-1])
    return table


def numbers_in_order(
    argument: str, value: int | Mapping[str, int], names: Sequence[str]
) -> list[int]:
    """One number for each group, from one for all or a mapping.

    Args:
        argument: What the numbers are called, for messages.
        value: One number for all groups, or group to number (1 for those left out).
        names: The groups.

    Returns:
        The numbers in the order of the names.

    Raises:
        UserError: If the mapping names a group that there isn't.
    """
    if not isinstance(value, Mapping):
        return [value] * len(names)
    unknown = sorted(value.keys() - set(names))
    if unknown:
        raise UserError(
            argument,
            f"no prunable group is called {unknown[0]!r}; use the names of the trace",
        )
    return [value.get(name, 1) for name in names]


def span_of(numbers: Sequence[int]) -> str:
    """Says which numbers there are: "2", or "2 to 8" where they differ."""
    if len(set(numbers)) > 1:
        return f"{min(numbers)} to {max(numbers)}"
    return str(numbers[0])
