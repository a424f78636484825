"""The report's "Use it": its code is executed, and gives what the run's network gives."""

import html
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune import load_pruned, save_pruned
from autoprune.data import models
from autoprune.data.image_fitting import fit_image
from autoprune.data.preprocessing import Preprocessing
from autoprune.deploy.export import export_onnx
from autoprune.reporting.report import write_report
from autoprune.reporting.usage import usage_snippets
from autoprune.results import Results
from autoprune.runs import RunFolder, write_json, write_text

CLASSES = ['it\'s "quoted"', "<b>", "ship", "käfer"]
HALF = Preprocessing((0.5, 0.4, 0.3), (0.5, 0.25, 0.2), (32, 32), "bicubic", 0.875)


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (45, 37)) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def pieces(page: str) -> dict[str, str]:
    """What a reader would copy, by key."""
    found = re.findall(r'<pre class="copied" id="use-(\w+)">(.*?)</pre>', page, re.S)
    return {key: html.unescape(text) for key, text in found}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder in which a run was started, with what its reader saves there."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run = RunFolder(Path("runs/it's one"))
        torch.manual_seed(0)
        model = models.build("resnet20", 4).eval()
        plan = {"model": "resnet20", "n_classes": 4, "classes": CLASSES}
        save_pruned(model, run.pruned, plan)
        export_onnx(model, torch.zeros(1, 3, 32, 32), run.onnx)
        write_text(run.config, "data: {}\n")
        results = Results(
            run=str(run.root),
            model="resnet20",
            data=str(home / "photos"),
            preprocessing=HALF.to_dict(),
            onnx_max_relative_error=1e-7,
        )
        write_json(run.results, results.to_json())
        found = pieces(write_report(run).read_text(encoding="utf-8"))
    (home / "prepare.py").write_text(found["prepare"], encoding="utf-8")
    picture(home / "image.png")
    return home


@pytest.fixture
def page(home, monkeypatch) -> dict[str, str]:
    """The pieces of the run's report, to be executed in its folder."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [str(home), *sys.path])
    for name in ("prepare", "load"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    report = RunFolder(Path("runs/it's one")).report
    return pieces(report.read_text(encoding="utf-8"))


def expected_logits() -> torch.Tensor:
    image = Image.open("image.png").convert("RGB")
    pixels = torch.from_numpy(fit_image(image, HALF).copy())[None]
    with torch.no_grad():
        return load_pruned("runs/it's one")(HALF.normalize(pixels))


@pytest.mark.parametrize("key", ["pytorch", "onnxruntime"])
def test_pieces_of_the_page_answer_as_the_runs_network_does(page, key, capsys):
    scope: dict = {}
    exec(compile(page[key], key, "exec"), scope)
    logits = torch.as_tensor(scope["logits"])
    torch.testing.assert_close(logits, expected_logits(), rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out.strip() == CLASSES[int(logits.argmax())]


def test_the_quantised_file_answers_nearly_the_same(page, home):
    for number in range(4):
        folder = home / "photos" / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        picture(folder / f"{number}.png", size=(40 + number, 40))
    exec(compile(page["quantise"], "quantise", "exec"), {"__name__": "quantise"})
    code = page["onnxruntime"].replace("model.onnx", "model.int8.onnx")
    scope: dict = {}
    exec(compile(code, "onnxruntime", "exec"), scope)
    difference = torch.as_tensor(scope["logits"]) - expected_logits()
    assert difference.abs().max() < 0.2 * expected_logits().abs().max()


def test_commands_of_the_page_name_the_runs_files_and_shapes(page):
    assert "--optShapes=images:8x3x32x32" in page["tensorrt"]
    assert "--onnx='runs/it'\"'\"'s one/model.onnx'" in page["tensorrt"]
    compile(page["openvino"], "openvino", "exec")


SHAPES = list(
    itertools.product(
        [(20, 20), (20, 28)], ["center", "squash", "border"], [1.0, 0.8], [3, 1]
    )
)


@pytest.mark.parametrize(("size", "mode", "crop", "channels"), SHAPES)
@pytest.mark.parametrize("given", [(45, 37), (19, 60), (20, 20)])
def test_images_are_prepared_to_the_last_bit_as_the_run_did(
    tmp_path, size, mode, crop, channels, given
):
    preprocessing = Preprocessing(
        (0.4, 0.5, 0.6)[:channels],
        (0.2, 0.3, 0.4)[:channels],
        size,
        "bilinear",
        crop,
        mode,
    )
    path = picture(tmp_path / "image.png", "RGB", given)
    results = Results(run="runs/one", preprocessing=preprocessing.to_dict())
    first, *_ = usage_snippets(results, {"classes": ["a"]}, has_onnx=False)
    scope: dict = {}
    exec(compile(first.code, "prepare", "exec"), scope)
    image = Image.open(path).convert("RGB" if channels == 3 else "L")
    pixels = torch.from_numpy(fit_image(image, preprocessing).copy())[None]
    assert torch.equal(
        torch.from_numpy(scope["prepare"](path)), preprocessing.normalize(pixels)
    )


@pytest.mark.parametrize(
    ("data", "folder"), [("mine", "mine/train"), ("digits", "photos/train")]
)
def test_ranges_are_measured_on_the_runs_own_images_where_these_lie_in_a_folder(
    data, folder
):
    results = Results(run="r", data=data, preprocessing=HALF.to_dict())
    snippets = usage_snippets(results, {"classes": ["a"]}, has_onnx=True)
    (code,) = [snippet.code for snippet in snippets if snippet.key == "quantise"]
    assert f"Path({folder!r})" in code


def test_many_channels_are_read_from_arrays(tmp_path):
    preprocessing = Preprocessing((0.5,) * 5, (0.25,) * 5, (6, 4))
    values = np.random.default_rng(0).integers(0, 256, (6, 4, 5), np.uint8)
    np.save(tmp_path / "image.npy", values)
    results = Results(run="runs/one", preprocessing=preprocessing.to_dict())
    first, *_ = usage_snippets(results, {"classes": ["a"]}, has_onnx=False)
    scope: dict = {}
    exec(compile(first.code, "prepare", "exec"), scope)
    pixels = torch.from_numpy(values.transpose(2, 0, 1).copy())[None]
    found = torch.from_numpy(scope["prepare"](tmp_path / "image.npy"))
    assert torch.equal(found, preprocessing.normalize(pixels))


def test_a_run_without_a_pruned_network_offers_nothing(tmp_path):
    run = RunFolder(tmp_path)
    write_text(run.config, "data: {}\n")
    results = Results(run="runs/one", model="m", data="d", preprocessing=HALF.to_dict())
    write_json(run.results, results.to_json())
    assert pieces(write_report(run).read_text(encoding="utf-8")) == {}
