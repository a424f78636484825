"""The latency model: fitted to few networks of an engine that has no clock, right on
others, and a metric under which budgets can be met exactly.
"""

import functools
import json

import numpy as np
import pytest
import torch
from fake_engine import FakeEngine, FakeLoaded
from hypothesis import given
from hypothesis import strategies as st
from nets import Residual, images
from torch import nn

from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.data.networks import conv_bn
from autoprune.errors import UserError
from autoprune.latency.engine_protocol import Setting
from autoprune.latency.kernels import EXACT, Rounding, WorkTable
from autoprune.latency.model import LatencyModel
from autoprune.latency.profiling import (
    LARGEST_NOISE,
    N_FITTED,
    NetworkTimer,
    profile_latency,
)
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace

SIZE = 16
SETTING = Setting("fake", 2, 1, "float32")


def network() -> nn.Module:
    """Convolutions of several kinds and a linear layer, wide enough for stairs."""
    torch.manual_seed(0)
    return nn.Sequential(
        *conv_bn(3, 48),
        *conv_bn(48, 48, groups=48),
        *conv_bn(48, 64, stride=2),
        *conv_bn(64, 96, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 40),
        nn.Linear(40, 10),
    ).eval()


@functools.cache
def traced():
    model = network()
    groups = trace(model, images(1, SIZE))
    return model, groups, SearchSpace(CostTable(groups), round_to=4)


def profiled(engine: FakeEngine, seed: int = 0) -> LatencyModel:
    model, groups, space = traced()
    timer = NetworkTimer(model, groups, images(1, SIZE), engine, SETTING)
    return profile_latency(timer, space, seed, seconds=0.01).model


@functools.cache
def fitted() -> LatencyModel:
    return profiled(FakeEngine())


def exact_nanoseconds(engine: FakeEngine, kept: np.ndarray) -> float:
    """What the engine takes for an allocation, from the pruned network itself."""
    model, groups, _ = traced()
    channels = {
        group.name: torch.arange(count)
        for group, count in zip(groups, kept.tolist(), strict=True)
    }
    pruned = prune(model, groups, channels)
    loaded = engine.load(pruned, images(1, SIZE), SETTING)
    assert isinstance(loaded, FakeLoaded)
    return 1e9 * loaded.exact_seconds


def random_counts(space: SearchSpace, n: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    columns = [generator.choice(levels, n) for levels in space.levels]
    return np.stack(columns, 1)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_networks_that_were_not_measured_are_predicted(width):
    engine = FakeEngine(width=width)
    model = profiled(engine)
    _, _, space = traced()
    errors = []
    for kept in random_counts(space, 12, seed=7):
        errors.append(abs(model(kept) / exact_nanoseconds(engine, kept) - 1))
    assert np.median(errors) < 0.05
    assert model.error.median < 0.05


class Mistaken(FakeEngine):
    """Says that it works in other channels than it does."""

    def tile(self, precision: str) -> int:
        return 8


@pytest.mark.parametrize("width", [8, 16, 32])
def test_the_channels_in_which_an_engine_works_are_found(width):
    assert profiled(Mistaken(width=width)).fit.rounding == Rounding(width)


def test_tiles_that_are_halved_for_narrow_layers_are_found():
    assert profiled(FakeEngine(width=32, is_halved=True)).fit.rounding == Rounding(
        32, is_halved=True
    )


def test_narrow_layers_take_the_next_power_of_two_and_wide_ones_whole_tiles():
    lengths = np.array([1.0, 3, 4, 5, 8, 9, 15.5, 16, 17, 33])
    halved = Rounding(16, is_halved=True).up(lengths)
    assert halved.tolist() == [1, 4, 4, 8, 8, 16, 16, 16, 32, 48]
    assert Rounding(16).up(lengths).tolist() == [16] * 8 + [32, 48]
    assert EXACT.up(lengths) is lengths


def test_work_is_what_the_layers_of_the_pruned_network_have_to_do():
    model, groups, space = traced()
    work = WorkTable(groups, space.costs)
    for kept in random_counts(space, 4, seed=1):
        channels = {
            group.name: torch.arange(count)
            for group, count in zip(groups, kept.tolist(), strict=True)
        }
        pruned = prune(model, groups, channels)
        amounts = dict(zip(work.labels, work.amounts(kept, EXACT), strict=True))
        computed = sum(
            value
            for (signature, amount), value in amounts.items()
            if amount == "compute" and signature.kind != "product"
        )
        assert computed == CostTable(trace(pruned, images(1, SIZE))).macs({})


def test_costs_are_whole_nanoseconds_of_one_allocation_or_many():
    model = fitted()
    _, _, space = traced()
    kept = random_counts(space, 5, seed=2)
    many = model(kept)
    assert many.dtype == np.int64
    for row, cost in zip(kept, many, strict=True):
        assert model(row) == cost
        assert type(model(row)) is int
        named = dict(zip(space.costs.names, row.tolist(), strict=True))
        assert model(named) == cost
    dense = 1e9 * model.dense_seconds
    assert model({}) == pytest.approx(dense, rel=0.02)


@given(st.data())
def test_a_count_that_grows_never_makes_the_prediction_fall(data):
    model = fitted()
    _, _, space = traced()
    kept = np.array([data.draw(st.integers(1, int(n))) for n in space.costs.dense])
    group = data.draw(st.integers(0, len(kept) - 1))
    more = kept.copy()
    more[group] = data.draw(
        st.integers(int(kept[group]), int(space.costs.dense[group]))
    )
    assert model(more) >= model(kept)
    assert model.continuous(more) >= model.continuous(kept)
    # Half a tile is no whole one.
    assert model.continuous(kept) <= model(kept) + 1


def test_a_model_that_was_written_is_read_as_it_was():
    model = fitted()
    _, groups, space = traced()
    text = json.dumps(model.to_json())
    read = LatencyModel.from_json(json.loads(text), WorkTable(groups, space.costs))
    kept = random_counts(space, 20, seed=3)
    assert (read(kept) == model(kept)).all()
    assert read.setting == model.setting
    assert read.error == model.error


def test_more_networks_are_measured_where_the_prediction_errs():
    calm = fitted()
    noisy = profiled(FakeEngine(noise=0.1))
    assert calm.n_fitted == N_FITTED
    assert noisy.n_fitted > N_FITTED


def test_timings_that_tell_nothing_are_refused_in_one_line():
    with pytest.raises(UserError, match="two timings of the same network") as refusal:
        profiled(FakeEngine(noise=3 * LARGEST_NOISE))
    assert "\n" not in str(refusal.value)


def test_profiling_leaves_the_network_as_it_was():
    model, _, _ = traced()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profiled(FakeEngine())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_residual_streams_and_attributes_are_counted_too():
    model = Residual().eval()
    groups = trace(model, images(1, SIZE))
    space = SearchSpace(CostTable(groups), round_to=1)
    engine = FakeEngine(width=2)
    timer = NetworkTimer(model, groups, images(1, SIZE), engine, SETTING)
    assert profile_latency(timer, space, seconds=0.01).model.error.median < 0.05
