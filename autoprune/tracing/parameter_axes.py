"""On which axes of parameters channels lie, where no layer has shown it.

Only when the forward pass is over is it known what every element of a parameter met:
one that is added or multiplied by itself, or one from which the code computes others.
"""

import numpy as np
import torch
from torch import Tensor

from autoprune.structure.labels import lines, look_up, varying_axes
from autoprune.tracing.constraint_solver import (
    lattice_factors,
    planes,
    solve_constraints,
)
from autoprune.tracing.parameter_views import ParameterView
from autoprune.tracing.tracer import Tracer


def solve(tracer: Tracer) -> np.ndarray:
    """Makes all joins, those of parameters' axes included.

    Args:
        tracer: The notebook of the forward pass; it learns where channels lie.

    Returns:
        The representative of every label, `(n_labels,)`.
    """
    _spread_over_ties(tracer)
    representatives = solve_constraints(tracer.book)
    factors = lattice_factors(tracer.book, representatives)
    for name, labels in tracer.bare_parameters.items():
        # A single number has no axes, but is an array like the others.
        cells = np.asarray(representatives[labels.numpy()])
        # Cells that lie along one axis are used as they are; on two axes, rows lie
        # along one and columns along the other.
        if len(varying_axes(torch.from_numpy(cells))) > 1:
            cell_planes = planes(cells, factors)
        else:
            cell_planes = [torch.from_numpy(cells)]
        for plane in cell_planes:
            _assign_bare_parameter(tracer, name, plane, labels)
    _use_met_axes(tracer, representatives)
    # Those axes have joined further labels, which constraints may have to answer.
    return solve_constraints(tracer.book)


def _spread_over_ties(tracer: Tracer) -> None:
    """Takes what is known of one parameter to those that met it, element by element.

    A layer that reads `gain * weight` has shown where its channels lie in the weight;
    the gain's axis that lies along the weight's outputs loses the same ones.
    """
    representatives = torch.from_numpy(tracer.book.representatives())
    n_uses = -1
    # One tie may tell what another one needs; uses only ever become more.
    while len(tracer.uses) > n_uses:
        n_uses = len(tracer.uses)
        for tie in tracer.ties:
            for view in tie:
                for axis, index in view.axes:
                    use = tracer.uses.get((view.name, axis))
                    if use is not None:
                        _tie(tracer, tie, look_up(representatives[use[0]], index))


def _tie(tracer: Tracer, tie: tuple[ParameterView, ...], labels: Tensor) -> None:
    """Records which axes of tied parameters carry some labels.

    Args:
        tracer: The notebook of the forward pass.
        tie: Views of the parameters.
        labels: Of the elements, in the views' shape.
    """
    for view in tie:
        found = view.axis_along(labels)
        if found is not None:
            axis, line = found
            tracer.use(view.name, axis, line, "follow")


def _use_met_axes(tracer: Tracer, representatives: np.ndarray) -> None:
    """Records the axes that met an activation's channels by their labels alone.

    The norm of every row of a weight, by which an activation is divided, for instance.
    """
    used = []
    for labels, _ in tracer.uses.values():
        used.append(representatives[labels.numpy()])
    channels = np.unique(np.concatenate([np.zeros(1, np.int64), *used]))
    for (name, axis), labels in tracer.axis_labels.items():
        met = np.isin(representatives[labels.numpy()], channels[channels > 0])
        # Axes of space are labelled too, and meet no channels.
        if (name, axis) not in tracer.uses and met.all():
            tracer.use(name, axis, labels, "follow")


def _assign_bare_parameter(
    tracer: Tracer, name: str, plane: Tensor, labels: Tensor
) -> None:
    """Records on which axis of a bare parameter its channels lie.

    It is the one axis on which its elements stayed apart. A layer scale
    `(1, 3, 1, 1)` that multiplies channels 4, 5, 6 has the plane 4, 5, 6 along axis
    1; a table of positions `(1, 2, 3)` that is added to the same channels has it in
    each of its two rows.

    Args:
        tracer: The notebook of the forward pass.
        name: Of the parameter.
        plane: The representatives of its elements, or their rows or columns.
        labels: Its elements' own labels, in its shape.
    """
    axes = varying_axes(plane)
    if len(axes) > 1:
        axes = _consistent_axes(plane, labels)
    if len(axes) == 1:
        # Lines differ where the code read only a part of the parameter.
        axis_lines = lines(plane, axes[0])
        tracer.book.join_lines(axis_lines)
        tracer.use(name, axes[0], axis_lines[0], "follow")
    elif axes:
        tracer.book.pin(labels, f"parameter {name} varies along several axes")


def _consistent_axes(plane: Tensor, labels: Tensor) -> list[int]:
    """The axes along which whatever an element met is the same in every line.

    Elements that met nothing are left aside: a table of positions needn't be read
    everywhere.
    """
    met_nothing = plane == labels
    consistent = []
    for axis in varying_axes(plane):
        axis_lines = lines(torch.where(met_nothing, -1, plane), axis)
        highest = axis_lines.amax(0)
        # -1 would be the least of any position, so here it counts as the greatest.
        unread = axis_lines < 0
        greatest = torch.iinfo(torch.int64).max
        lowest = torch.where(unread, greatest, axis_lines).amin(0)
        if bool((highest <= lowest).all()):
            consistent.append(axis)
    return consistent
