"""Imports run one way, autoprune ← envs ← agents ← experiments, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("autoprune", "envs", "agents", "experiments")
COMPOSITION_ROOT = {ROOT / "autoprune" / name for name in ("cli.py", "commands.py", "steps.py")}
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(tree: ast.AST) -> list[str]:
    """The modules that a piece of code imports, wherever in it."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test sees them"
            names.append(node.module)
    return names


def imports_at_module_level(tree: ast.Module) -> list[str]:
    """The modules that are imported as soon as the file is."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    outside = [node for node in tree.body if not isinstance(node, functions)]
    return [name for node in outside for name in imports(node)]


def wrong_edges(layer: str, names: list[str]) -> list[str]:
    """Those of the imported modules that lie above the layer."""
    above = LAYERS[LAYERS.index(layer) + 1 :]
    return [name for name in names if name.partition(".")[0] in above]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_a_layer_above(path):
    tree = ast.parse(path.read_text())
    names = imports_at_module_level(tree) if path in COMPOSITION_ROOT else imports(tree)
    layer = path.relative_to(ROOT).parts[0]
    wrong = [f"{path.relative_to(ROOT)} -> {name}" for name in wrong_edges(layer, names)]
    assert not wrong, f"imports run against {' <- '.join(LAYERS)}: {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_envs_and_what_lies_above_know_reinforcement_learning(path):
    layer, names = path.relative_to(ROOT).parts[0], imports(ast.parse(path.read_text()))
    foreign = {"autoprune": {"gymnasium", "stable_baselines3"}, "envs": {"stable_baselines3"}}.get(layer, set())
    wrong = [f"{path.relative_to(ROOT)} -> {name}" for name in names if name.partition(".")[0] in foreign]
    assert not wrong, f"autoprune knows no RL and envs only Gymnasium: {wrong}"


def test_wrong_edges_are_seen_in_functions_and_conditions_too():
    code = "import envs\ndef f():\n    if 1:\n        from agents.search import search\n"
    assert wrong_edges("autoprune", imports(ast.parse(code))) == ["envs", "agents.search"]
    assert wrong_edges("autoprune", imports_at_module_level(ast.parse(code))) == ["envs"]
    assert wrong_edges("agents", imports(ast.parse(code))) == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("autoprune.cli", {"torch", "gymnasium", "matplotlib"}),
        ("autoprune.config", {"torch", "gymnasium", "matplotlib"}),
        ("autoprune.tracing", {"torchvision", "timm", "gymnasium"}),
    ],
)
def test_modules_are_imported_without_what_they_may_never_need(module, heavy):
    code = f"import {module}, sys; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
