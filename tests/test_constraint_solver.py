"""Constraints make the fewest joins that keep every tensor of the pruned network a box."""

import numpy as np
import pytest
import torch

from autoprune.structure.labels import Constraint, LabelBook
from autoprune.tracing.constraint_solver import lattice_factors, solve_constraints


def classes(representatives: np.ndarray, labels: torch.Tensor) -> list[list[int]]:
    """Positions of `labels` that ended in one set, as sorted lists."""
    line = representatives[labels.flatten().numpy()]
    return sorted(np.flatnonzero(line == root).tolist() for root in np.unique(line))


def test_of_a_split_axis_the_longest_part_can_shrink():
    book = LabelBook()
    labels = book.new_labels(6)
    book.constraints.append((Constraint.GRID, labels.view(2, 3)))
    assert classes(solve_constraints(book), labels) == [[0, 3], [1, 4], [2, 5]]


def test_halves_are_balanced_pair_by_pair():
    book = LabelBook()
    labels = book.new_labels(8)
    book.constraints.append((Constraint.PARTS, labels.view(2, 4)))
    assert classes(solve_constraints(book), labels) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_channels_in_all_parts_already_stay_free():
    book = LabelBook()
    labels = book.new_labels(3)
    book.constraints.append(
        (Constraint.PARTS, torch.stack([labels, labels.flip(0), labels]))
    )
    assert classes(solve_constraints(book), labels) == [[0], [1], [2]]


def test_a_later_balance_uses_what_an_earlier_one_left():
    # ShuffleNet: halves of a stream, whose first half is interleaved with new channels
    # and halved again.
    book = LabelBook()
    stream, new = book.new_labels(8), book.new_labels(4)
    book.constraints.append((Constraint.PARTS, stream.view(2, 4)))
    book.constraints.append((Constraint.GRID, torch.stack([stream[:4], new])))
    shuffled = torch.stack([stream[:4], new]).T.flatten()
    book.constraints.append((Constraint.PARTS, shuffled.view(2, 4)))
    assert classes(solve_constraints(book), stream) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n_parts", [2, 3, 4])
def test_every_balanced_set_has_equally_many_channels_in_every_part(n_parts, seed):
    generator = torch.Generator().manual_seed(seed)
    book = LabelBook()
    labels = book.new_labels(7)[torch.randint(7, (n_parts, 12), generator=generator)]
    book.constraints.append((Constraint.PARTS, labels))
    found = solve_constraints(book)[labels.numpy()]
    for root in np.unique(found):
        counts = (found == root).sum(1)
        assert len(set(counts.tolist())) == 1


def test_lattices_that_share_cells_share_rows_and_columns_even_when_turned():
    book = LabelBook()
    queries, keys = book.new_labels(6).view(2, 3), book.new_labels(6).view(2, 3)
    heads, turned = book.factor(queries), book.factor(keys.T)
    book.join(queries, keys)
    representatives = solve_constraints(book)
    columns = book.lattices[0].columns
    assert representatives[turned].tolist() == representatives[columns].tolist()
    assert (
        representatives[book.lattices[1].columns].tolist()
        == representatives[heads].tolist()
    )
    factors = lattice_factors(book, representatives)
    assert [tuple(factors[representatives[cell]]) for cell in queries.flatten()] == [
        (representatives[head], representatives[column])
        for head in heads
        for column in columns
    ]


def test_equal_rows_share_their_label_and_a_second_request_gets_the_first_answer():
    book = LabelBook()
    cells = book.new_labels(6).view(2, 3)
    windows = torch.cat([cells, cells])
    rows = book.factor(windows)
    assert rows[:2].tolist() == rows[2:].tolist()
    assert rows[0] != rows[1]
    assert book.factor(cells).tolist() == rows[:2].tolist()
    assert book.factor(cells.T).tolist() == book.lattices[0].columns.tolist()
