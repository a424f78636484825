"""The figures of a run, drawn without global state, as SVG for a page or as pixels for
an environment.
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

# Every colour that is drawn, so that a page can replace each by one of its theme.
COLOURS = {
    "ink": "#1c2024",
    "muted": "#687078",
    "faint": "#d5d9de",
    "accent": "#0b6bcb",
}
INK, MUTED, FAINT, ACCENT = COLOURS.values()
DASHES = ("--", "-.", ":")
WIDTH = 7.6


def reward_curve(
    rewards: Mapping[int, float],
    baselines: Mapping[str, float],
    comparable: bool = True,
) -> Figure:
    """Every episode's reward as a dot, the best so far as a line, baselines as labelled
    horizontal lines.

    Args:
        rewards: Episode number, ascending, to reward; at least one.
        baselines: Name to reward.
        comparable: Whether all episodes had the same budget; if not, there is no best
            so far.
    """
    figure, axes = _axes(3.6, left=0.1, right=0.84)
    episodes, values = (
        np.array(list(rewards)),
        np.array(list(rewards.values()), dtype=float),
    )
    best = np.fmax.accumulate(values)
    axes.plot(
        episodes, values, "o", color=MUTED, markersize=3.5, alpha=0.6, markeredgewidth=0
    )
    if comparable:
        axes.step(episodes, best, where="post", color=ACCENT, linewidth=2)
    for reward, dashes in zip(baselines.values(), cycle(DASHES), strict=False):
        axes.axhline(reward, color=MUTED, linewidth=1, linestyle=dashes)
    axes.set_xlabel("episode")
    axes.set_ylabel("reward")
    if comparable:
        _label_at_right(
            axes, {"best so far": best[-1], **baselines}, {"best so far": ACCENT}
        )
    return figure


def pareto_front(
    front: Sequence[tuple[float, float]],
    uniform: Sequence[tuple[float, float]],
    metric: str,
    chosen: int | None = None,
) -> Figure:
    """A Pareto front as dots on a line, uniform pruning dashed.

    Args:
        front: Share of the budgeted cost kept and accuracy of each point, in [0, 1],
            cheapest first; at least one.
        uniform: The same for uniform pruning; at least one.
        metric: What is budgeted, for the axis.
        chosen: The point of the front to ring.
    """
    figure, axes = _axes(3.8, left=0.1, right=0.88)
    (shares, accuracies), (uniform_shares, uniform_accuracies) = (
        100 * np.array(line).T for line in (front, uniform)
    )
    axes.plot(
        uniform_shares, uniform_accuracies, color=MUTED, linewidth=1.2, linestyle="--"
    )
    axes.plot(shares, accuracies, "o-", color=ACCENT, linewidth=2, markersize=6)
    if chosen is not None:
        ringed = shares[chosen], accuracies[chosen]
        axes.plot(
            *ringed,
            "o",
            color=ACCENT,
            markersize=12,
            markerfacecolor="none",
            markeredgewidth=1.5,
        )
        # Above and to the left of a point of a front there is never another one.
        axes.annotate(
            "chosen",
            ringed,
            (-9, 9),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=9,
        )
    axes.set_xlabel(f"share of {metric} kept, %")
    axes.set_ylabel("accuracy before fine-tuning, %")
    _label_at_right(
        axes,
        {"front": accuracies[-1], "uniform": uniform_accuracies[-1]},
        {"front": ACCENT},
    )
    return figure


def loss_curve(trainings: Mapping[str, Sequence[float]]) -> Figure:
    """Mean training loss of each epoch, of one training after the other; several are
    told apart by name.

    Args:
        trainings: Name to losses; at least one of each.
    """
    figure, axes = _axes(2.8, left=0.1, right=0.97, top=0.9)
    before = 0
    for name, losses in trainings.items():
        epochs = range(before + 1, before + len(losses) + 1)
        axes.plot(epochs, losses, "o-", color=ACCENT, linewidth=2, markersize=4)
        if len(trainings) > 1:
            centre = before + (len(losses) + 1) / 2
            axes.text(
                centre,
                1.02,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                color=MUTED,
                fontsize=9,
            )
        if before:
            axes.axvline(before + 0.5, color=MUTED, linewidth=1, linestyle=":")
        before += len(losses)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    return figure


def allocation_bars(
    names: Sequence[str],
    channels: Sequence[int],
    kept: Sequence[int],
    counted: str = "channels",
) -> Figure:
    """One bar a group, in the order given: the dense width as an outline, the kept
    channels filled.

    Args:
        names: The groups, in network order.
        channels: Channels of each in the dense network.
        kept: Channels of each that remain.
        counted: What is counted, if not channels.
    """
    rows = np.arange(len(names))
    margin = 0.45
    height = 0.24 * len(names) + 2 * margin
    left = min(0.45, 0.03 + 0.0105 * max(map(len, names), default=0))
    right = 1 - 0.013 * max((len(f"{n} / {n}") for n in channels), default=0)
    figure, axes = _axes(
        height,
        left=left,
        right=min(0.9, right),
        top=1 - 0.1 / height,
        bottom=margin / height,
    )
    axes.barh(rows, kept, height=0.62, color=ACCENT)
    axes.barh(rows, channels, height=0.62, fill=False, edgecolor=MUTED, linewidth=0.8)
    for row, (dense, count) in enumerate(zip(channels, kept, strict=True)):
        axes.annotate(
            f"{count} / {dense}",
            (dense, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
    axes.set_yticks(rows, names, parse_math=False)
    axes.tick_params("y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(channels, default=1) * 1.02)
    axes.grid(False)
    axes.set_xlabel(counted)
    return figure


def render_rgb(figure: Figure) -> np.ndarray:
    """The figure's pixels, uint8 `(height, width, 3)`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def render_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element to put into a page, the same text for the same
    figure.

    Args:
        figure: One of this module; its colours become the CSS variables of `COLOURS`,
            its own where they aren't set.
        name: Unique on the page; all ids start with it.
        title: What the figure shows, for those who can't see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    view, body = re.search(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL
    ).groups()
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", body).replace(
        "xlink:href", "href"
    )
    for variable, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{variable}, {colour})")
    label = f'role="img" aria-labelledby="{name}-title"><title id="{name}-title">{escape(title)}</title>'
    return f'<svg viewBox="{view}" {label}{body}</svg>'


def _axes(height: float, **margins: float) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height))
    figure.subplots_adjust(**({"top": 0.96, "bottom": 0.16} | margins))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=MUTED, labelsize=9)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label_at_right(
    axes: Axes, values: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    """Names each value at its height beside the axes; names that would overlap are
    moved apart.
    """
    low, high = axes.get_ylim()
    gap, height = 0.065, -np.inf
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        height = max((value - low) / (high - low), height + gap)
        axes.text(
            1.015,
            height,
            name,
            transform=axes.transAxes,
            va="center",
            fontsize=9,
            color=colours.get(name, MUTED),
        )
