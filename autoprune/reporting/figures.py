"""The figures of a run, as SVG for a page or as pixels for an environment.

They are drawn without matplotlib's global state (`pyplot`), so that a notebook's own
figures and settings stay as they are.
"""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#1c2024"
MUTED = "#687078"
FAINT = "#d5d9de"
ACCENT = "#0b6bcb"
COLOURS = {"ink": INK, "muted": MUTED, "faint": FAINT, "accent": ACCENT}
"""CSS variable to colour: all that are drawn, so that a page can replace each by its
own."""

DASHES = ("--", "-.", ":")
WIDTH = 7.6
"""Of every figure, in inches; heights are in inches too."""
SMALL = 9
"""Font size of labels, in points."""
LABEL_GAP = 0.065
"""Least distance of two labels beside the axes, as a share of the axes' height."""


def reward_curve(
    rewards: Mapping[int, float],
    baselines: Mapping[str, float],
    comparable: bool = True,
) -> Figure:
    """Every episode's reward as a dot, with the best so far and the baselines as lines.

    Args:
        rewards: Episode number, ascending, to reward; at least one.
        baselines: Name to reward; each becomes a labelled horizontal line.
        comparable: Whether all episodes had the same budget; if not, there is no best
            so far.
    """
    figure, axes = _new_axes(3.6, left=0.1, right=0.84)
    episodes = np.array(list(rewards))
    values = np.array(list(rewards.values()), dtype=float)
    # fmax passes over NaN, which maximum would spread to all later episodes.
    best = np.fmax.accumulate(values)
    axes.plot(
        episodes, values, "o", color=MUTED, markersize=3.5, alpha=0.6, markeredgewidth=0
    )
    # Under a larger budget a reward is easily larger: there the best says nothing.
    if comparable:
        axes.step(episodes, best, where="post", color=ACCENT, linewidth=2)
    for reward, dashes in zip(baselines.values(), cycle(DASHES), strict=False):
        axes.axhline(reward, color=MUTED, linewidth=1, linestyle=dashes)
    axes.set_xlabel("episode")
    axes.set_ylabel("reward")
    if comparable:
        labels = {"best so far": best[-1], **baselines}
        _label_at_right(axes, labels, {"best so far": ACCENT})
    return figure


def pareto_front(
    front: Sequence[tuple[float, float]],
    uniform: Sequence[tuple[float, float]],
    metric: str,
    chosen: int | None = None,
) -> Figure:
    """A Pareto front as dots on a line, with uniform pruning as a dashed line.

    Args:
        front: Share of the budgeted cost kept and accuracy of each point, in [0, 1],
            cheapest first; at least one.
        uniform: The same for uniform pruning; at least one.
        metric: What is budgeted, for the axis.
        chosen: Index of the point of the front to ring.
    """
    figure, axes = _new_axes(3.8, left=0.1, right=0.88)
    shares, accuracies = 100 * np.array(front).T
    uniform_shares, uniform_accuracies = 100 * np.array(uniform).T
    axes.plot(
        uniform_shares, uniform_accuracies, color=MUTED, linewidth=1.2, linestyle="--"
    )
    axes.plot(shares, accuracies, "o-", color=ACCENT, linewidth=2, markersize=6)
    if chosen is not None:
        _ring(axes, shares[chosen], accuracies[chosen])
    axes.set_xlabel(f"share of {metric} kept, %")
    axes.set_ylabel("accuracy before fine-tuning, %")
    ends = {"front": accuracies[-1], "uniform": uniform_accuracies[-1]}
    _label_at_right(axes, ends, {"front": ACCENT})
    return figure


def accuracy_cost(
    points: Sequence[tuple[float, float]], dense: Mapping[str, float], metric: str
) -> Figure:
    """Runs as numbered dots, accuracy against cost; dense networks as dashed lines.

    Args:
        points: Share of the cost left and accuracy of each run, in [0, 1]; they are
            numbered from 1.
        dense: Label to accuracy of each dense network.
        metric: What is counted, for the axis.
    """
    figure, axes = _new_axes(3.8, left=0.1, right=0.8)
    shares, accuracies = 100 * np.array(points).T
    for accuracy in dense.values():
        axes.axhline(100 * accuracy, color=MUTED, linewidth=1.2, linestyle="--")
    axes.plot(shares, accuracies, "o", color=ACCENT, markersize=7)
    # Room for numbers beside the outermost dots.
    axes.margins(0.08, 0.12)
    for place, numbers in _near_ones(axes, shares, accuracies).items():
        axes.annotate(
            ", ".join(map(str, numbers)),
            place,
            (6, 6),
            textcoords="offset points",
            color=INK,
            fontsize=SMALL,
        )
    axes.set_xlabel(f"share of {metric} left, %")
    axes.set_ylabel("accuracy, %")
    _label_at_right(axes, {name: 100 * value for name, value in dense.items()}, {})
    return figure


def _near_ones(
    axes: Axes, shares: np.ndarray, accuracies: np.ndarray
) -> dict[tuple[float, float], list[int]]:
    """Dots that lie so close that they share a label, by the first one's place."""
    width = np.ptp(axes.get_xlim())
    height = np.ptp(axes.get_ylim())
    groups: dict[tuple[float, float], list[int]] = {}
    for number, (x, y) in enumerate(zip(shares, accuracies, strict=True), 1):
        for place in groups:
            is_near = abs(x - place[0]) < 0.03 * width
            if is_near and abs(y - place[1]) < LABEL_GAP * height:
                groups[place].append(number)
                break
        else:
            groups[float(x), float(y)] = [number]
    return groups


def _ring(axes: Axes, x: float, y: float) -> None:
    """Rings one point of a Pareto front and calls it chosen."""
    axes.plot(
        x,
        y,
        "o",
        color=ACCENT,
        markersize=12,
        markerfacecolor="none",
        markeredgewidth=1.5,
    )
    # Above and to the left of a point of a front there is never another one.
    axes.annotate(
        "chosen",
        (x, y),
        (-9, 9),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=SMALL,
    )


def loss_curve(trainings: Mapping[str, Sequence[float]]) -> Figure:
    """Mean training loss of each epoch, of one training after the other.

    Several trainings are told apart by their names and a dotted line between them.

    Args:
        trainings: Name to losses; at least one of each.
    """
    figure, axes = _new_axes(2.8, left=0.1, right=0.97, top=0.9)
    n_before = 0
    for name, losses in trainings.items():
        epochs = range(n_before + 1, n_before + len(losses) + 1)
        axes.plot(epochs, losses, "o-", color=ACCENT, linewidth=2, markersize=4)
        if len(trainings) > 1:
            # x in epochs, y as a share of the axes' height: just above them.
            axes.text(
                n_before + (len(losses) + 1) / 2,
                1.02,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                color=MUTED,
                fontsize=SMALL,
            )
        if n_before:
            axes.axvline(n_before + 0.5, color=MUTED, linewidth=1, linestyle=":")
        n_before += len(losses)
    locator = axes.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator), "linear axes have matplotlib's AutoLocator"
    # There is no epoch 1.5; and by default a single epoch would get ticks around it.
    locator.set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    return figure


def allocation_bars(
    names: Sequence[str],
    channels: Sequence[int],
    kept: Sequence[int],
    counted: str = "channels",
) -> Figure:
    """One bar a group: the dense width as an outline, the kept channels filled.

    Args:
        names: The groups, in network order, which is top to bottom.
        channels: Channels of each in the dense network.
        kept: Channels of each that remain.
        counted: What is counted, if not channels.
    """
    figure, axes = _bar_axes(names, channels)
    rows = np.arange(len(names))
    axes.barh(rows, kept, height=0.62, color=ACCENT)
    # The outline goes over the bar, so that a whole group shows it too.
    axes.barh(rows, channels, height=0.62, fill=False, edgecolor=MUTED, linewidth=0.8)
    for row, (dense, count) in enumerate(zip(channels, kept, strict=True)):
        axes.annotate(
            f"{count} / {dense}",
            (dense, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=SMALL,
        )
    # A name with dollar signs is no formula.
    axes.set_yticks(rows, names, parse_math=False)
    axes.tick_params("y", length=0, labelcolor=INK)
    # Larger first: the first group stands on top.
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(channels, default=1) * 1.02)
    axes.grid(False)
    axes.set_xlabel(counted)
    return figure


def _bar_axes(names: Sequence[str], channels: Sequence[int]) -> tuple[Figure, Axes]:
    """Axes with a row for each group, and room for names and counts beside it."""
    margin = 0.45
    height = 0.24 * len(names) + 2 * margin
    longest_name = max(map(len, names), default=0)
    # The widths of an average character, as shares of the figure's. Neither very long
    # names nor very long counts may leave no room for the bars.
    left = min(0.45, 0.03 + 0.0105 * longest_name)
    right = 1 - 0.013 * max((len(f"{n} / {n}") for n in channels), default=0)
    return _new_axes(
        height,
        left=left,
        right=min(0.9, right),
        top=1 - 0.1 / height,
        bottom=margin / height,
    )


def render_rgb(figure: Figure) -> np.ndarray:
    """The figure's pixels, uint8 `(height, width, 3)`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A copy, since the buffer is the canvas's own.
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def render_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element to put into a page.

    The same figure gives the same text, so that a report can be compared byte by byte.

    Args:
        figure: One of this module; its colours become the CSS variables of `COLOURS`,
            its own where they aren't set.
        name: Unique on the page; all ids start with it.
        title: What the figure shows, for those who can't see it.
    """
    buffer = io.StringIO()
    # The salt makes the ids the same every time; text stays text, in the page's font.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # The metadata hold matplotlib's version, which may change without the figure.
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    parts = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert parts is not None, "matplotlib writes one svg element with a view box"
    view, body = parts.groups()
    # Figures on one page share one space of ids.
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", body)
    body = body.replace("xlink:href", "href")
    for variable, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{variable}, {colour})")
    label = f'role="img" aria-labelledby="{name}-title"'
    heading = f'<title id="{name}-title">{escape(title)}</title>'
    return f'<svg viewBox="{view}" {label}>{heading}{body}</svg>'


def _new_axes(height: float, **margins: float) -> tuple[Figure, Axes]:
    """A figure of the house's look with its only axes.

    Args:
        height: In inches.
        **margins: Where the axes end: left, right, top, bottom as shares of the figure.
    """
    figure = Figure((WIDTH, height))
    figure.subplots_adjust(**({"top": 0.96, "bottom": 0.16} | margins))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=MUTED, labelsize=SMALL)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label_at_right(
    axes: Axes, values: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    """Names each value at its height beside the axes.

    From the lowest value up, a name that would overlap the one below moves up.
    """
    low, high = axes.get_ylim()
    height = -np.inf
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        height = max((value - low) / (high - low), height + LABEL_GAP)
        axes.text(
            1.015,
            height,
            name,
            transform=axes.transAxes,
            va="center",
            fontsize=SMALL,
            color=colours.get(name, MUTED),
        )
