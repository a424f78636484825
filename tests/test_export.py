"""ONNX equals PyTorch, pruned networks come back bit-identical, and nothing damaged is
loaded.
"""

import copy
import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data import models
from autoprune.data.networks import conv_bn
from autoprune.deploy import export
from autoprune.deploy.export import (
    ExportError,
    export_onnx,
    export_program,
    onnx_session,
)
from autoprune.deploy.plain_attention import plain_attention
from autoprune.deploy.pruned import load_pruned, save_pruned
from autoprune.errors import UserError

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PLAN = {"model": "resnet20", "n_classes": 10}


class Residual(nn.Module):
    """A stem, one residual block with batch norm and a head."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.block = nn.Sequential(conv_bn(8, 6), conv_bn(6, 8, act=False))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.block(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise separable block between stem and head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(3, 8), conv_bn(8, 8, groups=8, stride=2), conv_bn(8, 12, 1)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


class Drifting(nn.Module):
    """Computes something else when it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.01 if torch.compiler.is_exporting() else 1.0
        return x.mean((2, 3)) * scale


class Unexportable(nn.Module):
    """Branches on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def randomised(model: nn.Module) -> nn.Module:
    """Batch norm that is no identity, so that a lost statistic shows."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (
                module.weight.data,
                module.bias.data,
                module.running_mean,
                module.running_var,
            ):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def sliced_resnet20() -> nn.Module:
    """A ResNet-20 whose first block keeps ten of its sixteen inner channels, cut by
    hand.
    """
    model = randomised(models.build("resnet20")).eval()
    block, kept = model.layer1[0], torch.tensor([0, 1, 2, 4, 5, 7, 9, 11, 14, 15])
    block.conv1.weight.data, block.conv1.out_channels = (
        block.conv1.weight.data[kept],
        len(kept),
    )
    block.conv2.weight.data, block.conv2.in_channels = (
        block.conv2.weight.data[:, kept],
        len(kept),
    )
    block.bn1.num_features = len(kept)
    for name in ("weight", "bias"):
        getattr(block.bn1, name).data = getattr(block.bn1, name).data[kept]
    for name in ("running_mean", "running_var"):
        setattr(block.bn1, name, getattr(block.bn1, name)[kept])
    return model


@pytest.mark.parametrize("network", [Residual, Depthwise])
def test_onnx_equals_torch_at_batch_1_and_4(network, tmp_path):
    model = randomised(network()).eval().to(memory_format=torch.channels_last)
    error = export_onnx(model, EXAMPLE, tmp_path / "model.onnx")
    assert 0 <= error < 1e-5
    session = onnx_session(tmp_path / "model.onnx")
    for images in (BATCHES[:1], BATCHES):
        with torch.no_grad():
            expected = model(images).numpy()
        (logits,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(
            logits, expected, rtol=0, atol=1e-5 * abs(expected).max()
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (
        onnx.load(tmp_path / "model.onnx")
        .graph.input[0]
        .type.tensor_type.shape.dim[0]
        .dim_param
    )


def test_export_leaves_the_model_as_found(tmp_path):
    model = Residual().train().to(memory_format=torch.channels_last)
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    export_onnx(model, EXAMPLE, tmp_path / "model.onnx")
    assert all(module.training for module in model.modules())
    for ours, theirs in zip(
        model.state_dict().values(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]


class Windows(nn.Module):
    """Attention within windows, on five axes, with a bias for each pair of places."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(3, 36, 1)
        self.bias = nn.Parameter(torch.randn(3, 16, 16))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.qkv(x).unflatten(2, (2, 4)).unflatten(4, (2, 4))
        # (batch, 3, heads, width, rows, 4, columns, 4) to windows of 16 places.
        parts = maps.unflatten(1, (3, 3, 4)).permute(1, 0, 4, 6, 2, 5, 7, 3)
        q, k, v = parts.flatten(5, 6).flatten(2, 3).unbind(0)
        read = F.scaled_dot_product_attention(q, k, v, self.bias)
        return self.head(read.transpose(2, 3).flatten(3).mean((1, 2)))


def test_attention_of_more_axes_than_onnx_knows_is_exported_as_its_parts(tmp_path):
    model = Windows().eval()
    x = torch.randn(2, 3, 8, 8)
    assert export_onnx(model, x, tmp_path / "model.onnx") < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.randn(7, 9)},
        {"attn_mask": torch.arange(9) < torch.arange(2, 9)[:, None]},
        {"enable_gqa": True},
    ],
    ids=["plain", "scale", "causal", "added", "boolean", "shared"],
)
def test_attention_by_its_parts_is_that_of_pytorch(options):
    query = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    n_heads = 2 if "enable_gqa" in options else 6
    key = torch.randn(2, n_heads, 9, 5, dtype=torch.float64)
    value = torch.randn(2, n_heads, 9, 4, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(plain_attention(query, key, value, **options), expected)


def test_export_is_silent(tmp_path, capfd):
    export_onnx(Depthwise(), EXAMPLE, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_network_that_differs_in_onnx_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(
        ExportError, match=r"differs from PyTorch by 1\.0e-02; the limit is 1e-04"
    ):
        export_onnx(Drifting(), EXAMPLE, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_onnx_cannot_express_is_refused_with_the_reason(tmp_path):
    with pytest.raises(
        ExportError, match=r"^ONNX can't express this network \(.*data-dependent.*\)$"
    ):
        export_onnx(Unexportable(), EXAMPLE, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_torch_export_cannot_express_is_refused_with_the_reason(
    tmp_path,
):
    with pytest.raises(
        ExportError,
        match=r"^torch.export can't express this network \(.*data-dependent.*\)$",
    ):
        export_program(Unexportable(), EXAMPLE, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_nan_outputs_are_refused(tmp_path):
    model = Residual()
    model.head.bias.data[0] = torch.nan
    with pytest.raises(ExportError, match=r"differs from PyTorch by nan"):
        export_onnx(model, EXAMPLE, tmp_path / "model.onnx")


def test_a_network_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_ONNX_BYTES", 1000)
    with pytest.raises(
        ExportError,
        match=r"weights of [\d,]+ bytes don't fit one ONNX file; the limit is 1,000",
    ):
        export_onnx(Residual(), EXAMPLE, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet20", f"{__name__}:Depthwise"])
def test_a_pruned_network_comes_back_bit_identical(name, layout, tmp_path):
    dense = (
        sliced_resnet20()
        if name == "resnet20"
        else randomised(models.build(name)).eval()
    )
    model = dense.to(memory_format=layout)
    save_pruned(model, tmp_path, {**PLAN, "model": name})
    loaded = load_pruned(tmp_path)
    for images in (BATCHES, BATCHES.to(memory_format=torch.channels_last)):
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "load.py",
        "plan.json",
        "weights.safetensors",
    ]


def test_module_attributes_follow_the_weights(tmp_path):
    save_pruned(sliced_resnet20(), tmp_path, PLAN)
    block = load_pruned(tmp_path).layer1[0]
    assert (
        block.conv1.out_channels,
        block.bn1.num_features,
        block.conv2.in_channels,
    ) == (10, 10, 10)


@pytest.fixture
def saved(tmp_path):
    save_pruned(sliced_resnet20(), tmp_path, {**PLAN, "kept": {"layer1.0.conv1": 10}})
    return tmp_path


@pytest.mark.parametrize("name", ["plan.json", "weights.safetensors"])
def test_a_folder_without_a_pruned_network_is_refused(saved, name):
    (saved / name).unlink()
    with pytest.raises(
        UserError,
        match=rf"^run: '.*' holds no pruned network \(no {name}\); .*autoprune prune RUN$",
    ):
        load_pruned(saved)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"model": "resnet20"', "Expecting ',' delimiter"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[]", "no 'model' of type str"),
        (b'{"model": 3, "n_classes": 10}', "no 'model' of type str"),
        (b'{"model": "resnet20"}', "no 'n_classes' of type int"),
    ],
)
def test_a_damaged_plan_is_refused(saved, content, reason):
    (saved / "plan.json").write_bytes(content)
    with pytest.raises(
        UserError,
        match=rf"^run: '.*plan\.json' is damaged \(.*{reason}.*\); write it again",
    ):
        load_pruned(saved)


def test_an_unknown_model_in_the_plan_is_refused(saved):
    (saved / "plan.json").write_text(json.dumps({**PLAN, "model": "resnet21"}))
    with pytest.raises(
        UserError, match=r"unknown model 'resnet21'; did you mean resnet"
    ):
        load_pruned(saved)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(saved, keep):
    weights = saved / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(
        UserError,
        match=r"^run: '.*weights\.safetensors' is damaged \(.*\); write it again",
    ):
        load_pruned(saved)


def test_weights_that_are_a_pickle_are_refused(saved):
    torch.save(models.build("resnet20").state_dict(), saved / "weights.safetensors")
    with pytest.raises(UserError, match=r"^run: '.*weights\.safetensors' is damaged"):
        load_pruned(saved)


def rewrite(folder, change) -> None:
    """Changes the weights, and the plan's digest with them."""
    weights = load_file(folder / "weights.safetensors")
    change(weights)
    save_file(weights, folder / "weights.safetensors")
    plan = json.loads((folder / "plan.json").read_text())
    content = (folder / "weights.safetensors").read_bytes()
    plan["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "plan.json").write_text(json.dumps(plan))


def test_a_plan_knows_its_weights_from_others_of_the_same_shapes(saved):
    plan = json.loads((saved / "plan.json").read_text())
    content = (saved / "weights.safetensors").read_bytes()
    assert plan["weights_sha256"] == hashlib.sha256(content).hexdigest()
    rewrite(saved, lambda weights: weights["conv1.weight"].mul_(2))
    load_pruned(saved)
    (saved / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(
        UserError, match=r"don't belong together \(the plan is of other weights\)"
    ):
        load_pruned(saved)
    # Plans of earlier versions don't say.
    del plan["weights_sha256"]
    (saved / "plan.json").write_text(json.dumps(plan))
    load_pruned(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_that_is_not_finite_replaces_no_other(saved, value):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    sick = sliced_resnet20()
    with torch.no_grad():
        sick.bn1.weight[0] = value
    with pytest.raises(UserError, match=r"bn1\.weight in .* holds NaN or infinite"):
        save_pruned(sick, saved, PLAN)
    assert before == {path: path.read_bytes() for path in saved.iterdir()}


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda w: w.pop("bn1.bias"), "bn1.bias"),
        (lambda w: w.update(surplus=torch.zeros(1)), "surplus"),
        (lambda w: w.update({"conv1.weight": torch.zeros(3)}), "conv1.weight"),
        (lambda w: w.update({"linear.weight": torch.zeros(11, 64)}), "linear.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused(saved, change, first):
    rewrite(saved, change)
    message = rf"^run: weights and plan in '.*' don't belong together \(1 tensors don't fit resnet20, first: {first}\)"
    with pytest.raises(UserError, match=message):
        load_pruned(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(saved, value):
    rewrite(saved, lambda weights: weights["conv1.weight"].fill_(value))
    with pytest.raises(
        UserError, match=r"^run: conv1\.weight in '.*' holds NaN or infinite values"
    ):
        load_pruned(saved)


class Finishing(nn.Module):
    """A convolution, and what a test does with its input and its output."""

    def __init__(self, finish):
        super().__init__()
        self.conv, self.finish = nn.Conv2d(3, 4, 1), finish

    def forward(self, x):
        return self.finish(x, self.conv(x))


def test_a_batch_size_that_the_code_fixes_is_refused_with_the_way_out(tmp_path):
    fixed = Finishing(lambda x, y: y.view(len(x), -1))
    with pytest.raises(
        ExportError, match=r"doesn't run on a batch of \d .*write x\.shape\[0\]"
    ):
        export_onnx(fixed, torch.zeros(1, 3, 8, 8), tmp_path / "fixed.onnx")
    assert not list(tmp_path.iterdir())


def test_several_outputs_are_exported_and_checked(tmp_path):
    two = Finishing(lambda x, y: {"map": y, "mean": y.mean((2, 3))})
    assert export_onnx(two, torch.zeros(1, 3, 8, 8), tmp_path / "two.onnx") < 1e-4
    names = [
        output.name for output in onnx_session(tmp_path / "two.onnx").get_outputs()
    ]
    assert names == ["map", "mean"]
