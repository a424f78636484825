"""The pages build into a site offline, without a warning, and ask nobody on the net."""

import os
import re
from pathlib import Path

import pytest
from processes import run_python


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--strict", "--quiet"]
    built = run_python(
        *command,
        "--site-dir",
        str(folder),
        environment=os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr + built.stdout == "", "no warning"
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]+)", text
        )
        loaded += re.findall(r"<link[^>]* href=\"?(https?:[^\" >]+)", text)
        assert not loaded, page.name
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8"), style.name


def test_every_room_has_its_public_names_on_a_page(site):
    expected = {
        "structure": "autoprune.structure.groups.Groups",
        "costs": "autoprune.costs.cost.CostTable",
        "tracing": "autoprune.tracing.trace.trace",
        "evaluation": "autoprune.evaluation.importance.CRITERIA",
        "pipeline": "autoprune.pipeline.methods.base.PruningMethod",
        "envs": "autoprune.envs.layer_pruning.LayerPruningEnv",
        "agents": "autoprune.agents.search.search",
    }
    for room, name in expected.items():
        page = site / "reference" / "api" / f"{room}.html"
        assert f'id="{name}"' in page.read_text(encoding="utf-8"), name


def test_the_site_can_be_searched_without_a_server(site):
    assert (site / "search" / "search_index.js").exists()
    assert (site / "javascripts" / "iframe-worker.js").exists()
