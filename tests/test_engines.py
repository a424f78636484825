"""Engines: their answers, their refusals, and what their profiles say."""

import shutil
import sys

import numpy as np
import pytest
import torch
from fake_engine import CONSTANT, FakeEngine
from torch import nn

from autoprune.config import LatencyConfig
from autoprune.errors import ExportError, UserError
from autoprune.latency.engines import (
    ENGINES,
    Setting,
    check_answers,
    check_setting,
    setting_of,
)
from autoprune.latency.pytorch import distinct
from autoprune.latency.timing import MOST_ROUNDS, Turns, time_in_turns

EXAMPLE = torch.zeros(1, 3, 8, 8)


def network(width: int = 16, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, groups=width),
            nn.Conv2d(width, 24, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 4),
        )


def setting(engine: str = "fake", **changes) -> Setting:
    values = {"engine": engine, "batch": 1, "threads": 1, "precision": "float32"}
    return Setting(**(values | changes))


@pytest.fixture(scope="module")
def onnx_network():
    """One network in ONNX Runtime, since exporting takes seconds."""
    return ENGINES["onnxruntime"].load(
        network(), EXAMPLE, setting("onnxruntime", batch=2)
    )


def test_a_network_in_onnxruntime_answers_as_in_pytorch(onnx_network):
    inputs = torch.from_numpy(onnx_network.arrays["images"])
    assert len(inputs) == 2
    with torch.no_grad():
        expected = network().eval()(inputs)
    torch.testing.assert_close(
        onnx_network.outputs()[0], expected, rtol=1e-4, atol=1e-6
    )
    assert onnx_network.seconds() > 0


def test_every_layer_has_its_kernel_in_the_profile_of_onnxruntime(
    onnx_network, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    kernels = onnx_network.kernels()
    found = [(k.layer, k.weight) for k in kernels if k.layer is not None]
    expected = [
        (name, tuple(module.weight.shape))
        for name, module in network().named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert found == expected
    assert all(kernel.seconds >= 0 for kernel in kernels)
    assert list(tmp_path.iterdir()) == []


def test_openvino_answers_as_pytorch_and_has_a_kernel_for_every_layer():
    pytest.importorskip("openvino", reason="an extra of its own")
    engine = ENGINES["openvino"]
    for precision in engine.precisions:
        loaded = engine.load(
            network(), EXAMPLE, setting("openvino", batch=2, precision=precision)
        )
        assert loaded.outputs()[0].shape == (2, 4)
        assert loaded.seconds() > 0
        layers = [kernel.layer for kernel in loaded.kernels() if kernel.layer]
        assert layers == ["0", "3", "4", "8"]


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_helps(
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        check_setting(setting("openvino"))
    with pytest.raises(UserError, match="pip install openvino"):
        ENGINES["openvino"].load(network(), EXAMPLE, setting("openvino"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_eager_pytorch_leaves_the_network_and_its_threads_as_found(precision):
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    n_threads = torch.get_num_threads()
    loaded = ENGINES["torch"].load(
        model, EXAMPLE, setting("torch", precision=precision, threads=2)
    )
    assert loaded.seconds() > 0
    assert loaded.kernels() is None
    assert torch.get_num_threads() == n_threads
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("share", [1e-3, float("nan"), float("inf")])
def test_an_engine_with_other_answers_is_refused_by_name_and_difference(share):
    with pytest.raises(UserError, match="fake answers otherwise than PyTorch") as error:
        FakeEngine(error=share).load(network(), EXAMPLE, setting())
    assert f"{share:.1e}" in str(error.value)
    assert error.value.argument == "latency.engine"


def test_answers_may_be_as_far_off_as_the_precision_is_coarse():
    expected = [torch.tensor([1.0, -10.0])]
    near = [torch.tensor([1.2, -10.0])]
    check_answers(setting(precision="bfloat16"), expected, near)
    with pytest.raises(UserError, match=r"2\.0e-02"):
        check_answers(setting(), expected, near)


def test_answers_that_are_not_numbers_in_pytorch_have_to_be_the_same():
    expected = [torch.tensor([1.0, float("nan"), float("inf")])]
    check_answers(setting(), expected, expected)
    with pytest.raises(UserError):
        check_answers(setting(), expected, [torch.tensor([1.0, float("nan"), 5.0])])


def test_answers_of_another_number_or_shape_are_refused():
    with pytest.raises(UserError, match="1 outputs"):
        check_answers(setting(), [torch.ones(2), torch.ones(2)], [torch.ones(2)])
    with pytest.raises(UserError, match="differ by inf"):
        check_answers(setting(), [torch.ones(2)], [torch.ones(1)])


def test_what_onnx_cannot_express_is_told_in_one_line_and_nothing_is_printed(capfd):
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).abs().sort(stable=True)[0]

    with pytest.raises(ExportError, match="ONNX can't express") as error:
        ENGINES["onnxruntime"].load(Spectrum(), EXAMPLE, setting("onnxruntime"))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().out == ""


def test_a_precision_that_the_code_does_not_bear_is_told_in_one_line():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x * torch.ones(1, 3, 1, 1))

    with pytest.raises(UserError, match=r"torch can't run .* in bfloat16") as error:
        ENGINES["torch"].load(Mixed(), EXAMPLE, setting("torch", precision="bfloat16"))
    assert "\n" not in str(error.value)


def test_a_batch_of_a_network_that_takes_none_is_refused():
    class Alone(nn.Module):
        def forward(self, x):
            return x.reshape(1, -1)

    with pytest.raises(UserError, match=r"latency\.batch.*got 4"):
        FakeEngine().load(Alone(), EXAMPLE, setting(batch=4))
    assert FakeEngine().load(Alone(), EXAMPLE, setting()).exact_seconds == CONSTANT


def test_an_engine_that_cannot_express_a_network_says_so():
    with pytest.raises(ExportError, match="no such operation"):
        FakeEngine(refuses="no such operation").load(network(), EXAMPLE, setting())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "onnxrutime"}, "did you mean 'onnxruntime'"),
        ({"precision": "bfloat16"}, r"computes in float32 .* got 'bfloat16'"),
        ({"threads": 10_000}, r"latency\.threads: must be from 1 to \d+"),
        ({"batch": 0}, r"latency\.batch: must be at least 1"),
    ],
)
def test_what_no_network_could_be_measured_with_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_setting(setting(**({"engine": "onnxruntime"} | changes)))


def test_a_setting_without_threads_has_those_of_pytorch():
    threads = torch.get_num_threads()
    assert setting_of(LatencyConfig()) == setting("onnxruntime", threads=threads)
    assert setting_of(LatencyConfig(threads=1)).threads == 1


def test_a_fake_engine_climbs_in_stairs_of_its_tile():
    engine = FakeEngine(width=8)
    times = [
        engine.load(network(width), EXAMPLE, setting()).exact_seconds
        for width in range(9, 25)
    ]
    assert len(set(times[:8])) == 1
    assert len(set(times[8:])) == 1
    assert times[8] > times[7]


def test_a_fake_engine_has_a_knee_below_which_moving_channels_takes_longest():
    engine = FakeEngine(width=1)
    times = [
        engine.load(
            nn.Conv2d(n, n, 1), torch.zeros(1, n, 8, 8), setting()
        ).exact_seconds
        for n in (4, 8, 400, 800)
    ]
    narrow, wider, wide, widest = (time - CONSTANT for time in times)
    assert wider / narrow == pytest.approx(2)
    assert widest / wide == pytest.approx(4)


def test_networks_take_turns_until_their_passes_add_up_to_the_time():
    calls = []

    class Counting:
        def __init__(self, name, seconds):
            self.name = name
            self.length = seconds

        def seconds(self):
            calls.append(self.name)
            return self.length

        def kernels(self):
            return None

    turns = time_in_turns([Counting("dense", 0.3), Counting("pruned", 0.1)], 10.0)
    assert calls == ["dense", "pruned"] * (len(calls) // 2)
    assert turns.seconds.shape == (20, 2)
    assert len(calls) == 2 * (5 + 20)
    assert turns.medians == pytest.approx([0.3, 0.1])
    once = time_in_turns([Counting("dense", 0.3)], 0.0)
    assert once.seconds.shape == (1, 1)
    many = time_in_turns([Counting("dense", 1e-9)], 10.0)
    assert len(many.seconds) == MOST_ROUNDS


def test_ratios_are_of_passes_of_the_same_round():
    # Everything slows down as time goes on; the second network takes half.
    dense = np.array([1.0, 2.0, 3.0, 40.0])
    turns = Turns(np.stack([dense, dense / 2], axis=1))
    assert turns.ratios == pytest.approx([1.0, 0.5])


def test_noise_changes_a_pass_and_not_the_median_of_many():
    engine = FakeEngine(noise=0.1)
    loaded = engine.load(network(), EXAMPLE, setting())
    assert loaded.seconds() != loaded.seconds()
    turns = time_in_turns([loaded], 1.0)
    assert turns.medians[0] == pytest.approx(loaded.exact_seconds, rel=0.03)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
def test_compiled_pytorch_answers_as_eager_does():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    loaded = ENGINES["compiled"].load(model, torch.ones(1, 4), setting("compiled"))
    expected = model(loaded.inputs.tensors()[0])
    torch.testing.assert_close(loaded.outputs()[0], expected)
    assert loaded.seconds() > 0


def test_networks_of_one_class_are_compiled_each_by_itself():
    functions = []
    for network in (nn.Linear(2, 2), nn.Linear(2, 3)):
        functions.append(distinct(lambda x, network=network: network(x)))
    first, second = functions
    assert first.__code__ != second.__code__
    assert first(torch.ones(1, 2)).shape == (1, 2)
    assert second(torch.ones(1, 2)).shape == (1, 3)
