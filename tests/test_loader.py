"""`load.py` beside a pruned network: by PyTorch alone, exactly the same outputs."""

import ast
import copy
import json
import sys
from pathlib import Path

import own_code
import pytest
import torch
from nets import NETS, build, images, outputs, random_kept, randomise
from processes import run_python
from torch import nn

from autoprune import load_pruned, prune, save_pruned, trace
from autoprune.data import models
from autoprune.deploy.loader import loader_source
from autoprune.errors import UserError
from autoprune.scaling.depth import remove_blocks
from autoprune.scaling.resolution import resize_inputs
from autoprune.structure.attention import OPEN_CLASSES

OWN = """
import torch
from torch import nn

class Depthwise(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.depth = nn.Conv2d(16, 16, 3, groups=16)
        self.bn = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, n)
    def forward(self, x):
        x = self.bn(self.depth(self.stem(x).relu())).relu()
        return self.head(self.point(x).relu().mean((2, 3)))

class Grouped(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.parts = nn.Conv2d(16, 24, 3, groups=4)
        self.norm = nn.GroupNorm(4, 24)
        self.head = nn.Linear(24, num_classes)
    def forward(self, x):
        return self.head(self.norm(self.parts(self.stem(x).relu())).mean((2, 3)))

class Vit(nn.Module):
    def __init__(self, n_classes=4):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, n_classes)
    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1)
    def forward(self, x):
        return x + self.b(self.a(x).relu())

def parallel(n_classes):
    return nn.DataParallel(Depthwise(n_classes))

def residual():
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""
NETWORKS = {
    "depthwise": "own_for_loader:Depthwise",
    "grouped": "./own_for_loader.py:Grouped",
    "vit": "own_for_loader:Vit",
    "parallel": "own_for_loader:parallel",
    "torchvision": "mobilenet_v3_small",
    "cifar": "resnet20",
}
SCRIPT = """
import sys, importlib.util
from pathlib import Path

class Refused:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("autoprune", "safetensors"):
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
import torch

# As in the tests: the number of threads decides how PyTorch sums.
torch.set_num_threads(1)
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, expected = torch.load(folder / "case.pt")
    network = module.load()
    with torch.no_grad():
        same = torch.equal(network(x), expected) and not network.training
    print(folder.name, same)
"""


def halved(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A pruned copy whose weights are all random."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) * 0.2 + 0.1
    groups = trace(model, x, verify=False)
    assert len(groups)
    kept = {g.name: torch.arange(0, g.channels, 2) for g in groups}
    return prune(model, groups, kept).eval()


def save(folder: Path, model: nn.Module, plan: dict, x: torch.Tensor) -> None:
    save_pruned(model, folder, plan)
    with torch.no_grad():
        torch.save((x, model(x)), folder / "case.pt")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pruned networks in folders, and what a program without autoprune says of them."""
    home = tmp_path_factory.mktemp("own")
    (home / "own_for_loader.py").write_text(OWN)
    cases = home / "cases"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sys, "path", [str(home), *sys.path])
        torch.manual_seed(0)
        for case, name in NETWORKS.items():
            model = models.build(name, 4).eval()
            x = torch.rand(2, 3, 32, 32)
            plan = {"model": name, "n_classes": 4}
            save(cases / case, halved(model, x[:1]), plan, x)
        whole = models.build("own_for_loader:residual", 4).eval()
        smaller = resize_inputs(remove_blocks(whole, ["1"]), 12)
        plan = {
            "model": "own_for_loader:residual",
            "n_classes": 4,
            "removed_blocks": ["1"],
            "image_size": 12,
        }
        save(cases / "scaled", smaller.eval(), plan, torch.rand(2, 3, 32, 32))
        yield home


@pytest.fixture(scope="module")
def told(home):
    # It runs in another folder than that of the networks' code.
    done = run_python("-c", SCRIPT, str(home / "cases"))
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", [*NETWORKS, "scaled"])
def test_without_autoprune_the_outputs_are_exactly_the_same(told, case):
    assert told[case] == "True"


@pytest.mark.parametrize("case", [*NETWORKS, "scaled"])
def test_with_autoprune_too(home, case):
    x, expected = torch.load(home / "cases" / case / "case.pt")
    with torch.no_grad():
        assert torch.equal(load_pruned(str(home / "cases" / case))(x), expected)


OWN_CODE = own_code.networks()


@pytest.mark.parametrize("name", [*NETS, *OWN_CODE])
def test_the_dense_network_becomes_the_pruned_one_whatever_it_is_made_of(
    name, tmp_path
):
    dense = randomise(OWN_CODE[name] if name in OWN_CODE else build(name)).eval()
    x = own_code.example() if name in OWN_CODE else images(2, NETS[name].size)
    groups = trace(dense, x)
    pruned = prune(dense, groups, random_kept(groups, 0, max_sparsity=0.5)).eval()
    # The plan's own network is none of these; it is given to both sides.
    save_pruned(pruned, tmp_path, {"model": "resnet20", "n_classes": 4}, dense)
    scope: dict = {"__file__": str(tmp_path / "load.py"), "__name__": "load"}
    exec(compile((tmp_path / "load.py").read_text(), "load.py", "exec"), scope)
    again = scope["load"](copy.deepcopy(dense))
    assert torch.equal(outputs(again, x), outputs(pruned, x))


@pytest.mark.parametrize("name", OPEN_CLASSES.values())
def test_every_class_that_pruning_brings_in_can_stand_without_autoprune(name):
    plan = {
        "model": "resnet18",
        "n_classes": 4,
        "modules": {"layer": {"class": name}},
    }
    source = loader_source(plan)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "autoprune" not in ast.unparse(node)
    scope: dict = {"__file__": __file__, "__name__": "load"}
    exec(compile(source, "load.py", "exec"), scope)
    assert issubclass(scope["CLASSES"][name], nn.Module)


def test_a_plan_holds_what_pruning_changed_and_nothing_else(home):
    plan = json.loads((home / "cases" / "depthwise" / "plan.json").read_text())
    assert plan["modules"] == {
        "stem": {"attributes": {"out_channels": 8}},
        "depth": {"attributes": {"in_channels": 8, "out_channels": 8, "groups": 8}},
        "bn": {"attributes": {"num_features": 8}},
        "point": {"attributes": {"in_channels": 8, "out_channels": 4}},
        "head": {"attributes": {"in_features": 4}},
    }


def test_sizes_that_only_the_pruned_network_knows_come_back(home, tmp_path):
    model = load_pruned(home / "cases" / "depthwise")
    sizes = {"split": (3, 5), "heads": [2]}
    vars(model.get_submodule("depth")).update(sizes)
    save_pruned(model, tmp_path, {"model": NETWORKS["depthwise"], "n_classes": 4})
    loaded = vars(load_pruned(tmp_path).get_submodule("depth"))
    assert {name: loaded[name] for name in sizes} == sizes


def test_saving_draws_no_random_numbers(tmp_path):
    model = models.build("resnet20").eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    save_pruned(model, tmp_path, {"model": "resnet20", "n_classes": 10})
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_its_pruned_folder_and_either_as_text_are_loaded(tmp_path, kind):
    model = models.build("resnet20").eval()
    run = tmp_path / "run"
    save_pruned(model, run / "pruned", {"model": "resnet20", "n_classes": 10})
    for place in (run, run / "pruned"):
        found = load_pruned(kind(place)).state_dict()
        assert torch.equal(found["conv1.weight"], model.state_dict()["conv1.weight"])
    (run / "pruned" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"pruned' holds no pruned network"):
        load_pruned(kind(run))
