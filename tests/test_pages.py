"""Every command and every block of Python that the pages show runs as it stands, or its
page says why not.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Block, blocks, commands, run_command, run_page

from autoprune.agents.baselines import BASELINES
from autoprune.cli.presets import METHODS
from autoprune.envs.rewards import REWARDS
from autoprune.evaluation.importance import CRITERIA
from autoprune.latency import measuring
from autoprune.latency.engines import ENGINES
from autoprune.pipeline.methods.registry import PRUNING_METHODS

TINY = (
    "--episodes 2 --epochs 1 --agent ppo --baselines none --finalists 1 "
    "--finetune.batch_size 32"
)
"""A run that takes seconds."""
RUNNABLE = ("sh", "python")
IN_TEST_DOCS = (
    "README.md",
    "docs/how-to/use-the-library.md",
    "docs/how-to/add-an-operator-rule.md",
)
"""Pages that test_docs.py runs, and looks at what comes out."""


def shown(page: Path) -> str:
    """How a page is called in a test's name."""
    return page.relative_to(ROOT).as_posix()


def has_code(page: Path) -> bool:
    """Whether a page shows anything that can be run."""
    return any(block.language in RUNNABLE for block in blocks(page))


WITH_CODE = [
    page for page in PAGES if has_code(page) and shown(page) not in IN_TEST_DOCS
]
REGISTRIES = (
    CRITERIA,
    ENGINES,
    REWARDS,
    BASELINES,
    METHODS,
    PRUNING_METHODS,
)
"""Where pages show how to enter something."""


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    """The run that pages call runs/first, on the embedded network."""
    folder = tmp_path_factory.mktemp("pages")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            _measure_briefly(patch)
            run_command("autoprune run --out runs/first", TINY)
    finally:
        os.chdir(before)
    return folder / "runs" / "first"


def _measure_briefly(patch: pytest.MonkeyPatch) -> None:
    """Latency isn't what these tests are about."""
    patch.setattr(measuring.measure_latency, "__defaults__", (0.05,))


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page enters is gone when its test is over."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", WITH_CODE, ids=shown)
def test_what_a_page_shows_runs(page, first_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    _measure_briefly(monkeypatch)
    shutil.copytree(first_run, tmp_path / "runs" / "first")
    # Another test may have imported the one of its own run.
    monkeypatch.delitem(sys.modules, "load", raising=False)
    known = set(sys.modules)
    try:
        run_page(page)
    finally:
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(tmp_path)):
                del sys.modules[name]


def test_no_command_hides_in_a_block_that_is_not_run():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        indented = re.findall(r"^ {4}(?:autoprune|make|python) .*$", text, re.MULTILINE)
        fenced = "".join(block.text for block in blocks(page))
        hidden = [line for line in indented if line.strip() not in fenced]
        assert not hidden, f"{shown(page)}: put these into a fenced block"


def test_what_is_not_run_says_why_in_words():
    for page in PAGES:
        for block in blocks(page):
            if block.not_run:
                assert len(block.not_run.split()) >= 3, (shown(page), block.not_run)


def verbs(block: Block) -> set[str]:
    """What follows `autoprune` in a block's commands: subcommands, not options."""
    found = set()
    for command in commands(block):
        words = [word for word in command.split() if not re.match(r"\w+=", word)]
        if words[:1] == ["autoprune"] and not words[1].startswith("-"):
            found.add(words[1])
    return found


def test_every_shown_command_is_one_that_exists():
    from autoprune.cli.main import COMMANDS

    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                assert verbs(block) <= set(COMMANDS), shown(page)
