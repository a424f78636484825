"""What the user asks of single groups: left whole, a least width, a multiple; by glob
patterns of names.

A pattern means a group by the group's own name, or by the name of any layer that holds
the group's channels, be it as output or as input. So `layer1.*` also means the channels
that enter layer1, and both axes of its layers obey.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from autoprune.config import SearchConfig
from autoprune.errors import UserError, nearest_names
from autoprune.structure.groups import Group, Groups


def pinned_by_user(groups: Groups, patterns: Iterable[str]) -> Groups:
    """The groups with those that the patterns mean pinned, so that they are never
    pruned.

    Args:
        groups: A trace; left as found.
        patterns: Globs of group or layer names. Groups that are pinned already keep
            their reason.

    Raises:
        UserError: If a pattern means no group.
    """
    asked: dict[str, str] = {}
    for pattern in patterns:
        for group in _meant(groups, pattern, "exclude"):
            asked.setdefault(group.name, f"user asked (exclude {pattern})")
    return groups.with_pins(asked)


def per_group(
    groups: Groups,
    argument: str,
    numbers: Mapping[str, int],
    defaults: Mapping[str, int],
) -> dict[str, int]:
    """A number for every prunable group: that of the last pattern that means it, else
    its default.

    Args:
        groups: A trace.
        argument: The argument by which the numbers came, for messages.
        numbers: Glob of group or layer names to the number.
        defaults: Group to the number that it has if no pattern means it.

    Raises:
        UserError: If a pattern means no group.
    """
    values = {name: defaults[name] for name in groups.channels}
    for pattern, number in numbers.items():
        meant = {group.name for group in _meant(groups, pattern, argument)}
        values |= {name: number for name in meant & values.keys()}
    return values


def search_limits(
    groups: Groups,
    config: SearchConfig,
    steps: Mapping[str, int] = MappingProxyType({}),
    least: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, dict[str, int]]:
    """`round_to` and `min_width` per prunable group as the configuration asks:
    arguments of a `SearchSpace`.

    Args:
        groups: A trace.
        config: The options.
        steps: Group to a default for `round_to` of its own.
        least: Group to a default for `min_width` of its own.

    Raises:
        UserError: If a pattern means no group.
    """
    multiples, widths = (
        dict.fromkeys(groups.channels, config.round_to),
        dict.fromkeys(groups.channels, 1),
    )
    return {
        "round_to": per_group(
            groups, "round_to_for", config.multiples, multiples | dict(steps)
        ),
        "min_width": per_group(
            groups, "min_width", config.least_widths, widths | dict(least)
        ),
    }


def _meant(groups: Groups, pattern: str, argument: str) -> list[Group]:
    meant = [
        group
        for group in groups.all
        if any(fnmatchcase(name, pattern) for name in _names(group))
    ]
    if not meant:
        known = list(
            dict.fromkeys(
                name for group in groups.all for name in sorted(_names(group)) if name
            )
        )
        examples = ", ".join(nearest_names(pattern, known, 3) or known[:3])
        raise UserError(
            argument,
            f"no group or layer is called {pattern!r}; there are e.g. {examples}",
        )
    return meant


def _names(group: Group) -> set[str]:
    """What a pattern can call a group: its name and those of the modules that hold its
    channels.
    """
    return {group.name} | {member.tensor.rpartition(".")[0] for member in group.members}
