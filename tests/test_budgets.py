"""Budgets of every metric and of several at once: read, met exactly, refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Stairs, costs_with_latency, fake_env, traced

from autoprune.costs.budget import (
    METRICS,
    Budget,
    BudgetRange,
    JointBudget,
    parse_budget,
    parse_single,
)
from autoprune.costs.cost import CostTable
from autoprune.costs.joint import JOINT_TARGET, JointMetric
from autoprune.costs.search_space import SearchSpace
from autoprune.errors import UserError


@pytest.mark.parametrize(
    ("text", "metric", "amount"),
    [
        ("latency=8ms", "latency", 8_000_000),
        ("latency=0.5ms", "latency", 500_000),
        ("latency=250us", "latency", 250_000),
        ("latency=90ns", "latency", 90),
        ("latency=1.5s", "latency", 1_500_000_000),
        ("size=5MB", "size", 5_000_000),
        ("size=5MiB", "size", 5 * 2**20),
        ("size=700KB", "size", 700_000),
        ("size=1.5KiB", "size", 1536),
        ("memory=2GB", "memory", 2_000_000_000),
        ("memory=2GiB", "memory", 2**31),
        ("memory=4096B", "memory", 4096),
        ("memory=120000", "memory", 120_000),
        ("size=0.3MB", "size", 300_000),
    ],
)
def test_amounts_with_units_are_whole_numbers_of_the_metrics_own(text, metric, amount):
    assert Budget.parse(text) == Budget(metric, amount=amount)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency=8", "'8' has no unit; write e.g. latency=50% or latency=8ms"),
        ("latency=0.5", "'0.5' has no unit; write e.g. latency=50% or latency=8ms"),
        ("latency=8MB", "'8MB' is no share and no amount in ns, us, ms, s; write"),
        ("size=5M", "'5M' is no share and no amount in B, KB, MB, GB, KiB, MiB, GiB"),
        ("size=half", "'half' is no share and no amount in"),
        ("memory=0MB", "the target must be above 0 and at most 100%, got '0MB'"),
        ("memory=0.1B", "the target must be above 0 and at most 100%, got '0.1B'"),
        ("memory=-5MB", "the target must be above 0 and at most 100%, got '-5MB'"),
        ("memory=nan", "the target must be above 0 and at most 100%, got 'nan'"),
        ("size=1e999MB", "the target must be above 0 and at most 100%, got '1e999MB'"),
        ("latency=150%", "the target must be above 0 and at most 100%, got '150%'"),
        ("latencies=5%", "unknown metric 'latencies'; did you mean 'latency'?"),
        ("macs=50%,macs=20M", "macs is budgeted twice; give each metric once"),
        ("macs=30%..80%,size=5MB", "a range is of one metric alone"),
        ("size=5MB, macs=80%..30%", "a range is of one metric alone"),
        ("macs=50%,", "unknown metric ''"),
        ("latency=5ms..8ms", "a range goes from a smaller to a larger share"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_budget(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


shares = st.integers(1, 10**8).map(lambda n: n / 10**8)
budgets_of = {
    metric: st.one_of(
        shares.map(lambda share, metric=metric: Budget(metric, share=share)),
        # A bare amount of 1 would be a share.
        st.integers(2, 10**15).map(
            lambda amount, metric=metric: Budget(metric, amount=amount)
        ),
    )
    for metric in METRICS
}


@given(st.permutations(METRICS), st.integers(1, len(METRICS)), st.data())
@settings(max_examples=100, deadline=None)
def test_every_budget_survives_its_own_text(order, n, data):
    parts = tuple(data.draw(budgets_of[metric]) for metric in order[:n])
    budget = parts[0] if n == 1 else JointBudget(parts)
    again = parse_budget(str(budget))
    assert str(again) == str(budget)
    for part, read in zip(parts, again.parts, strict=True):
        assert (read.metric, read.amount) == (part.metric, part.amount)
        assert (read.share or 0) == pytest.approx(part.share or 0, rel=1e-7)
    assert parse_single(str(budget)) == again == parse_budget(again)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (5_000_000, "size=5MB"),
        (2**20, "size=1MiB"),
        (999, "size=999B"),
        (1000, "size=1KB"),
        (1536, "size=1.5KiB"),
        (5_242_881, "size=5.242881MB"),
    ],
)
def test_amounts_are_written_in_the_unit_that_suits_them(amount, text):
    assert str(Budget("size", amount=amount)) == text


@pytest.mark.parametrize("metric", METRICS)
def test_ranges_are_of_any_metric(metric):
    asked = parse_budget(f"{metric}=30%..80%")
    assert asked == BudgetRange(Budget(metric, share=0.3), Budget(metric, share=0.8))
    assert str(asked) == f"{metric}=30%..80%"
    env = fake_env("wide", budget=asked, costs=costs_with_latency("wide"))
    for position in (0, 0.5, 1):
        budget = asked.at_position(position)
        target = env.target_of(budget)
        dense = env.space.cost(env.space.costs.dense)
        assert target <= budget.share * dense < target + 1.001
        _, _, done, _, info = (
            env.reset(options={"budget": str(budget)}),
            0,
            False,
            0,
            {},
        )
        while not done:
            _, _, done, _, info = env.step(np.array([0.3]))
        assert info["costs"] == {metric: info["cost"]}
        assert info["cost"] <= target


class Known:
    """A metric whose costs are its counts' first column."""

    def __init__(self, column: int) -> None:
        self.column = column

    def __call__(self, kept):
        return kept[..., self.column]

    def continuous(self, kept):
        return kept[..., self.column].astype(float)


@given(
    st.lists(st.integers(1, 2**50), min_size=2, max_size=4),
    st.lists(st.integers(-2, 2), min_size=4, max_size=4),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_a_joint_cost_is_within_exactly_if_every_cost_is_and_never_falls(
    targets, offsets, data
):
    names = [str(number) for number in range(len(targets))]
    joint = JointMetric(
        {name: Known(int(name)) for name in names},
        dict(zip(names, targets, strict=True)),
    )
    near = np.maximum(np.array(targets) + offsets[: len(targets)], 0)
    far = np.array([data.draw(st.integers(0, 2**52)) for _ in targets])
    for costs in (np.array(targets), near, far, np.minimum(far, targets)):
        assert (joint(costs) <= JOINT_TARGET) == bool((costs <= targets).all())
        assert type(joint(costs)) is int
        grown = costs + np.eye(len(targets), dtype=np.int64)
        assert (joint(grown) >= joint(costs)).all()
        assert joint(grown).dtype == np.int64
        # The curve is what the whole costs round.
        curve = min(joint.continuous(costs), 2.0**62)
        assert curve == pytest.approx(joint(costs), rel=1e-9, abs=2)


def test_a_joint_budget_is_one_more_metric_and_leaves_the_costs_as_they_are():
    costs = costs_with_latency()
    budget = parse_budget("macs=50%,latency=60%,size=5MB")
    extended = budget.with_metrics(costs)
    assert budget.metric == str(budget) in extended.metrics
    assert budget.metric not in costs.metrics
    assert budget.target(extended) == JOINT_TARGET
    assert budget.share_of(costs) == pytest.approx(0.5, abs=1e-4)
    assert budget.at_position(0.3) is budget
    # On its own each part is what it was.
    for part in budget.parts:
        assert extended.metrics[part.metric] is costs.metrics[part.metric]


@pytest.mark.parametrize("text", ["latency=50%", "macs=50%,latency=8ms"])
def test_a_metric_that_nothing_knows_is_refused_by_name(text):
    with pytest.raises(UserError, match=r"^budget: nothing tells the latency of this"):
        fake_env(budget=text)


NETWORKS = ("chain", "wide", "three", "resnet20", "mobilenet_v1_cifar")
JOINT = (
    "macs=50%,memory=70%,size=60%",
    "macs=45%,latency=60%,size=70%",
    "memory=75%,latency=55%,size=80%",
    "macs=80%,memory=80%,latency=80%,size=45%",
)
LANES = 500


def random_episodes(env, budget: Budget | JointBudget, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # A third of the lanes go to an end at every step, where mistakes show.
    kinds = generator.random(LANES)

    def act(batch):
        actions = generator.uniform(-1, 1, LANES)
        return np.where(kinds < 1 / 3, np.sign(actions), actions)

    return env.start_episodes([budget] * LANES).rollout(act).state.kept


def over(costs: CostTable, budget, kept: np.ndarray) -> np.ndarray:
    """Where counts cost more than some part of a budget allows; part by part."""
    return np.any(
        [
            costs.metrics[part.metric](kept) > part.target(costs)
            for part in budget.parts
        ],
        axis=0,
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("text", JOINT)
def test_random_episodes_meet_every_budget_and_leave_no_room_for_a_step(name, text):
    """2,000 episodes a network, 10,000 in all."""
    costs = costs_with_latency(name)
    env = fake_env(name, budget=text, costs=costs, max_sparsity=0.95)
    kept = random_episodes(env, env.budget, seed=len(text))
    assert not over(costs, env.budget, kept).any()
    could_grow = np.zeros(LANES, int)
    for index, levels in enumerate(env.space.levels):
        place = np.searchsorted(levels, kept[:, index])
        assert (levels[place] == kept[:, index]).all()
        larger = levels[np.minimum(place + 1, len(levels) - 1)]
        grown = kept.copy()
        grown[:, index] = larger
        is_step = larger > kept[:, index]
        assert (over(costs, env.budget, grown) | ~is_step).all()
        could_grow += is_step
    assert (could_grow > 0).all(), "else the budget asked for nothing"
    # Few allocations of the tiny ones end at a landing of the stairs.
    assert len(np.unique(kept, axis=0)) > 20 or len(env.groups) < 5


@pytest.mark.parametrize("metric", ["memory", "size", "latency"])
def test_random_episodes_meet_a_budget_of_one_metric(metric):
    costs = costs_with_latency("wide")
    env = fake_env("wide", budget=f"{metric}=60%", costs=costs, max_sparsity=0.95)
    kept = random_episodes(env, env.budget, seed=1)
    assert not over(costs, env.budget, kept).any()


def test_a_target_that_a_cost_hits_exactly_is_met():
    costs = costs_with_latency("wide")
    space = SearchSpace(costs, round_to=4)
    kept = np.array([levels[len(levels) // 2] for levels in space.levels])
    parts = [
        Budget(metric, amount=costs.metrics[metric](kept))
        for metric in ("macs", "size", "latency")
    ]
    budget = JointBudget(tuple(parts))
    extended = budget.with_metrics(costs)
    joint = SearchSpace(extended, budget.metric, round_to=4)
    assert joint.cost(kept) == budget.target(extended)
    assert (joint.fill(kept, budget.target(extended)) == kept).all()
    for part in parts:
        tighter = JointBudget(
            tuple(Budget(p.metric, amount=p.amount - (p is part)) for p in parts)
        )
        one_less = tighter.with_metrics(costs)
        assert one_less.metrics[tighter.metric](kept) > tighter.target(one_less)


def test_steps_that_cost_nothing_are_always_taken():
    costs = costs_with_latency("wide")
    env = fake_env("wide", budget="latency=60%", costs=costs, round_to=2)
    kept = random_episodes(env, env.budget, seed=3)
    # Within a step of the stairs channels are free.
    assert ((kept % 8 == 0) | (kept == costs.dense)).all()
    # Without a step to spare too: the costs just stay within.
    low = env.space.low[None]
    target = np.array([env.space.cost(env.space.low)])
    filled = env.space.fill(low, target)
    assert (filled > low).any()
    assert env.space.cost(filled) == target


def test_an_unreachable_pair_is_refused_with_both_floors():
    costs = costs_with_latency("wide")
    space = SearchSpace(costs)
    floors = {name: costs.metrics[name](space.low) for name in ("macs", "size")}
    # One alone out of reach, the other loose; and both.
    for text in ("macs=0.1%,size=90%", "macs=90%,size=1KB", "macs=0.1%,size=1KB"):
        with pytest.raises(UserError) as error:
            fake_env("wide", budget=text, costs=costs)
        message = str(error.value)
        assert message.startswith(f"budget: {text} is below the reachable floor; with ")
        assert f"macs={floors['macs']} (" in message
        assert f" and size={floors['size'] / 1000:g}KB (" in message
        assert message.endswith("%) or more")
    with pytest.raises(UserError, match=r"needs latency=\d+ns \(\d"):
        fake_env("wide", budget="latency=1ns", costs=costs)


def test_other_targets_for_several_metrics_need_another_environment():
    env = fake_env(budget="macs=50%,size=80%")
    with pytest.raises(UserError, match="this environment budgets macs=50%,size=80%"):
        env.reset(options={"budget": "macs=60%,size=80%"})
    observation, info = env.reset(options={"budget": "macs=50%,size=80%"})
    assert info["budget"] == "macs=50%,size=80%"
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize("name", ["wide", "resnet20"])
def test_memory_of_many_is_the_largest_of_each_operation_summed_by_itself(name):
    """An independent count: tensors and live activations one by one, in integers."""
    _, groups, _ = traced(name)
    costs, generator = CostTable(groups), np.random.default_rng(0)
    kept = generator.integers(1, costs.dense + 1, (20, len(costs.dense)))
    memory = costs.memory(kept)
    for row, bytes_ in zip(kept, memory, strict=True):
        counts = dict(zip(costs.names, map(int, row), strict=True))
        lost = {name: costs.dense[i] - row[i] for i, name in enumerate(costs.names)}
        elements = 0
        for tensor, shape in groups.shapes.items():
            lengths = list(shape)
            for group in groups:
                for member in group.members:
                    if member.tensor == tensor:
                        gone = int(lost[group.name]) * member.index.shape[1]
                        lengths[member.axis] -= gone
            elements += int(np.prod(lengths))
        live = 0
        for extent in groups.operations:
            here = extent.fixed
            for (group,), all_of_it in extent.elements.items():
                here += all_of_it // groups[group].channels * counts[group]
            live = max(live, here)
        assert bytes_ == 4 * (elements + live)
    # Every whole count lies on the curve.
    assert costs.continuous_cost("memory", kept.astype(float)) == pytest.approx(memory)


def test_the_made_up_latency_has_stairs_a_knee_and_a_constant():
    stairs = Stairs(np.array([32, 16]))
    assert stairs(np.array([9, 8])) == stairs(np.array([16, 8]))
    step = stairs(np.array([16, 8])) - stairs(np.array([8, 8]))
    assert stairs(np.array([24, 8])) - stairs(np.array([16, 8])) == 3 * step
    assert stairs(np.array([0, 0])) == 100
