"""What the README and the pages say is true, and fits what they are."""

import ast
import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, run_page

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"


def test_the_readmes_example_runs_and_counts_what_it_prunes():
    examples = [
        block for block in blocks(ROOT / "README.md") if block.language == "python"
    ]
    (example,) = examples
    names: dict = {}
    exec(compile(example.text, "README.md", "exec"), names)  # our own text
    costs = names["CostTable"](names["groups"])
    n_params = sum(p.numel() for p in names["smaller"].parameters())
    assert n_params == costs.params(names["half"])
    assert len(example.text.splitlines()) <= 12


def test_the_librarys_example_runs_and_ends_within_its_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(DOCS / "how-to" / "use-the-library.md")
    costs, kept = names["costs"], names["found"].allocation.kept
    assert costs.macs(kept) <= 0.5 * costs.macs(costs.dense)
    n_params = sum(p.numel() for p in names["smaller"].parameters())
    assert n_params == costs.params(kept)


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 110
    prose = [line for line in lines if "](" not in line and not line.startswith("|")]
    assert max(map(len, prose)) <= 88


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures within the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_pages_links_lead_somewhere(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's renderers make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    found = set()
    for heading in headings:
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(re.sub(r"[\s]+", "-", words))
    return found


FIGURE = re.compile(r"(?<![\w.-])\d[\d.,]*(?:e-?\d+)?(?: ± [\d.]+)?(?![\w-])")
"""A number that stands for itself: not "ResNet-20", "2x2" or "bf16"."""


def paragraphs(page: Path) -> list[str]:
    """A page's paragraphs and list items: no code, tables, headings or comments."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if part.strip() and not part.lstrip().startswith(("|", "#", "![")):
            found.append(part.strip())
    return found


def figures(paragraph: str) -> list[str]:
    """The numbers of a paragraph, but for years, code, links' targets, list numbers."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|^\d+\.", "", paragraph)
    plain = re.sub(r"\b(?:19|20)\d\d\b|arXiv [\d.]+|Python 3\.11", "", plain)
    return FIGURE.findall(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_paragraph_has_more_than_three_figures(page):
    for paragraph in paragraphs(page):
        assert len(figures(paragraph)) <= 3, paragraph


def test_figures_are_counted_as_a_reader_sees_them():
    assert figures("ResNet-20 at 50 % has 1.170 ± 0.022, He et al. 2018 0.3") == [
        "50",
        "1.170 ± 0.022",
        "0.3",
    ]
    assert figures("`macs=50%` and [5](a-5.md) of 2x2 kernels, bf16") == ["5"]


def test_the_tracing_guides_rules_free_what_it_says(monkeypatch, tmp_path):
    from autoprune.structure.attribute_setters import ATTRIBUTE_SETTERS
    from autoprune.tracing.rules.table import RULES

    monkeypatch.chdir(tmp_path)
    rules, setters = dict(RULES), dict(ATTRIBUTE_SETTERS)
    try:
        names = run_page(DOCS / "how-to" / "add-an-operator-rule.md")
    finally:
        for registry, before in ((RULES, rules), (ATTRIBUTE_SETTERS, setters)):
            registry.clear()
            registry.update(before)
    groups = names["groups"]
    assert groups.channels == {"stem": 32, "attention.qkv:heads": 4}
    assert not groups.unsupported
    assert "attention.qkv:width" in {group.name for group in groups.pinned}


def test_the_page_of_methods_is_written_from_what_is_listed_and_measured():
    from experiments.methods_report import PAGE, TABLE, page
    from experiments.tables import read_table

    assert PAGE.read_text(encoding="utf-8") == page(read_table(TABLE))


def test_the_page_of_results_is_written_from_every_table_of_searches():
    from experiments.search_report import NETWORKS, PAGE, RESULTS, page

    assert {
        path.stem.removeprefix("search_") for path in RESULTS.glob("search_*.csv")
    } <= set(NETWORKS)
    assert PAGE.read_text(encoding="utf-8") == page()


def test_pages_written_from_the_code_are_up_to_date():
    from experiments import reference_pages

    again = "write it again: python -m experiments.reference_pages"
    options = reference_pages.OPTIONS.read_text(encoding="utf-8")
    assert options == reference_pages.options_page(), again
    for page in reference_pages.pages_with_tables():
        text = page.read_text(encoding="utf-8")
        assert text == reference_pages.with_tables(text), f"{page.name}: {again}"
    for room, text in reference_pages.api_pages().items():
        page = reference_pages.API / f"{room}.md"
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: {again}"


def test_every_option_of_every_command_is_on_the_page_of_options():
    from autoprune.cli.main import COMMANDS, Parser

    page = (DOCS / "reference" / "options.md").read_text(encoding="utf-8")
    for command in COMMANDS.values():
        parser = Parser()
        command.options(parser)
        for line in parser.format_help().splitlines():
            for option in re.findall(r"^  (--[\w.]+)", line):
                is_general = option in ("--help", "--config", "--print_config")
                is_group = f"`{option}." in page
                assert is_general or is_group or f"`{option}`" in page, option


def test_the_tables_of_the_environment_are_those_of_the_code():
    from autoprune.envs.observation import FEATURES
    from autoprune.envs.rewards import REWARDS

    page = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
    for feature in FEATURES:
        assert f"| {feature.name} |" in page
    for name in REWARDS:
        assert page.count(f"| {name} |") == 2, "in words and as a formula"


def test_the_page_of_the_run_folder_names_every_file_and_key():
    import dataclasses

    from autoprune.results import Results
    from autoprune.runs import Artefact, RunFolder

    page = (DOCS / "reference" / "run-folder.md").read_text(encoding="utf-8")
    for value in vars(RunFolder).values():
        if isinstance(value, Artefact):
            assert f"`{value.name.partition('/')[0]}" in page, value.name
    for field in dataclasses.fields(Results):
        assert f"| `{field.name}` |" in page, field.name


def test_extension_points_have_the_import_paths_that_the_page_gives():
    import importlib

    page = (DOCS / "reference" / "extension-points.md").read_text(encoding="utf-8")
    paths = re.findall(r"`(autoprune(?:\.\w+)+\.[A-Z_]+)`", page)
    assert len(paths) >= 9
    for path in paths:
        module, _, name = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), dict), path


def test_modules_that_pages_name_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(
            r"`(?:autoprune|agents|envs|experiments|tests)/[\w/.]+`", text
        ):
            is_pattern = "NAME" in path or "MODEL" in path
            assert is_pattern or (ROOT / path.strip("`")).exists(), (page.name, path)


def test_the_site_has_every_page_and_no_other():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md$", text, re.MULTILINE))
    written = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert listed == written | {"changelog.md"}


def test_code_on_pages_parses():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text)
