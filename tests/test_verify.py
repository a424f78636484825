"""The proof finds exactly the groups that can't be pruned, alone or together, in both
precisions.
"""

import numpy as np
import pytest
import torch
from nets import CLASSES, RGB, conv, images, pooled, randomise
from test_tracing import SameWidths, mislabel_cat
from torch import nn
from torch.nn import functional as F

from autoprune.tracing import verify
from autoprune.tracing.rules import table
from autoprune.tracing.trace import trace

WIDTHS = (6, 7, 8, 9, 10, 6)


class Watched(nn.Module):
    """A chain of convolutions whose widths a condition may refuse."""

    def __init__(self, accepts):
        super().__init__()
        self.accepts = accepts
        self.convs = nn.ModuleList(
            conv(a, b) for a, b in zip((RGB, *WIDTHS), WIDTHS, strict=False)
        )
        self.head = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x):
        widths = []
        for layer in self.convs:
            x = F.relu(layer(x))
            widths.append(x.shape[1])
        if not self.accepts(widths):
            raise ValueError(f"no such widths: {widths}")
        return self.head(pooled(x))


def traced(accepts):
    return trace(randomise(Watched(accepts)).eval(), images(1, 8))


def test_all_groups_pass_where_the_code_takes_any_width():
    assert list(traced(lambda widths: True).channels.values()) == list(WIDTHS)


@pytest.mark.parametrize("fixed", [[0], [3], [0, 5], [1, 2, 4]])
def test_groups_that_cannot_run_alone_are_found_among_others(fixed):
    groups = traced(lambda widths: all(int(widths[i]) == WIDTHS[i] for i in fixed))
    assert set(groups.channels) == {
        f"convs.{i}" for i in range(len(WIDTHS)) if i not in fixed
    }
    for i in fixed:
        reason = next(
            group.pinned for group in groups.pinned if group.name == f"convs.{i}"
        )
        assert reason.startswith("the pruned network doesn't run: no such widths: [")


@pytest.mark.parametrize("error", [KeyError, TypeError, ZeroDivisionError, OSError])
def test_whatever_the_code_raises_at_other_widths_pins_what_it_looks_at(error):
    def accepts(widths):
        if int(widths[2]) != WIDTHS[2]:
            raise error("unforeseen")
        return True

    groups = traced(accepts)
    assert set(groups.channels) == {f"convs.{i}" for i in (0, 1, 3, 4, 5)}
    assert "unforeseen" in groups.reasons["convs.2"]
    assert error.__name__ in groups.reasons["convs.2"]


def test_an_output_that_is_not_finite_is_called_so():
    class Endless(Watched):
        def forward(self, x):
            return super().forward(x) * float("inf")

    groups = trace(randomise(Endless(lambda widths: True)).eval(), images(1, 8))
    assert not groups.channels
    assert "the network's output isn't finite" in groups.reasons.values()


def test_of_groups_that_fail_only_together_one_is_pinned():
    groups = traced(
        lambda widths: int(widths[1]) == WIDTHS[1] or int(widths[4]) == WIDTHS[4]
    )
    assert len(groups) == len(WIDTHS) - 1
    (pinned,) = [
        group for group in groups.pinned if group.name in ("convs.1", "convs.4")
    ]
    assert pinned.pinned.startswith(
        "together with other groups, the pruned network doesn't run: no such widths"
    )


def test_equal_counts_that_the_labels_cannot_see_are_found():
    # With the same share for all groups they would pass.
    groups = traced(lambda widths: abs(widths[0] - widths[5]) < 1)
    assert {"convs.0", "convs.5"}.isdisjoint(groups.channels)
    assert len(groups) == len(WIDTHS) - 2


def test_widths_that_the_code_compares_go_together():
    groups = traced(lambda widths: widths[0] == widths[5])
    assert len(groups) == len(WIDTHS) - 1
    joint = groups["convs.0"]
    assert {"convs.0.weight", "convs.5.weight"} <= {m.tensor for m in joint.members}


def test_a_width_that_the_code_compares_with_a_number_stays():
    groups = traced(lambda widths: widths[3] == WIDTHS[3])
    assert len(groups) == len(WIDTHS) - 1
    assert "has to be as long as" in groups.reasons["convs.3"]


def test_large_networks_are_proven_in_float32(monkeypatch):
    monkeypatch.setattr(verify, "MAX_FLOAT64_PARAMETERS", 0)
    seen = []
    monkeypatch.setattr(
        verify,
        "_draw_values",
        lambda *args, drawn=verify._draw_values: seen.append(args[-1]) or drawn(*args),
    )
    assert set(trace(SameWidths().eval(), images(1, 8)).channels) == {
        "left",
        "right",
        "body",
    }
    assert set(seen) == {torch.float32}
    monkeypatch.setitem(table.RULES, torch.ops.aten.cat, mislabel_cat)
    assert set(trace(SameWidths().eval(), images(1, 8)).channels) == {"body"}


def test_only_large_tensors_of_one_shape_share_their_values(monkeypatch):
    def weights(large: int) -> list[torch.Tensor]:
        monkeypatch.setattr(verify, "LARGE", large)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        twin = verify.copy_with_random_weights(
            model, np.random.default_rng(0), torch.float64
        )
        return [layer.weight for layer in twin]

    assert not torch.equal(*weights(65)[:2])
    first, second, third = weights(64)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert first.std().item() == pytest.approx(8**-0.5, rel=0.2)
