"""What a project has besides its code: extras, files, versions that agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from processes import run_python

import autoprune

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
MODULES = {
    "pillow": "PIL",
    "PyYAML": "yaml",
    "stable-baselines3": "stable_baselines3",
    "docstring-parser": "docstring_parser",
    "sb3-contrib": "sb3_contrib",
}
"""Package to the module that it is imported as, where that is another name."""

CORE = """
import sys

for name in {blocked!r}:
    sys.modules[name] = None  # as if it weren't installed

import tempfile
from pathlib import Path

from autoprune import CostTable, importance, mask, prune, top_channels, trace
from autoprune import load_pruned, save_pruned
from autoprune.config import DataConfig
from autoprune.data import datasets
from autoprune.data.models import embedded_resnet20

splits = datasets.load(DataConfig("sample"))
model = embedded_resnet20()
groups = trace(model, splits.example)
scores = importance("l1", model, groups, splits.train)
half = {{group.name: group.channels // 2 for group in groups}}
kept = top_channels(scores, half)
smaller = prune(model, groups, kept)
assert sum(p.numel() for p in smaller.parameters()) == CostTable(groups).params(half)
mask(model, groups, kept)
with tempfile.TemporaryDirectory() as folder:
    save_pruned(smaller, Path(folder), {{"model": "resnet20", "n_classes": 10}})
    load_pruned(Path(folder))
"""


def name_of(requirement: str) -> str:
    """The package that a requirement is for."""
    return re.split(r"[<>=\[;]", requirement)[0]


def module_of(requirement: str) -> str:
    """The module that a requirement is imported as."""
    name = name_of(requirement)
    return MODULES.get(name, name)


def test_tracing_and_pruning_need_the_core_alone():
    core = {
        module_of(requirement) for requirement in PYPROJECT["project"]["dependencies"]
    }
    others = {
        module_of(r) for extra in ("run", "timm", "search") for r in EXTRAS[extra]
    }
    assert core.isdisjoint(others)
    code = CORE.format(blocked=sorted(others))
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_command_without_its_extra_says_in_one_line_what_to_install():
    blocked = [module_of(requirement) for requirement in EXTRAS["run"]]
    code = CORE.partition("from autoprune import")[0].format(blocked=sorted(blocked))
    code += "from autoprune.__main__ import main\nsys.exit(main())\n"
    done = run_python("-c", code)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "pip install '.[run]'" in line


def test_dev_brings_every_other_extra():
    (own,) = [r for r in EXTRAS["dev"] if r.startswith("autoprune[")]
    brought = set(own.removeprefix("autoprune[").removesuffix("]").split(","))
    assert brought == set(EXTRAS) - {"dev"}


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    headings = re.findall(r"^## (\S+)$", changelog, flags=re.MULTILINE)
    # What is to come has no number yet.
    newest = next(heading for heading in headings if heading != "Unreleased")
    assert newest == citation["version"] == autoprune.__version__
    declared = PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]
    assert declared == {"attr": "autoprune.__version__"}


def test_the_changelog_keeps_to_its_headings():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.*)$", changelog, flags=re.MULTILINE)
    assert set(headings) <= {"Added", "Changed", "Fixed", "Removed"}
    assert "**[results]**" in changelog


def test_the_licence_is_the_declared_one_and_notice_names_what_others_made():
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert licence.startswith(f"{PYPROJECT['project']['license']} License")
    for path in re.findall(
        r"\b(?:autoprune|experiments|docs|agents)/[\w/.*-]+", notice
    ):
        assert list(ROOT.glob(path.rstrip("/"))), path
    assert "CIFAR-10" in notice


def test_every_make_target_installs_an_extra_that_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+): \.venv/(\w+)\.installed$", makefile, re.MULTILINE)
    assert dict(targets) == {"run": "run", "test": "dev", "docs": "docs"}
    assert {extra for _, extra in targets} <= set(EXTRAS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_command_prints_completion_for(shell, capsys):
    from autoprune.cli.main import main

    with pytest.raises(SystemExit) as stopped:
        main([f"--print_completion=shtab-{shell}"])
    assert not stopped.value.code
    script = capsys.readouterr().out
    assert "autoprune" in script
    assert "--budget" in script
