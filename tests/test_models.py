"""Networks by name, and weights that are refused before they do harm."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoprune.data.checkpoints import load_weights, read_state_dict
from autoprune.data.models import MODELS, build, model_names
from autoprune.errors import UserError
from autoprune.runs import file_stem


def macs(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", MODELS)
def test_every_cifar_network_classifies_32x32_images(name):
    with torch.device("meta"):
        model = build(name, n_classes=7).eval()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 40.55),
        ("resnet32", 68.86),
        ("resnet56", 125.49),
        ("resnet110", 252.89),
        ("vgg16_bn_cifar", 313.20),
    ],
)
def test_macs_are_those_of_the_literature(name, millions):
    with torch.device("meta"):
        model = build(name).eval()
    assert macs(model) == pytest.approx(millions * 1e6, abs=0.005e6)


def test_networks_compute_finite_values_from_the_start():
    torch.manual_seed(0)
    for name in ("resnet20", "resnet20_b", "mobilenet_v2_cifar"):
        assert build(name)(torch.randn(4, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    "name",
    ["resnet18", "googlenet", "inception_v3", "vit_b_16", "swin_t", "squeezenet1_1"],
)
def test_torchvision_networks_get_a_head_of_the_wanted_width_and_no_auxiliary_heads(
    name,
):
    side = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        model = build(name, n_classes=7)
        assert model(torch.empty(2, 3, side, side)).shape == (2, 7)


def test_model_names_are_classifiers_only():
    names = model_names()
    assert {"resnet20", "vgg16_bn_cifar", "resnet50", "convnext_tiny"} <= set(names)
    assert not any(
        "rcnn" in name or "segmentation" in name or "raft" in name for name in names
    )
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("resnet65", "resnet56"), ("mobilenetv2_cifar", "mobilenet_v2_cifar")],
)
def test_unknown_model_offers_the_nearest(given, nearest):
    with pytest.raises(
        UserError, match=f"unknown model '{given}'; did you mean .*{nearest}"
    ):
        build(given)


# The user's own factories


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module into the current folder, which isn't on the import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if path not in ("", os.getcwd())]
    )

    def write(name: str, source: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(f"from torch import nn\n{source}\n")

    return write


@pytest.mark.parametrize(
    ("argument", "width"), [("n_classes", 7), ("num_classes=3", 7), ("", 5)]
)
def test_factory_gets_the_number_of_classes_if_it_takes_it(own_module, argument, width):
    name = argument.partition("=")[0]
    own_module(
        f"own_{name}", f"def net({argument}):\n    return nn.Linear(4, {name or 5})"
    )
    assert build(f"own_{name}:net", n_classes=7).out_features == width


def test_a_folder_of_the_users_comes_before_an_installed_package_of_its_name(
    tmp_path, monkeypatch
):
    for home, width in (("installed", 3), ("here", 5)):
        package = tmp_path / home / "agents_of_somebody"
        package.mkdir(parents=True)
        (package / "net.py").write_text(
            f"from torch import nn\ndef make(): return nn.Linear(4, {width})\n"
        )
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *sys.path[1:]])
    assert build("agents_of_somebody.net:make").out_features == 5


@pytest.mark.parametrize(
    "path",
    ["no_such_module:net", "own_net:missing", "own_net:", ":net", ".own_net:net"],
)
def test_factory_that_cannot_be_imported_is_refused(own_module, path):
    own_module("own_net", "def net(): ...")
    with pytest.raises(
        UserError,
        match=r"(can't import|has no '\w*'|Empty module name).*; expected package.module:",
    ):
        build(path)


def test_factory_must_be_callable_and_return_a_network(own_module):
    own_module("own_other", "number = 3\ndef text():\n    return 'text'")
    with pytest.raises(
        UserError, match="'own_other:number' is a int, expected a callable"
    ):
        build("own_other:number")
    with pytest.raises(
        UserError, match=r"own_other:text must return a torch.nn.Module, got str"
    ):
        build("own_other:text")


@pytest.mark.parametrize("way", ["./own.py", "own.py", "{folder}/own.py"])
def test_a_file_of_ones_own_may_be_named_by_its_path(own_module, tmp_path, way):
    own_module("beside", "def layer(n): return nn.Linear(4, n)")
    own_module(
        "own", "from beside import layer\ndef net(n_classes): return layer(n_classes)"
    )
    model = build(way.format(folder=tmp_path) + ":net", n_classes=7)
    assert model.out_features == 7


def test_a_file_of_a_package_may_import_from_its_package(tmp_path, monkeypatch):
    package = tmp_path / "nets_of_mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text("from torch.nn import Linear\n")
    (package / "whole.py").write_text(
        "from .parts import Linear\ndef net(): return Linear(4, 6)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert build(f"{package}/whole.py:net").out_features == 6


def test_a_file_called_like_a_module_of_pythons_is_still_the_one_that_is_meant(
    own_module,
):
    own_module("json_", "def net(): return nn.Linear(4, 6)")
    os.rename("json_.py", "json.py")
    assert build("./json.py:net").out_features == 6
    import json

    assert json.loads("[1]") == [1]


def test_runs_of_a_network_in_a_file_are_named_after_the_file_alone():
    names = "./own.py:net", "/home/me/own.py:net", "nets.own:net", "timm/resnet18"
    assert [file_stem(name, "macs=50%") for name in names] == [
        "own.py-net-macs-50",
        "own.py-net-macs-50",
        "nets.own-net-macs-50",
        "timm-resnet18-macs-50",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./owm.py:net", r"no file './owm\.py'; did you mean 'own\.py'\?"),
        ("./own.txt:net", r"'\./own\.txt' must be a file that ends in \.py"),
        ("./own.py:nett", r"'\./own\.py' has no 'nett'; did you mean \./own\.py:net\?"),
        ("own:nett", r"'own' has no 'nett'; did you mean own:net\?"),
        ("./own.py:", r"'\./own\.py' has no ''; expected package\.module:factory or"),
        ("./own.py:number", r"'\./own\.py:number' is a int, expected a callable"),
        ("./own.py:made", r"own\.py:made is one network; expected a callable that"),
        ("./own.py:pair", r"own\.py:pair must return a torch\.nn\.Module, got tuple"),
        (
            "./own.py:broken",
            r"own\.py:broken failed \(ZeroDivisionError: division by zero, own\.py "
            r"line 6\)",
        ),
        (
            "./wrong.py:net",
            r"can't import '\./wrong\.py:net' \(NameError: .*, wrong\.py line 2\)",
        ),
    ],
)
def test_what_is_wrong_with_a_factory_is_told_in_one_line(own_module, name, message):
    own_module(
        "own",
        "def net(): return nn.Linear(4, 6)\n"
        "number = 3\n"
        "made = net()\n"
        "def pair(): return net(), net()\n"
        "def broken(): return 1 / 0",
    )
    (Path.cwd() / "own.txt").write_text("no Python")
    own_module("wrong", "no_such_name")
    with pytest.raises(UserError, match=message) as refusal:
        build(name)
    assert refusal.value.argument == "model"
    assert "\n" not in str(refusal.value)


# Weights


class Tiny(nn.Module):
    def __init__(self, n_classes: int = 10, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, n_classes)


@pytest.fixture
def given() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {key: value + 1 for key, value in Tiny().state_dict().items()}


def assert_loads(path, expected: dict[str, torch.Tensor]) -> None:
    model = Tiny()
    load_weights(model, path)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_safetensors_are_loaded(tmp_path, given):
    save_file(given, tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", given)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_are_loaded_with_or_without_wrapper_and_prefix(
    tmp_path, given, wrapper, prefix
):
    prefixed = {prefix + key: value for key, value in given.items()}
    torch.save(
        {wrapper: prefixed, "epoch": 3} if wrapper else prefixed,
        tmp_path / "weights.pt",
    )
    assert_loads(tmp_path / "weights.pt", given)


def test_a_layer_that_is_called_module_keeps_its_name(tmp_path):
    torch.save(
        {"module.weight": torch.ones(1), "head.weight": torch.ones(1)},
        tmp_path / "weights.pt",
    )
    assert list(read_state_dict(tmp_path / "weights.pt")) == [
        "module.weight",
        "head.weight",
    ]


def test_old_files_without_batch_counters_are_loaded(tmp_path, given):
    del given["bn.num_batches_tracked"]
    torch.save(given, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", given)


def refused(tmp_path, weights: dict, model: nn.Module, message: str) -> None:
    """Asserts that `weights` are refused and `model` is left as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=message):
        load_weights(model, tmp_path / "weights.pt")
    assert all(
        torch.equal(before[key], value) for key, value in model.state_dict().items()
    )


def test_head_of_another_width_is_named_with_both_numbers(tmp_path, given):
    message = r"has a head of 10 classes \(head\), the data has 7; give weights trained on these classes"
    refused(tmp_path, given, Tiny(n_classes=7), message)


def test_weights_of_another_architecture_list_what_differs(tmp_path, given):
    refused(
        tmp_path,
        given,
        Tiny(width=5),
        r"7 of another shape \(first: conv.weight is \(4, 3, 3, 3\), not \(5, 3, 3, "
        r"3\)",
    )
    fewer = {key: value for key, value in given.items() if key != "conv.bias"}
    refused(
        tmp_path,
        fewer,
        Tiny(),
        r"for another architecture: 1 missing \(first: conv.bias\); give the model",
    )
    refused(
        tmp_path,
        given | {"more": torch.ones(1)},
        Tiny(),
        r"1 unexpected \(first: more\); give the model",
    )
    both = fewer | {"head.weight": torch.ones(3, 4)}
    refused(
        tmp_path,
        both,
        Tiny(),
        r"1 missing .*; 1 of another shape \(first: head.weight is \(3, 4\), not \(10, "
        r"4\)\)",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, given, value):
    given["bn.running_var"][2] = value
    refused(
        tmp_path,
        given,
        Tiny(),
        "bn.running_var in '.*weights.pt' holds NaN or infinite values",
    )


def test_missing_file_is_named():
    with pytest.raises(UserError, match=r"weights: no file '/nowhere/weights.pt'"):
        load_weights(Tiny(), "/nowhere/weights.pt")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_file_that_wants_to_execute_code_is_refused_without_executing_it(tmp_path):
    torch.save(
        {"weight": torch.ones(1), "trap": Trap(tmp_path / "sprung")},
        tmp_path / "weights.pt",
    )
    with pytest.raises(
        UserError, match=r"weights.pt' holds objects that execute code when loaded"
    ):
        read_state_dict(tmp_path / "weights.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", bytes(200)])
def test_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError,
        match=f"{name}' (is neither safetensors nor torch.save's|holds objects)",
    ):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"weight": 3}, torch.ones(2)])
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_state_dict(tmp_path / "weights.pt")


def test_timms_models_are_built_by_name_and_unknown_ones_offer_the_nearest(monkeypatch):
    model = build("timm/mobilenetv3_small_050", n_classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(
        UserError, match=r"timm has no model 'resnet81'; did you mean timm/resnet"
    ):
        build("timm/resnet81")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError,
        match=r"^model: timm/resnet18 needs timm; install it with: pip install timm$",
    ):
        build("timm/resnet18")
