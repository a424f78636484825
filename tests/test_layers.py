"""Imports run one way, from each layer to those below it, and the command line starts
without torch.
"""

import ast
import importlib
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"errors"},
    {"config", "files", "names", "provenance", "results", "structure"},
    {"costs", "locks"},
    {"runs"},
    {"tracing", "data", "reporting"},
    {"evaluation"},
    {"training", "scaling", "envs"},
    {"deploy", "agents"},
    {"latency"},
    {"pipeline"},
    {"cli"},
    {"experiments"},
)
"""The one rule: a module may import its own room, and rooms of the layers before its
own.
"""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FOREIGN = {
    "gymnasium": {"envs", "agents", "cli", "experiments"},
    "stable_baselines3": {"agents", "cli", "experiments"},
}
"""Reinforcement learning's packages, and the rooms that may know them."""
FRONT = {ROOT / "autoprune" / name for name in ("__init__.py", "__main__.py")}
"""The package's own face, which belongs to no room."""
FOLDERS = ("autoprune", "envs", "agents", "experiments")
MODULES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path not in FRONT
]


def room_of(path: Path) -> str:
    """The room that a file lies in: "structure" for autoprune/structure/groups.py,
    "errors" for autoprune/errors.py.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "autoprune" else parts[0]


def imports(tree: ast.AST) -> list[str]:
    """The modules that a piece of code imports, wherever in it."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test sees them"
            assert node.module is not None
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def wrong_edges(room: str, names: list[str]) -> list[str]:
    """Those of the imported modules that lie neither in the room nor in a layer below
    it.
    """
    wrong = []
    for name in names:
        package, _, rest = name.partition(".")
        target = package if package == "experiments" else rest.partition(".")[0]
        is_ours = package in ("autoprune", "experiments") and target in LEVEL
        if is_ours and target != room and LEVEL[target] >= LEVEL[room]:
            wrong.append(name)
    return wrong


def test_every_module_lies_in_a_room_of_the_list():
    assert {room_of(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_a_layer_above(path):
    wrong = wrong_edges(room_of(path), imports(ast.parse(path.read_text())))
    assert not wrong, (
        f"{path.relative_to(ROOT)} imports from its own layer or above: {wrong}"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_envs_and_what_lies_above_know_reinforcement_learning(path):
    names = imports(ast.parse(path.read_text()))
    packages = {name.partition(".")[0] for name in names}
    wrong = [
        package
        for package in packages & FOREIGN.keys()
        if room_of(path) not in FOREIGN[package]
    ]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_wrong_edges_are_seen_in_functions_and_conditions_too():
    code = "from autoprune import envs\ndef f():\n    if 1:\n        from autoprune.agents.search import search\n"
    found = imports(ast.parse(code))
    assert wrong_edges("costs", found) == [
        "autoprune.envs",
        "autoprune.agents.search.search",
    ]
    assert wrong_edges("training", found) == [
        "autoprune.envs",
        "autoprune.agents.search.search",
    ]
    assert wrong_edges("agents", found) == []
    assert wrong_edges("cli", ["experiments.tables.read_table"]) == [
        "experiments.tables.read_table"
    ]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("autoprune.cli.main", {"torch", "gymnasium", "matplotlib"}),
        ("autoprune.config", {"torch", "gymnasium", "matplotlib"}),
        ("autoprune.tracing.trace", {"torchvision", "timm", "gymnasium"}),
        ("autoprune.data", {"torch", "torchvision", "PIL"}),
    ],
)
def test_modules_are_imported_without_what_they_may_never_need(module, heavy):
    code = f"import {module}, sys; print(*{heavy} & set(sys.modules))"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", ["autoprune", "autoprune.data"])
def test_every_name_at_a_front_door_leads_to_what_its_home_calls_so(package):
    door = importlib.import_module(package)
    assert set(door.__all__) - {"__version__"} == set(door._HOMES)
    for name, home in door._HOMES.items():
        module = importlib.import_module(f"{package}.{home}")
        assert getattr(door, name) is vars(module)[name]
    assert set(door.__all__) <= set(dir(door))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = door.no_such_name
