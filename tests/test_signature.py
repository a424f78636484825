"""Exports of networks of any rank and of any inputs: what is free, and the names."""

import numpy as np
import pytest
import torch
from nets import RGB, conv, images, pooled
from torch import Tensor, nn

from autoprune.deploy.export import export_onnx, export_program, onnx_session
from autoprune.deploy.signature import signature_of
from autoprune.latency.engine_protocol import Setting
from autoprune.latency.measuring import measure_latency


class Two(nn.Module):
    """An image and token ids; one output for each, by name."""

    def __init__(self):
        super().__init__()
        self.conv, self.table = conv(RGB, 4), nn.Embedding(9, 5)

    def forward(self, image: Tensor, ids: Tensor | None = None, scale: float = 2.0):
        out = {"image": pooled(self.conv(image)) * scale}
        if ids is not None:
            out["words"] = self.table(ids).mean(1)
        return out


class Listed(nn.Module):
    """Two tensors in a list, and two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, pair):
        left, right = pair
        return self.first(left) + self.second(right), left.sum(1)


class Unbatched(nn.Module):
    """Takes one image without a batch axis."""

    def __init__(self):
        super().__init__()
        self.conv = conv(RGB, 4)

    def forward(self, image):
        return self.conv(image[None])[0].mean((1, 2))


CASES = {
    "vectors": (nn.Sequential(nn.Linear(8, 4)), torch.zeros(1, 8)),
    "sequences": (nn.Sequential(nn.Conv1d(3, 4, 3)), torch.zeros(1, 3, 9)),
    "volumes": (nn.Sequential(nn.Conv3d(1, 2, 3)), torch.zeros(1, 1, 4, 4, 4)),
    "images": (nn.Sequential(conv(RGB, 4)), images(1, 8)),
    "by name": (Two(), {"ids": torch.tensor([[1, 2]]), "image": images(1, 8)}),
    "by position": (Two(), (images(1, 8), torch.tensor([[1, 2]]))),
    "listed": (Listed(), ([torch.zeros(1, 4), torch.zeros(1, 6)],)),
    "unbatched": (Unbatched(), images(1, 8)[0]),
}
# Input names and shapes, output names.
FREE = "batch"
EXPECTED = {
    "vectors": ({"input": [FREE, 8]}, ["logits"]),
    "sequences": ({"input": [FREE, 3, 9]}, ["logits"]),
    "volumes": ({"input": [FREE, 1, 4, 4, 4]}, ["logits"]),
    "images": ({"images": [FREE, 3, 8, 8]}, ["logits"]),
    "by name": (
        {"image": [FREE, 3, 8, 8], "ids": [FREE, 2]},
        ["output_image", "words"],
    ),
    "by position": (
        {"image": [FREE, 3, 8, 8], "ids": [FREE, 2]},
        ["output_image", "words"],
    ),
    "listed": (
        {"pair_0": [FREE, 4], "pair_1": [FREE, 6]},
        ["output_0", "output_1"],
    ),
    "unbatched": ({"image": [3, 8, 8]}, ["logits"]),
}


@pytest.mark.parametrize("name", CASES)
def test_onnx_files_have_the_networks_inputs_and_outputs(name, tmp_path):
    model, example = CASES[name]
    path = tmp_path / "net.onnx"
    assert export_onnx(model.eval(), example, path) < 1e-4
    session = onnx_session(path)
    shapes, output_names = EXPECTED[name]
    assert {item.name: item.shape for item in session.get_inputs()} == shapes
    assert [item.name for item in session.get_outputs()] == output_names
    for n in (1, 3):
        arrays = {}
        for item in session.get_inputs():
            shape = [n if size == FREE else size for size in item.shape]
            kind = np.int64 if "int64" in item.type else np.float32
            arrays[item.name] = np.ones(shape, kind)
        for output in session.run(None, arrays):
            assert len(np.asarray(output)) == n or name == "unbatched"


@pytest.mark.parametrize("name", ["vectors", "by name", "listed", "unbatched"])
def test_programs_take_the_networks_inputs(name, tmp_path):
    model, example = CASES[name]
    path = export_program(model.eval(), example, tmp_path / "net.pt2")
    program = torch.export.load(path).module()
    signature = signature_of(model, example)
    for n in (2, 5):
        inputs = signature.samples(n, torch.Generator().manual_seed(0))
        torch.testing.assert_close(inputs.run(program), inputs.run(model))


@pytest.mark.parametrize("name", ["vectors", "by position", "unbatched"])
def test_latency_is_measured_of_any_inputs(name):
    model, example = CASES[name]
    batches = [1] if name == "unbatched" else [1, 2]
    settings = [
        Setting(engine, batch, 1, "float32")
        for engine in ("torch", "onnxruntime")
        for batch in batches
    ]
    rows = measure_latency(model.eval(), model, example, settings, seconds=0.01)
    assert [row.setting for row in rows] == settings
