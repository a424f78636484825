"""What a beginner gets wrong is refused before PyTorch is imported, in one line."""

import importlib

import pytest
import yaml
from processes import run_python

from autoprune import names
from autoprune.config import Settings
from autoprune.data.known_models import check_model, registered_models
from autoprune.errors import UserError

REGISTRIES = [
    value for value in vars(names).values() if isinstance(value, names.Registry)
]
WITHOUT_TORCH = """
import sys
from autoprune.cli.main import main
sys.modules["torch"] = None
for line in sys.argv[1:]:
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(repr(error).replace("\\n", " "), file=sys.stderr)
        code = -1
    print(code, file=sys.stderr)
"""
"""Runs a command for each argument; the import of PyTorch is an error."""

MISTAKES = {
    "runn": "did you mean run?",
    "run --budgt macs=40%": "did you mean --budget?",
    "run --model resnet21": "unknown model 'resnet21'; did you mean resnet",
    "run --model timm/resnet19": "timm has no model 'resnet19'; did you mean timm/",
    "run --model tests.tiny:networ": "did you mean tests.tiny:network?",
    "run --model tests.tiyn:network": "no module 'tiyn'); did you mean 'tiny'?",
    "run --model nowhere:make": "can't import 'nowhere' (no module 'nowhere')",
    "run --model ./nowhere.py:make": "no file './nowhere.py'",
    "run --weights nowhere.pt": "no file 'nowhere.pt'",
    "run --model resnet56": "give the trained weights of resnet56",
    "run --model tests.tiny:network --data nowhere": "no dataset 'nowhere'",
    "trace --weights nowhere.pt": "no file 'nowhere.pt'",
    "run --data cifar11": "no dataset 'cifar11'; did you mean 'cifar10'",
    "run --data nowhere": "no dataset 'nowhere'",
    "run --agent ppa": "unknown agent 'ppa'; did you mean 'ppo'",
    "run --method slimmin": "did you mean 'slimming'",
    "run --criterion l3": "unknown criterion 'l3'; did you mean 'l1'",
    "run --reward acm": "unknown reward 'acm'; did you mean 'amc'",
    "run --baselines unifrom": "did you mean 'uniform'",
    "run --granularity chanel": "did you mean 'channel'",
    "run --sparse.method slimmin": "did you mean 'slimming'",
    "run --removal.method gradul": "did you mean 'gradual'",
    "run --budget macs=120%": "above 0 and at most 100%",
    "run --budget mac=40%": "did you mean 'macs'",
    "run --budget macs=80%..30%": "from a smaller to a larger share",
    "run --budget latency=8": "'8' has no unit; write e.g. latency=50% or latency=8ms",
    "run --budget macs=50%,size=5M": "'5M' is no share and no amount in B, KB, MB",
    "run --budget macs=50%,macs=20M": "macs is budgeted twice",
    "run --budget macs=30%..80%,size=5MB": "a range is of one metric alone",
    "run --granularity dimensions --budget size=5MB": "counts macs or params, one",
    "run --episodes many": "expected int, got many",
    "run --finetune.lr fast": "--finetune.lr: expected float, got fast",
    "run --channels grey": "--channels: expected int, got grey",
    "run --model ./tests/tiny.py": "as in ./tests/tiny.py:make",
    "run --episodes 0": "must be at least 1, got 0",
    "run --agent tpe --budget macs=30%..80%": "tpe is for one budget",
    "run --policy resnet20-pp": "did you mean 'resnet20-ppo'",
    "run --policy resnet20-ppo --agent sac": "can't start sac",
    "run --latency.engine onnxruntim": "did you mean 'onnxruntime'",
    "run --latency.precision bfloat17": "did you mean 'bfloat16'",
    "run --latency.batch 0": "--latency.batch: must be at least 1, got 0",
    "run --latency.threads -1": "--latency.threads: must be at least 0, got -1",
    "run --latency_batch 8": "--latency.batch",
    "run --resume": "--resume: which run? Give its folder with --out",
    "run --resume --out nowhere": "--out: no folder 'nowhere'",
    "run --out {run}": "holds a run already",
    "run --resume --out {run} --seed 3": "was started with 0, got 3",
    "run --config nowhere.yaml": "nowhere.yaml",
    "search --agent ppa": "did you mean 'ppo'",
    "replay nowhere": "POLICY: no shipped policy and no folder",
    "replay resnet20-ppo --model resnet21": "unknown model 'resnet21'",
    "replay resnet20-ppo --budget macs=0": "above 0 and at most 100%",
    "prune": "prune takes either RUN or --allocation FILE",
    "prune nowhere": "RUN: no folder 'nowhere'",
    "prune --allocation nowhere.json": "--allocation: no file 'nowhere.json'",
    "finetune nowhere": "RUN: no folder 'nowhere'",
    "evaluate {run}/..": "is not a run folder",
    "export {run} --format onx": "did you mean 'onnx'",
    "export nowhere": "RUN: no folder 'nowhere'",
    "report nowhere": "RUN: no folder 'nowhere'",
    "trace --model resnet21": "unknown model 'resnet21'",
    "data cifr10": "did you mean 'cifar10'",
}
"""A command line to a part of its answer."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[str, int]]:
    """What each mistake prints on stderr, and its exit code."""
    run = tmp_path_factory.mktemp("mistakes") / "run"
    run.mkdir()
    config = Settings().to_dict() | {"options": {}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [mistake.format(run=run) for mistake in MISTAKES]
    done = run_python("-c", WITHOUT_TORCH, *lines)
    printed = done.stderr.splitlines()
    assert len(printed) == 2 * len(MISTAKES), done.stderr
    pairs = zip(printed[::2], map(int, printed[1::2]), strict=True)
    return dict(zip(MISTAKES, pairs, strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_in_one_line_without_importing_torch(mistake, answers):
    line, code = answers[mistake]
    assert code == 2
    assert MISTAKES[mistake] in line


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.home)
def test_the_names_known_without_importing_are_those_of_the_registry(registry):
    home = importlib.import_module(registry.home)
    # Other tests may have entered some of their own, behind these.
    assert registry.names == tuple(getattr(home, registry.attribute))


def test_the_names_read_from_sources_are_those_that_the_packages_register():
    import timm
    import torchvision.models

    classifiers = torchvision.models.list_models(module=torchvision.models)
    assert set(registered_models("torchvision")) == set(classifiers)
    assert set(registered_models("timm")) == set(timm.list_models())


@pytest.mark.parametrize(
    "name",
    [
        "resnet110_b",
        "resnet18",
        "timm/resnet18",
        "timm/resnet18.a1_in1k",
        # A name of old, which timm replaces with a warning.
        "timm/tv_resnet34",
        "tests.tiny:network",
    ],
)
def test_a_network_that_can_be_built_is_not_refused_by_its_name(name):
    check_model(name)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from tests.tiny import *", "network"),
        ("def __getattr__(name): return name", "anything"),
        ("globals()['made'] = 1", "made"),
        ("if True:\n    import torch as made", "made"),
        ("made: int = 1", "made"),
        ("for made in [1]: pass", "made"),
        ("def broken(:", "made"),
    ],
)
def test_a_factory_that_a_source_may_define_is_not_refused(source, name, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    check_model(f"{tmp_path}/mine.py:{name}")


@pytest.mark.parametrize("name", ["resnet", "timm/resnet1", "timm/", "fcn_resnet50"])
def test_a_network_that_cannot_be_built_is(name):
    with pytest.raises(UserError, match=r"model: .* did you mean"):
        check_model(name)
