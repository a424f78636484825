"""Networks composed at random: whatever is traced, pruned equals masked and costs are
exact, for every allocation.
"""

import pytest
import steps
import torch
from contracts import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import SIZE, images, outputs
from recipes import ENDINGS, MAX_STEPS, Recipe, build, choose_step, recipe, shrunk

N_NETWORKS = 30

REGRESSIONS = {
    "AcrossChannels(how='mean_map'), ConvNeXt()": 2,
    "AcrossChannels(how='mean_map'), SqueezeExcite()": 2,
    "AcrossChannels(how='gram'), Conv()": 1,
    "Conv(), Transposed(groups=2)": 2,
    "Shuffle()": 1,
    "Conv(width=2), Attention(form='module', heads=2), Linear(width=8)": 4,
    "Residual(norm='instance')": 3,
    "SqueezeExcite(hidden=1, form='linear', gate='hardsigmoid')": 1,
    "Maxout(), Split(source=2, how='alternate', pieces=4), Pad(), AcrossChannels(how='normalize')": 0,
    "Pad(mode='circular'), Conv()": 2,
    "Norm(kind='plain_group'), Conv()": 2,
    "Conv(width=6, groups=2), Add(), Write(source=1, how='shift')": 1,
    "Attention(form='module'), ChannelPad(how='cat'), Split(how='view', pieces=3), "
    "Conv(source=1, width=6, groups=4), "
    "Split(source=4, how='view', pieces=4)": 0,
    "Pool(), Pool(), Pool(), Write(how='shift')": 0,
    "Conv(width=6), Concat(other=2, again=True), Write(how='shift')": 1,
    "Conv(), ChannelOrder(how='roll'), Conv(act='prelu')": 1,
    "Conv(), ChannelOrder(how='roll'), SpaceMoves(source=4)": 1,
    "Depthwise(stride=2), PixelShuffle(how='unshuffle'), Conv(stride=2), Conv(norm='group_of_all')": 2,
    "Matmul(how='linear'), Conv(), Pad(), Shuffle(), Attention(source=2, form='module'), Maxout()": 1,
}
"""Steps with which a tracer, or a check, once went wrong, as a failure prints them, to
the fewest prunable groups.
"""


def parsed(text: str) -> Recipe:
    """The recipe of printed steps."""
    return Recipe(eval(f"({text},)", vars(steps).copy()))


@st.composite
def recipes(draw) -> Recipe:
    """Recipes that shrink to few steps with default fields."""
    step = st.composite(
        lambda draw: choose_step(lambda choices: draw(st.sampled_from(choices)))
    )()
    return Recipe(
        tuple(draw(st.lists(step, min_size=1, max_size=MAX_STEPS))),
        draw(st.sampled_from(ENDINGS)),
    )


@settings(
    max_examples=N_NETWORKS,
    derandomize=True,  # CI tries the same networks every time; experiments/fuzz.py tries others
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(recipes())
def test_pruned_equals_masked_and_costs_are_exact_for_random_networks(recipe):
    assert check(recipe).failures == []


@pytest.mark.parametrize(("text", "n_groups"), REGRESSIONS.items())
def test_what_once_failed_passes(text, n_groups):
    found = check(parsed(text))
    assert found.failures == []
    assert found.prunable >= n_groups, found.pinned


def test_most_random_networks_have_something_to_prune():
    found = [check(recipe(seed), max_single=0).prunable > 0 for seed in range(10)]
    assert sum(found) >= 7


def test_recipes_are_made_again_from_their_seed_and_from_what_they_print():
    for seed in range(20):
        made = recipe(seed)
        assert (
            made == recipe(seed) == eval(repr(made), {**vars(steps), "Recipe": Recipe})
        )
    x = images(1, SIZE, torch.float64)
    assert torch.equal(outputs(build(made), x), outputs(build(recipe(seed)), x))


def test_failing_recipes_shrink_to_what_fails():
    made = Recipe(
        (
            steps.Conv(width=6),
            steps.Pool(),
            steps.Split(how="view", pieces=3),
            steps.Conv(),
        ),
        "list",
    )

    def fails(candidate):
        return any(isinstance(step, steps.Split) for step in candidate.steps)

    assert shrunk(made, fails) == Recipe((steps.Split(),))
