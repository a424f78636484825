"""Multiples that suit the engine: of every axis, of every kind of layer, and of a run."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from toys import fake_env, traced

from autoprune.cli.main import main
from autoprune.config import SearchConfig
from autoprune.costs.constraints import search_limits
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.costs.widths import suited_multiples, tile_of_processor
from autoprune.data.networks import conv_bn
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.latency.onnx_runtime import OnnxRuntime
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace

IMAGE = torch.zeros(1, 3, 8, 8)
TINY = ["--model", "tests.tiny:network", "--weights", "none", "--baselines", "none"]


def network(*body: nn.Module) -> nn.Module:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


def multiples(model: nn.Module, tile: int, **options) -> list[int]:
    model(IMAGE)
    return list(suited_multiples(trace(model.eval(), IMAGE), tile, **options).values())


def conv(n_in: int, n_out: int, n_groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(n_in, n_out, 3, padding=1, groups=n_groups)
    return nn.Sequential(layer, nn.ReLU())


class Flattened(nn.Module):
    """Channels of several positions each on a linear layer's inputs."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 48)
        self.hidden = nn.Linear(48 * 9, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(self.stem(x), 3)
        return self.head(self.hidden(x.flatten(1)).relu())


class Shuffled(nn.Module):
    """Channels that four filters each produce."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 256)
        self.body = conv(64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pixel_shuffle(self.stem(x), 2)
        return self.head(self.body(x).mean((2, 3)))


WIDE = {
    "plain": lambda: network(conv(3, 64), conv(64, 96)),
    "depthwise": lambda: network(conv(3, 64), conv(64, 64, 64), conv(64, 96)),
    "whole conv groups": lambda: network(conv(3, 128), conv(128, 128, 32)),
    "positions of conv groups": lambda: network(conv(3, 128), conv(128, 128, 2)),
    "flattened": Flattened,
    "shuffled": Shuffled,
}
"""Networks wide enough for a tile of 16 everywhere."""


@pytest.mark.parametrize("name", WIDE)
def test_every_layer_of_a_network_with_suited_widths_fills_the_tile(name):
    model = WIDE[name]().eval()
    model(IMAGE)
    groups = trace(model, IMAGE)
    space = SearchSpace(CostTable(groups), round_to=suited_multiples(groups, 16))
    generator = np.random.default_rng(0)
    assert min(len(levels) for levels in space.levels) >= 3
    for _ in range(5):
        kept = [int(generator.choice(levels)) for levels in space.levels]
        channels = {g.name: torch.arange(n) for g, n in zip(groups, kept, strict=True)}
        pruned = prune(model, groups, channels)
        for layer in pruned.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.out_channels % 16 == 0
                assert layer.in_channels == 3 or layer.in_channels % 16 == 0
                # What is a convolution of its own fills the tile by itself.
                if layer.groups == 2:
                    assert layer.in_channels % 32 == 0
            if isinstance(layer, nn.Linear):
                assert layer.in_features % 16 == 0


@pytest.mark.parametrize("tile", [4, 8, 16])
@pytest.mark.parametrize("channels", [2, 3, 6, 8, 15, 16, 24, 32, 40, 48, 64])
def test_a_narrow_group_gets_the_largest_part_of_the_tile_that_leaves_three_levels(
    channels, tile
):
    (multiple,) = multiples(network(conv_bn(3, channels)), tile)
    parts = [part for part in range(1, tile + 1) if tile % part == 0]
    least = math.ceil(0.1 * channels)
    enough = []
    for part in parts:
        levels = {n for n in range(least, channels) if n % part == 0} | {channels}
        if len(levels) >= 3:
            enough.append(part)
    assert multiple == max(enough, default=1)


def test_a_depthwise_convolutions_channels_fill_the_tile_where_two_levels_are_left():
    plain = multiples(network(conv(3, 32), conv(32, 32)), 16)
    depthwise = multiples(network(conv(3, 32), conv(32, 32, 32)), 16)
    assert plain == [8, 8]
    assert depthwise == [16]


def test_limits_that_leave_no_choice_make_multiples_finer():
    model = network(conv(3, 64))
    assert multiples(model, 16) == [16]
    assert multiples(model, 16, max_sparsity=0.3) == [8]
    assert multiples(model, 16, min_width={"0.0": 62}) == [1]


def test_heads_and_their_width_go_by_twos_and_what_lies_beside_them_by_tiles():
    model = nn.TransformerEncoderLayer(64, 8, 128, batch_first=True).eval()
    tokens = torch.zeros(1, 5, 64)
    groups = trace(nn.Sequential(model, nn.Linear(64, 5)).eval(), tokens)
    found = suited_multiples(groups, 16)
    cells = {name for pair in groups.cells for name in pair}
    assert cells
    assert {found[name] for name in cells} == {2}
    assert {found[name] for name in found.keys() - cells} == {16}


def test_a_number_stands_for_all_groups_and_patterns_go_before_what_suits():
    model = network(conv(3, 64), conv(64, 96))
    model(IMAGE)
    groups = trace(model.eval(), IMAGE)
    fixed = search_limits(groups, SearchConfig(round_to=3), tile=16)["round_to"]
    assert set(fixed.values()) == {3}
    config = SearchConfig(round_to_for="0.0=6")
    mixed = search_limits(groups, config, tile=16)["round_to"]
    assert list(mixed.values()) == [6, 16]


@pytest.mark.parametrize(
    ("instructions", "tile"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4)]
)
def test_the_tile_is_that_of_the_processor_for_engines_and_for_the_library(
    instructions, tile, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    assert tile_of_processor().channels == tile
    assert OnnxRuntime().tile("float32") == tile
    env = fake_env("wide", round_to="auto")
    unsaid = LayerPruningEnv(*traced("wide")[:2], env.proxy)
    for space in (env.space, unsaid.space):
        assert space.round_to == suited_multiples(env.groups, tile)


def test_an_environments_widths_get_finer_where_the_budget_needs_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    coarse = fake_env("wide", round_to="auto").space
    share = coarse.cost(coarse.low) / coarse.cost(coarse.high)
    fine = fake_env("wide", round_to="auto", budget=f"macs={0.9 * share:.4f}").space
    assert fine.cost(fine.low) < coarse.cost(coarse.low)
    assert isinstance(fine.round_to, dict)
    assert isinstance(coarse.round_to, dict)
    for name, multiple in fine.round_to.items():
        assert coarse.round_to[name] % multiple == 0
    with pytest.raises(UserError, match="below the reachable floor"):
        fake_env("wide", round_to="auto", budget="macs=2")


@pytest.mark.parametrize("value", [0, -2, "automatic", "", True])
def test_anything_but_auto_and_a_number_is_refused(value):
    with pytest.raises(UserError, match="round_to: must be auto or a number"):
        SearchConfig(round_to=value)


def test_an_environment_refuses_another_word_than_auto():
    with pytest.raises(UserError, match="must be auto or a number of at least 1"):
        fake_env("wide", round_to="automatic")


def test_a_run_says_what_its_widths_suit_and_keeps_to_it_on_another_machine(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    run, again, new = tmp_path / "run", tmp_path / "again", tmp_path / "new"
    search = ["search", *TINY, "--agent", "uniform", "--budget", "macs=60%"]
    assert main([*search, "--out", str(run)]) == 0
    found = json.loads((run / "results.json").read_text())
    assert found["widths"] == {
        "channels": 16,
        "engine": "onnxruntime",
        "processor": "AVX-512",
        "multiples": {"0.0": 2, "1.0": 4, "2.0": 4},
    }
    assert "widths: multiples of 4, in some groups of 2" in capsys.readouterr().err
    assert "(onnxruntime on AVX-512)" in (run / "report.html").read_text()
    kept = json.loads((run / "allocation.json").read_text())["kept"]
    assert kept["1.0"] % 4 == kept["2.0"] % 4 == kept["0.0"] % 2 == 0
    # As if it had been killed before the search, and went on elsewhere.
    shutil.copytree(run, again)
    for name in ("allocation.json", "results.json"):
        (again / name).unlink()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert main(["search", "--resume", "--out", str(again)]) == 0
    resumed = json.loads((again / "results.json").read_text())
    assert resumed["widths"] == found["widths"]
    assert json.loads((again / "allocation.json").read_text())["kept"] == kept
    # A new run with the same config is one of this machine.
    config = ["search", "--config", str(run / "config.yaml"), "--out", str(new)]
    assert main(config) == 0
    assert json.loads((new / "results.json").read_text())["widths"]["channels"] == 8


def test_a_run_with_a_number_depends_on_no_processor(tmp_path, monkeypatch):
    def refuse() -> str:
        raise AssertionError("asked for the processor")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", refuse)
    run = tmp_path / "run"
    search = ["search", *TINY, "--agent", "uniform", "--round_to", "4"]
    assert main([*search, "--out", str(run)]) == 0
    found = json.loads((run / "results.json").read_text())["widths"]
    assert found == {"multiples": dict.fromkeys(("0.0", "1.0", "2.0"), 4)}
    assert "tile" not in yaml.safe_load((run / "config.yaml").read_text())
