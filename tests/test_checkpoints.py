"""Checkpoints as training scripts leave them: found, laid beside the network, refused."""

import argparse
import pathlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.data.checkpoints import load_weights, read_state_dict
from autoprune.errors import UserError
from autoprune.structure.wrappers import unwrap


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, width, 3),
            bn=nn.BatchNorm2d(width),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(width, 5),
        )
    )


def trained(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in network().state_dict().items():
        noise = torch.rand(value.shape, generator=generator)
        weights[name] = noise if value.is_floating_point() else value + seed
    return weights


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def loaded(path, key: str = "") -> dict[str, torch.Tensor]:
    model = network()
    load_weights(model, f"{path}{key}")
    return model.state_dict()


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def optimizer_state() -> dict:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "around",
    [
        lambda w: {
            "state_dict": prefixed("model.", w),
            "hyper_parameters": {"lr": 1.0},
        },
        lambda w: prefixed("_orig_mod.", w),
        lambda w: prefixed("module.", w),
        lambda w: prefixed("module._orig_mod.", w),
        lambda w: prefixed("model.module.", w),
        lambda w: prefixed("anything.at.all.", w),
        lambda w: {"net": w, "epoch": 3},
        lambda w: {"model_ema": w, "optimizer": optimizer_state()},
        lambda w: {"a": {"b": {"c": w}}, "rng": torch.zeros(16, dtype=torch.uint8)},
        lambda w: {"ema": {"decay": 0.9, "shadow": prefixed("module.", w)}},
        lambda w: w | {"epoch": 3},
        # torch.compile of one part only.
        lambda w: {n.replace("conv.", "conv._orig_mod."): v for n, v in w.items()},
    ],
)
def test_the_one_set_that_fits_is_found_whatever_its_key_and_prefix(tmp_path, around):
    weights = trained()
    torch.save(around(weights), tmp_path / "c.pt")
    assert_equal(loaded(tmp_path / "c.pt"), weights)


def test_an_averaged_model_is_loaded_and_what_is_left_out_is_told(tmp_path):
    model = network()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "c.pt")
    other = network()
    (remark,) = load_weights(other, tmp_path / "c.pt")
    assert_equal(other.state_dict(), model.state_dict())
    assert "begins with 'module.'" in remark
    assert "1 other tensors are left out (first: n_averaged)" in remark


def test_what_fits_the_network_is_taken_where_other_sets_do_not(tmp_path):
    weights = trained()
    teacher = network(width=8).state_dict()
    torch.save({"teacher": teacher, "student": weights}, tmp_path / "c.pt")
    assert_equal(loaded(tmp_path / "c.pt"), weights)


def test_of_several_sets_that_fit_one_has_to_be_chosen(tmp_path):
    path = tmp_path / "c.pt"
    plain, averaged = trained(1), trained(2)
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, path)
    with pytest.raises(UserError) as refusal:
        loaded(path)
    assert refusal.value.argument == "weights"
    assert "several sets of weights: state_dict, state_dict_ema" in refusal.value.reason
    assert f"choose one, as in {path}:state_dict" in refusal.value.reason
    assert_equal(loaded(path, ":state_dict"), plain)
    assert_equal(loaded(path, ":state_dict_ema"), averaged)
    with pytest.raises(UserError, match="did you mean 'state_dict_ema'"):
        loaded(path, ":state_dict_emma")


@pytest.mark.parametrize("first", ["", "model."])
def test_names_of_one_set_may_stand_for_two_networks(tmp_path, first):
    path = tmp_path / "c.ckpt"
    plain, averaged = trained(1), trained(2)
    both = prefixed(first, plain) | prefixed("ema_model.", averaged)
    torch.save({"state_dict": both}, path)
    with pytest.raises(UserError, match=r"several sets.*state_dict\.ema_model"):
        loaded(path)
    assert_equal(loaded(path, ":state_dict.ema_model"), averaged)
    with pytest.raises(UserError, match="several sets"):
        load_weights(network(), f"{path}:state_dict" if first else path)
    if first:
        assert_equal(loaded(path, ":state_dict.model"), plain)


def test_the_same_tensors_under_two_keys_leave_nothing_to_choose(tmp_path):
    weights = trained()
    torch.save({"model": weights, "best": weights}, tmp_path / "c.pt")
    assert_equal(loaded(tmp_path / "c.pt"), weights)


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel]
)
def test_a_wrapped_network_takes_plain_weights(tmp_path, wrap):
    weights = trained()
    torch.save(weights, tmp_path / "c.pt")
    wrapped = wrap(network())
    load_weights(wrapped, tmp_path / "c.pt")
    assert_equal(unwrap(wrapped).state_dict(), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_other_precisions_become_the_networks_own_and_it_is_told(
    tmp_path, dtype, ending
):
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in trained().items()
    }
    path = tmp_path / f"c.{ending}"
    (save_file if ending == "safetensors" else torch.save)(weights, path)
    model = network()
    (remark,) = load_weights(model, path)
    found = model.state_dict()["conv.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, weights["conv.weight"].float())
    assert f"in {str(dtype)[6:]}; they are taken as float32" in remark


def test_values_that_the_networks_precision_cannot_hold_are_refused(tmp_path):
    weights = {name: value.double() for name, value in trained().items()}
    weights["head.weight"][0, 0] = 1e300
    weights["bn.num_batches_tracked"] = torch.tensor(3)
    torch.save(weights, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"head\.weight in .* holds NaN or infinite"):
        loaded(tmp_path / "c.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integers_that_were_cast_with_all_weights_are_no_obstacle(tmp_path, dtype):
    cast = {name: value.to(dtype) for name, value in trained().items()}
    torch.save(cast, tmp_path / "cast.pt")
    found = loaded(tmp_path / "cast.pt")
    assert found["bn.num_batches_tracked"].dtype == torch.int64
    assert found["bn.num_batches_tracked"] == 1
    assert torch.equal(found["conv.weight"], cast["conv.weight"].float())


class Indexed(nn.Module):
    """Positions are looked up by a buffer of indices."""

    def __init__(self, first=0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("index", torch.arange(first, first + 1000))


def test_indices_that_a_narrow_float_has_rounded_are_those_of_the_network(tmp_path):
    rounded = {key: value.bfloat16() for key, value in Indexed().state_dict().items()}
    assert not torch.equal(rounded["index"].long(), torch.arange(1000))
    torch.save(rounded, tmp_path / "rounded.pt")
    model = Indexed()
    load_weights(model, tmp_path / "rounded.pt")
    assert torch.equal(model.index, torch.arange(1000))
    # Others can't be told from their rounded values.
    with pytest.raises(UserError, match=r"index in .* is torch\.bfloat16"):
        load_weights(Indexed(first=500), tmp_path / "rounded.pt")


@pytest.mark.parametrize("kind", [list, tuple])
def test_weights_in_a_list_are_found_beside_what_else_it_holds(tmp_path, kind):
    torch.save(kind([{"epoch": 3}, trained(), optimizer_state()]), tmp_path / "both.pt")
    assert_equal(loaded(tmp_path / "both.pt"), trained())
    torch.save(kind([trained(), trained(2)]), tmp_path / "two.pt")
    with pytest.raises(UserError, match="several sets"):
        loaded(tmp_path / "two.pt")
    assert_equal(loaded(tmp_path / "two.pt", ":1"), trained(2))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused_with_the_remedy(tmp_path):
    torch.jit.save(torch.jit.script(network()), tmp_path / "scripted.pt")
    with pytest.raises(UserError, match=r"is TorchScript; load it with torch\.jit"):
        loaded(tmp_path / "scripted.pt")


def test_quantised_weights_are_refused(tmp_path):
    weights = trained()
    weights["head.weight"] = (weights["head.weight"] * 100).to(torch.int8)
    torch.save(weights, tmp_path / "c.pt")
    with pytest.raises(
        UserError, match=r"head\.weight .* is torch.int8, the network's"
    ):
        loaded(tmp_path / "c.pt")


def test_arguments_paths_and_numbers_of_numpy_beside_the_weights_are_no_obstacle(
    tmp_path,
):
    weights = trained()
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs")),
        "best": np.float64(0.9),
        "history": np.arange(3.0),
    }
    torch.save({"model": weights, **beside}, tmp_path / "c.pt")
    assert_equal(loaded(tmp_path / "c.pt"), weights)


def test_where_none_fits_the_nearest_is_named_with_what_differs(tmp_path):
    weights = trained()
    del weights["head.bias"]
    torch.save(
        {"net": prefixed("module.", weights), "x": torch.ones(2)}, tmp_path / "c"
    )
    with pytest.raises(
        UserError,
        match=r"c' \(net\.module\) is for another architecture: 1 missing \(first: "
        r"head\.bias\); give the model that it is of",
    ):
        loaded(tmp_path / "c")


def test_a_missing_file_offers_a_similar_one(tmp_path):
    torch.save(trained(), tmp_path / "best.pt")
    with pytest.raises(
        UserError, match=r"no file '.*bst\.pt'; did you mean '.*best\.pt'"
    ):
        loaded(tmp_path / "bst.pt")


def test_without_a_network_the_largest_set_is_read_and_rivals_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    weights = trained()
    torch.save({"net": prefixed("module.", weights), "step": torch.tensor(3)}, path)
    assert_equal(read_state_dict(path), weights)
    torch.save({"net": weights, "ema": trained(2)}, path)
    with pytest.raises(UserError, match="several sets of weights: net, ema"):
        read_state_dict(path)
    assert_equal(read_state_dict(f"{path}:ema"), trained(2))
    with pytest.raises(UserError, match=r"no weights 'emma'; did you mean 'ema'\? It"):
        read_state_dict(f"{path}:emma")
    torch.save(prefixed("module._orig_mod.", weights), path)
    assert_equal(read_state_dict(path), weights)
