"""Numbers as the report writes them."""

from collections.abc import Mapping
from typing import Any

NOTHING = "–"
"""Stands in a table where nothing was measured."""
METRICS = {
    "macs": "MACs",
    "params": "parameters",
    "memory": "memory",
    "size": "size of the file",
    "latency": "latency",
}
"""What a budget counts, within a sentence: so much of the ..."""
UNITS = {
    "memory": (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("bytes", 1)),
    "latency": (("s", 10**9), ("ms", 10**6), ("µs", 10**3), ("ns", 1)),
}
"""Metric to the units of its amounts, the largest first; others are counts."""
UNITS["size"] = UNITS["memory"]


def percent_text(value: float, digits: int = 2) -> str:
    """A share as a percentage.

    Args:
        value: The share, 1 for all.
        digits: How many behind the point.
    """
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def points_text(change: float) -> str:
    """A change of an accuracy in percentage points, with its sign.

    Args:
        change: The change, 1 for all.
    """
    return f"{100 * change:+.2f}".replace("-", "\N{MINUS SIGN}")


def count_text(value: int) -> str:
    """A count with commas between thousands."""
    return f"{value:,}"


def amount_text(metric: str, amount: int) -> str:
    """What something costs, to four digits in a unit that suits it.

    Args:
        metric: What is counted.
        amount: In the metric's own unit.
    """
    for unit, size in UNITS.get(metric, ()):
        if amount >= size:
            return f"{amount / size:.4g}\N{NO-BREAK SPACE}{unit}"
    return count_text(amount)


def count_if_known(value: int | None) -> str:
    """A count, or a dash where nothing was counted."""
    return NOTHING if value is None else count_text(value)


def score_text(value: float) -> str:
    """A reward or loss, with a real minus sign."""
    return f"{value:.4f}".replace("-", "\N{MINUS SIGN}")


def milliseconds_text(value: float) -> str:
    """Milliseconds with their unit."""
    return f"{value:.2f}\N{NO-BREAK SPACE}ms"


def plural(n: int, noun: str) -> str:
    """A count with its noun.

    Args:
        n: The count.
        noun: In the singular; gets an s unless `n` is 1.
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def widths_text(widths: dict[str, Any]) -> str:
    """What kept channels are multiples of, and on whose behalf.

    Args:
        widths: The field of the results.
    """
    multiples = sorted(set(widths["multiples"].values()), reverse=True)
    text = f"multiples of {multiples[0]}"
    if len(multiples) > 1:
        text += f", in some groups of {' or '.join(map(str, multiples[1:]))}"
    if "engine" in widths:
        text += f" ({widths['engine']} on {widths['processor']})"
    return text


def setting_text(setting: Mapping[str, Any]) -> str:
    """What a latency was measured with: "onnxruntime, batch 1, 2 threads, float32".

    Args:
        setting: A row of the results' latencies, or their setting. Those of runs of
            earlier versions name no precision, which was float32.
    """
    threads = plural(setting["threads"], "thread")
    precision = setting.get("precision", "float32")
    return f"{setting['engine']}, batch {setting['batch']}, {threads}, {precision}"


def duration_text(seconds: float) -> str:
    """Seconds in hours, minutes and seconds, the two largest of them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
