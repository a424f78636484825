"""What can be budgeted, and the units in which amounts of it are written.

Inside autoprune every amount is a whole number in a metric's own unit: one MAC, one
parameter, one byte, one nanosecond.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation, localcontext

from autoprune.errors import UserError

COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
DECIMAL_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
BINARY_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
DIGITS = 60
"""Decimals of amounts end; more digits than these no amount has."""


@dataclass(frozen=True)
class Unit:
    """How amounts of a metric are written.

    Attributes:
        sizes: Suffix to what it multiplies by, ascending.
        examples: Budgets, for messages.
        other_sizes: Further suffixes, for the same in powers of 2.
        takes_bare_amounts: Whether an amount may do without a suffix.
    """

    sizes: Mapping[str, int]
    examples: str
    other_sizes: Mapping[str, int] = field(default_factory=dict)
    takes_bare_amounts: bool = True

    @property
    def is_count(self) -> bool:
        """Whether it counts things, which have no unit."""
        return "" in self.sizes

    def split(self, text: str) -> tuple[str, int | None]:
        """Splits an amount, "8.5ms", into its number and what that is multiplied by.

        Args:
            text: The amount.

        Returns:
            "8.5" and 1000000; None in place of the factor where there is no suffix.
        """
        # Longest first: "5MB" ends with "B" too.
        sizes = {**self.sizes, **self.other_sizes}
        for suffix in sorted(sizes, key=len, reverse=True):
            if suffix and text.endswith(suffix):
                return text.removesuffix(suffix), sizes[suffix]
        return text, None


UNITS: dict[str, Unit] = {
    "macs": Unit(COUNTS, "macs=50%, macs=0.5 or macs=20M"),
    "params": Unit(COUNTS, "macs=50%, macs=0.5 or macs=20M"),
    "memory": Unit(DECIMAL_BYTES, "memory=60% or memory=20MB", BINARY_BYTES),
    "size": Unit(DECIMAL_BYTES, "size=60% or size=5MB", BINARY_BYTES),
    # Nobody knows whether a bare number is milliseconds, seconds or a share.
    "latency": Unit(TIMES, "latency=50% or latency=8ms", takes_bare_amounts=False),
}
"""Metric that can be budgeted to how its amounts are written."""


def read_number(digits: str, target: str, unit: Unit) -> Decimal:
    """Reads the number of a target.

    Args:
        digits: The number.
        target: The whole target, for messages.
        unit: How amounts of the metric are written.

    Raises:
        UserError: If it is no number, or not finite.
    """
    try:
        number = Decimal(digits)
    except InvalidOperation:
        number = None
    if number is None:
        kind = "number"
        if not unit.is_count:
            suffixes = ", ".join([*unit.sizes, *unit.other_sizes])
            kind = f"share and no amount in {suffixes}"
        raise UserError(
            "budget", f"{target!r} is no {kind}; write e.g. {unit.examples}"
        )
    # What no float holds is no amount of anything either.
    if not number.is_finite() or not math.isfinite(float(number)):
        raise out_of_range(target)
    return number


def out_of_range(target: str) -> UserError:
    """The error for a target that nothing can cost.

    Args:
        target: As it was given.
    """
    return UserError(
        "budget",
        f"the target must be above 0 and at most 100%, got {target!r}; e.g. macs=50%",
    )


def scaled_down(number: Decimal, factor: int) -> int:
    """A number times a factor as a whole number, rounded down."""
    with localcontext() as context:
        context.prec = DIGITS
        return int(number * factor)


def amount_text(metric: str, amount: int) -> str:
    """An amount as a budget takes it, in the unit that suits it.

    Args:
        metric: A key of `UNITS`; amounts of others are written as they are.
        amount: In the metric's own unit.
    """
    unit = UNITS.get(metric)
    # Counts stay whole: "macs=20000000" is what files have always held.
    if unit is None or unit.is_count:
        return str(amount)
    texts = [_in_largest(unit.sizes, amount)]
    if unit.other_sizes and amount >= min(unit.other_sizes.values()):
        texts.append(_in_largest(unit.other_sizes, amount))
    # 1048576 bytes are 1MiB rather than 1.048576MB; of equals the first one counts.
    return min(texts, key=len)


def _in_largest(sizes: Mapping[str, int], amount: int) -> str:
    """An amount in the largest unit that isn't larger, exactly."""
    largest = next(iter(sizes))
    for suffix, size in sizes.items():
        if size <= amount:
            largest = suffix
    with localcontext() as context:
        context.prec = DIGITS
        # Units are powers of 2 and of 10, so the decimals end.
        number = (Decimal(amount) / sizes[largest]).normalize()
    return f"{number:f}{largest}"
