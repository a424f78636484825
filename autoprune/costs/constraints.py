"""What the user asks of single groups: left whole, a least width, a multiple.

Groups are named by glob patterns. A pattern means a group by the group's own name, or
by the name of any layer that holds the group's channels, be it as output or as input.
So `layer1.*` also means the channels that enter layer1, and both axes of its layers
obey.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from autoprune.config import SearchConfig
from autoprune.costs.widths import suited_multiples
from autoprune.errors import UserError, nearest_names
from autoprune.structure.groups import Group, Groups


def pin_excluded(groups: Groups, patterns: Iterable[str]) -> Groups:
    """Pins the groups that the user excludes, so that they are never pruned.

    Args:
        groups: A trace; left as found.
        patterns: Globs of group or layer names. Groups that are pinned already keep
            their reason.

    Returns:
        The trace with more groups pinned.

    Raises:
        UserError: If a pattern means no group.
    """
    reasons: dict[str, str] = {}
    for pattern in patterns:
        for group in _matching_groups(groups, pattern, "exclude"):
            # The first pattern that means a group is the one reported.
            reasons.setdefault(group.name, f"user asked (exclude {pattern})")
    return groups.with_pins(reasons)


def numbers_per_group(
    groups: Groups,
    argument: str,
    numbers: Mapping[str, int],
    defaults: Mapping[str, int],
) -> dict[str, int]:
    """Gives every prunable group the number of the last pattern that means it.

    Args:
        groups: A trace.
        argument: The argument by which the numbers came, for messages.
        numbers: Glob of group or layer names to the number.
        defaults: Group to the number that it has if no pattern means it.

    Returns:
        Prunable group to its number.

    Raises:
        UserError: If a pattern means no group.
    """
    values = {name: defaults[name] for name in groups.channels}
    for pattern, number in numbers.items():
        for group in _matching_groups(groups, pattern, argument):
            # A pattern may mean pinned groups too, for which a number says nothing.
            if group.name in values:
                values[group.name] = number
    return values


def search_limits(
    groups: Groups,
    config: SearchConfig,
    steps: Mapping[str, int] = MappingProxyType({}),
    least: Mapping[str, int] = MappingProxyType({}),
    tile: int = 1,
) -> dict[str, dict[str, int]]:
    """The multiples and least widths of a search, as its configuration asks.

    Args:
        groups: A trace.
        config: The options.
        steps: Group to a default for `round_to` of its own.
        least: Group to a default for `min_width` of its own.
        tile: How many channels the engine computes at a time, for a `round_to` of
            "auto".

    Returns:
        `round_to` and `min_width`, arguments of a
        `autoprune.costs.search_space.SearchSpace`: each prunable group to its number.

    Raises:
        UserError: If a pattern means no group.
    """
    widths = numbers_per_group(
        groups,
        "min_width",
        config.least_widths,
        dict.fromkeys(groups.channels, 1) | dict(least),
    )
    multiples = _multiples(groups, config, tile, widths)
    return {
        # A group's own default goes before the one for all, and a pattern before both.
        "round_to": numbers_per_group(
            groups, "round_to_for", config.multiples, multiples | dict(steps)
        ),
        "min_width": widths,
    }


def _multiples(
    groups: Groups, config: SearchConfig, tile: int, widths: Mapping[str, int]
) -> dict[str, int]:
    """The multiple of each group as far as no pattern says another."""
    if isinstance(config.round_to, int):
        return dict.fromkeys(groups.channels, config.round_to)
    return suited_multiples(groups, tile, config.max_sparsity, widths)


def _matching_groups(groups: Groups, pattern: str, argument: str) -> list[Group]:
    """The groups that a pattern means, pinned ones among them; UserError if none."""
    matching = []
    for group in groups.all:
        if any(fnmatchcase(name, pattern) for name in _names(group)):
            matching.append(group)
    if matching:
        return matching
    # The names that look most like it; any, where none does.
    known = _all_names(groups)
    examples = ", ".join(nearest_names(pattern, known, 3) or known[:3])
    raise UserError(
        argument,
        f"no group or layer is called {pattern!r}; there are e.g. {examples}",
    )


def _names(group: Group) -> set[str]:
    """What a pattern can call a group.

    That is the group's name, and the names of the modules that hold its channels.
    """
    modules = {member.tensor.rpartition(".")[0] for member in group.members}
    return {group.name} | modules


def _all_names(groups: Groups) -> list[str]:
    """What patterns can call any group, each name once, in the order of the groups."""
    # A dict, since a set would forget the order.
    names: dict[str, None] = {}
    for group in groups.all:
        for name in sorted(_names(group)):
            # A parameter of the network itself has no module that could be named.
            if name:
                names[name] = None
    return list(names)
